"""What the commands that use a trained tokenizer share: which one, on what, how far, names of pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vfmvae.atomic import write_atomically
from vfmvae.cli import UsageError, usage
from vfmvae.data.folder import EXTENSIONS
from vfmvae.diffusion.files import is_diffusion
from vfmvae.images import to_uint8
from vfmvae.serialization import read_json
from vfmvae.tokenizer import Tokenizer, load_tokenizer
from vfmvae.training.device import compute_dtype, pick_device, prepare_inference
from vfmvae.training.run_folder import RUNS, RunFolder


@dataclass(frozen=True)
class ModelOptions:
    """The tokenizer and what it runs on."""

    tokenizer: str | None = None
    """A training run, a saved tokenizer or a Hugging Face hub id; if not given, the latest run in runs/."""
    device: str = "auto"
    """A torch device, or auto: CUDA where there is one, else the CPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What encoder, fusion and decoder compute in; auto: bf16 on CUDA, else fp32. On CUDA the encoder is
    always in bf16."""
    batch_size: int = 16
    """Images at a time."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")


def open_tokenizer(options: ModelOptions, console: Console) -> tuple[str, Tokenizer]:
    """The tokenizer in eval mode on its device, and its folder or id; one line says so.

    Raises ValueError where there is none, or where it or the device cannot be used.
    """
    name = options.tokenizer or str(latest_tokenizer())
    with usage():
        device = pick_device(options.device)
    prepare_inference(device)
    tokenizer = load_tokenizer(name, device).requires_grad_(False)
    tokenizer.compute_dtype = compute_dtype(options.dtype, device)
    tokenizer.encoder.always_bfloat16 = tokenizer.compute_dtype == torch.bfloat16  # on a CPU too
    config = tokenizer.config
    say(
        console,
        f"{name}: {config.resolution} px, {config.latent_channels} channels at 1/{config.downsample},"
        f" {device}, {dtype_name(tokenizer.dtype)}",
    )
    return name, tokenizer


def latest_tokenizer() -> Path:
    """The run in runs/ whose model was written last; ValueError if there is none."""
    runs = [RunFolder(path) for path in RUNS.glob("*") if path.is_dir()]
    trained = [run for run in runs if run.model.exists() and not _trains_diffusion(run)]
    if not trained:
        raise ValueError(f"no trained tokenizer lies in {RUNS}/; give one with --tokenizer FOLDER or hub id")
    return max(trained, key=lambda run: run.model.stat().st_mtime).path


def _trains_diffusion(run: RunFolder) -> bool:
    """Whether its config says so; one that cannot be read is named where the run is loaded, if it is."""
    try:
        return is_diffusion(read_json(run.config))
    except ValueError:
        return False


def check_resolution(tokenizer: Tokenizer, resolution: int | None) -> None:
    """UsageError unless the tokenizer takes images of this size."""
    multiple = tokenizer.image_multiple
    if resolution is not None and (resolution < multiple or resolution % multiple):
        raise UsageError(
            f"--resolution {resolution} does not fit this tokenizer: give a multiple of {multiple}"
        )


def reconstruct_images(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """uint8 images [B, 3, H, W], of any device, through the posterior's mode and back to uint8 on the CPU."""
    latents = tokenizer.encode(images.to(tokenizer.align.weight.device)).mode()
    return to_uint8(tokenizer.decode(latents)).cpu()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def say(console: Console, line: str) -> None:
    """Print a line as it is: file names may hold what rich takes for markup."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress(console: Console, what: str, total: int, unit: str = "images") -> Iterator[Progress]:
    """A bar of images or another unit on a terminal, nothing elsewhere; advance its only task."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        bar.add_task(what, total=total)
        yield bar


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a device that is out of memory into a ValueError with the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{str(error).splitlines()[0]}; try a smaller --batch-size or --resolution"
        ) from None


class PictureNames:
    """Names of the pictures made of images: each once, and none leads out of the output folder."""

    def __init__(self, *reserved: str) -> None:
        self._taken = {name.lower() for name in reserved}  # some file systems do not tell A from a

    def take(self, name: str) -> PurePosixPath:
        """An image's name with .png for its ending; the second of a name (a.jpg, a.bmp) becomes a-2.png."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError(f"image name {name!r} leads out of the output folder")
        stem = path.stem if path.suffix.lower() in EXTENSIONS else path.name
        picture, number = path.with_name(f"{stem}.png"), 1
        while str(picture).lower() in self._taken:
            number += 1
            picture = path.with_name(f"{stem}-{number}.png")
        self._taken.add(str(picture).lower())
        return picture


def write_picture(path: Path, image: Image.Image) -> None:
    """A PNG, whole or not at all; OSError with a sentence if it cannot be written."""
    write_atomically(path, lambda partial: image.save(partial, format="PNG"))


def as_picture(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] as a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
