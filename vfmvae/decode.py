"""Turn shards of latents back into images: the inverse of vfmvae.encode, up to what the tokenizer loses.

    python -m vfmvae.decode latents/ --tokenizer runs/demo --output images

Images are PNG files under the names that they were encoded from, or one `images.npz` with `arr_0` uint8
[N, H, W, 3] and `arr_1` labels int64 [N], as the published evaluators of generated images read it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vfmvae.atomic import write_atomically
from vfmvae.cli import command, parse
from vfmvae.data.latent_folder import check_shards, read_manifest
from vfmvae.data.latents import LatentBatch, Latents
from vfmvae.images import to_uint8
from vfmvae.inference import (
    ModelOptions,
    PictureNames,
    as_picture,
    memory_errors,
    open_tokenizer,
    progress,
    say,
    write_picture,
)
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.files import tokenizer_hash

NPZ = "images.npz"


@dataclass
class Decode:
    """Shards of latents to images.
    Example: python -m vfmvae.decode latents/ --tokenizer runs/demo --output images
    """

    latents: tyro.conf.Positional[Path]
    """A folder that `vfmvae encode` has written."""
    output: Path = Path("decoded")
    """Folder for the images; a new one, or an empty one."""
    format: Literal["png", "npz"] = "png"
    """One PNG for each image, or all of them as arrays in one images.npz."""
    images: int | None = None
    """Decode only the first so many."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 1:
            raise ValueError(f"images is {self.images}; it must be at least 1")


@torch.no_grad()
def decode(
    tokenizer: Tokenizer, latents: Latents, count: int, batch_size: int
) -> Iterator[tuple[LatentBatch, Tensor]]:
    """The first `count` latents in order, batch by batch, with their images uint8 [B, 3, H, W] on the CPU."""
    device = tokenizer.align.weight.device
    for start in range(0, count, batch_size):
        batch = latents.read(start, min(start + batch_size, count))
        assert batch["latent"] is not None  # every folder has them
        yield batch, to_uint8(tokenizer.decode(batch["latent"].to(device))).cpu()


def write_pictures(decoded: Iterable[tuple[LatentBatch, Tensor]], folder: Path) -> None:
    """One PNG for each image, under its name; names that come twice get a number."""
    names = PictureNames()
    for batch, images in decoded:
        for key, image in zip(batch["key"], images, strict=True):
            write_picture(folder / names.take(key), as_picture(image))


def write_arrays(decoded: Iterable[tuple[LatentBatch, Tensor]], path: Path, count: int) -> None:
    """All images in one .npz, written batch by batch."""
    labels: list[Tensor] = []

    def write(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                for number, (batch, images) in enumerate(decoded):
                    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()  # [B, H, W, 3]
                    if number == 0:
                        shape = (count, *pixels.shape[1:])
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(pixels.data)
                    labels.append(batch["label"])
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, torch.cat(labels).numpy())

    write_atomically(path, write)


def check_new(folder: Path) -> None:
    """ValueError unless the images will be the only ones here."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder as --output")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder as --output")


def open_latents(folder: Path, console: Console) -> Latents:
    """The latents of a folder, checksums compared. ValueError for one that is not whole."""
    manifest = read_manifest(folder)
    with progress(console, "checking", len(manifest.shards), "shards") as bar:
        check_shards(folder, manifest, advance=partial(bar.advance, bar.task_ids[0]))
    return Latents(folder, "validation", verify=False, fields=("latents",))


def check_latents(latents: Latents, tokenizer: Tokenizer) -> None:
    """ValueError unless the latents have the tokenizer's channels."""
    channels, needed = latents.manifest.latent_shape[0], tokenizer.config.latent_channels
    if channels != needed:
        raise ValueError(f"{latents.path} holds latents of {channels} channels; this tokenizer has {needed}")


@command
def main() -> None:
    options = parse(Decode, "decode")
    check_new(options.output)
    console = Console()
    latents = open_latents(options.latents, console)
    _, tokenizer = open_tokenizer(options.model, console)
    check_latents(latents, tokenizer)
    settings = latents.manifest.settings
    if settings.origin != "encode":
        say(
            console, f"note: these latents come from {settings.origin}; which tokenizer wrote them is unknown"
        )
    elif tokenizer_hash(tokenizer) != settings.tokenizer:
        say(console, "note: another tokenizer wrote these latents")

    count = min(options.images or len(latents), len(latents))
    with memory_errors(), progress(console, "decoding", count) as bar:
        decoded = watched(decode(tokenizer, latents, count, options.model.batch_size), bar)
        if options.format == "png":
            write_pictures(decoded, options.output)
        else:
            write_arrays(decoded, options.output / NPZ, count)
    where = options.output / NPZ if options.format == "npz" else options.output
    say(console, f"{count} images in {where}")


def watched(
    decoded: Iterable[tuple[LatentBatch, Tensor]], bar: Progress
) -> Iterator[tuple[LatentBatch, Tensor]]:
    """The same, with the bar moving."""
    for batch, images in decoded:
        yield batch, images
        bar.advance(bar.task_ids[0], len(images))


if __name__ == "__main__":
    main()
