"""Encode images once, so that diffusion models train on latents; see vfmvae.data.latents for the files.

    python -m vfmvae.encode --tokenizer runs/demo --data photos/ --output latents

The same command again goes on after a stop, shard by shard, and mends shards that are damaged. Images are
centre crops in the order of their names. A latent depends on (seed, image number), and not on the batch
size, beyond rounding. Several processes, one per GPU, fill a folder with --share 0/8, --share 1/8, ...
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vfmvae.cli import UsageError, command, parse
from vfmvae.data.latents import MAX_SHARD_IMAGES, LatentSettings, LatentWriter, pack_names
from vfmvae.data.ordered import OrderedImages, open_in_order
from vfmvae.data.samples import Part
from vfmvae.inference import (
    ModelOptions,
    check_resolution,
    dtype_name,
    memory_errors,
    open_tokenizer,
    progress,
    say,
    tokenizer_hash,
)
from vfmvae.tokenizer import DiscretePosterior, Tokenizer

STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Encode:
    """Images to shards of latents, for diffusion models.
    Example: python -m vfmvae.encode --tokenizer runs/demo --data photos/ --output latents
    """

    output: Path
    """Folder for the shards; one that was begun is completed."""
    data: str | None = None
    """A folder of images; without one, the embedded photographs."""
    part: Part = "train"
    """Which images: a split as training makes it, or (of a folder) all."""
    images: int | None = None
    """Encode only so many; of the photographs' endless training crops 1000 if not given."""
    resolution: int | None = None
    """Size of the centre squares; if not given, the tokenizer's own."""
    kind: Literal["sample", "mean"] = "sample"
    """Latents as samples of the posterior, or its mean."""
    moments: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Store mean and log variance too, so that training can draw new samples."""
    storage: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What latents and moments are stored in."""
    shard_images: int = MAX_SHARD_IMAGES
    """Images in one shard."""
    share: str = "0/1"
    """I/N: this process makes the shards I, I + N, ...; the last of N processes writes the manifest."""
    seed: int = 0
    """Start of every random draw."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.shard_images <= MAX_SHARD_IMAGES:
            raise ValueError(f"shard_images is {self.shard_images}; it must be 1 to {MAX_SHARD_IMAGES}")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images is {self.images}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        self.processes()

    def processes(self) -> tuple[int, int]:
        """`share` as two numbers."""
        first, slash, second = self.share.partition("/")
        if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
            raise ValueError(f"share is {self.share!r}; it must be I/N with I from 0 to N - 1, such as 0/8")
        return int(first), int(second)


@torch.no_grad()
def encode_shard(
    tokenizer: Tokenizer,
    source: OrderedImages,
    rows: range,
    settings: LatentSettings,
    batch_size: int,
    bar: Progress,
) -> dict[str, Tensor]:
    """The tensors of one shard, as vfmvae.data.latents stores them.

    Raises ValueError for an image that cannot be read, and FloatingPointError for one that gives NaN.
    """
    parts: dict[str, list[Tensor]] = {}
    names: list[str] = []
    for start in range(rows.start, rows.stop, batch_size):
        numbers = range(start, min(start + batch_size, rows.stop))
        batch = source.read(numbers.start, numbers.stop)
        images = batch["image"].to(tokenizer.align.weight.device)
        for mirrored, suffix in enumerate(("", "_flip")):
            latents, moments = encode_batch(
                tokenizer, images.flip(-1) if mirrored else images, numbers, mirrored, settings
            )
            check_finite(latents, batch["key"])
            parts.setdefault("latents" + suffix, []).append(latents)
            if moments is not None:
                parts.setdefault("moments" + suffix, []).append(moments)
        parts.setdefault("labels", []).append(batch["label"])
        names += batch["key"]
        bar.advance(bar.task_ids[0], len(numbers))
    return {**{name: torch.cat(tensors) for name, tensors in parts.items()}, "names": pack_names(names)}


def encode_batch(
    tokenizer: Tokenizer, images: Tensor, numbers: range, mirrored: int, settings: LatentSettings
) -> tuple[Tensor, Tensor | None]:
    """Latents [B, C, h, w] of uint8 images, and moments [B, 2C, h, w] if asked for, as they are stored.

    The noise of a sample is drawn from (seed, image number, mirrored).
    """
    storage = STORAGE[settings.storage]
    posterior = tokenizer.encode(images)
    if isinstance(posterior, DiscretePosterior):
        return posterior.mode().to("cpu", storage), None
    if settings.kind == "mean":
        latents = posterior.mode()
    else:
        shape = posterior.mean.shape[1:]
        draws = [np.random.default_rng((settings.seed, number, mirrored)) for number in numbers]
        noise = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in draws])
        latents = posterior.sample(torch.from_numpy(noise).to(posterior.mean))
    return latents.to("cpu", storage), posterior.moments.to("cpu", storage) if settings.moments else None


def check_finite(latents: Tensor, keys: list[str]) -> None:
    bad = (~latents.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"the latents of {keys[bad[0]]} are not finite; try --dtype fp32 --storage fp32"
        )


def settings_of(
    options: Encode, tokenizer: Tokenizer, source: OrderedImages, resolution: int
) -> LatentSettings:
    """What decides the values that will be stored."""
    return LatentSettings(
        tokenizer=tokenizer_hash(tokenizer),
        images=len(source),
        names=hashlib.sha256("\n".join(source.names()).encode()).hexdigest(),
        resolution=resolution,
        kind=options.kind,
        moments=options.moments,
        storage=options.storage,
        compute=dtype_name(tokenizer.dtype),
        seed=options.seed,
        shard_images=options.shard_images,
    )


@command
def main() -> None:
    options = parse(Encode, "encode")
    console = Console()
    started = time.perf_counter()
    _, tokenizer = open_tokenizer(options.model, console)
    if options.moments and tokenizer.config.bottleneck.kind == "discrete":
        raise UsageError("--moments: the latents of this tokenizer are codes and have none")
    check_resolution(tokenizer, options.resolution)
    resolution = options.resolution or tokenizer.config.resolution
    source = open_in_order(options.data, options.part, resolution, options.images, options.seed)
    writer = LatentWriter(options.output, settings_of(options, tokenizer, source, resolution), source.classes)
    for problem in writer.damaged:
        say(console, f"{problem}; it is encoded again")

    index, processes = options.processes()
    todo = [number for number in writer.missing if number % processes == index]
    encoded = sum(len(writer.rows(number)) for number in todo)
    with memory_errors(), progress(console, "encoding", encoded) as bar:
        for number in todo:
            rows = writer.rows(number)
            shard = encode_shard(tokenizer, source, rows, writer.settings, options.model.batch_size, bar)
            writer.write(number, shard)
    seconds = time.perf_counter() - started
    manifest = writer.finish()
    done = f"{options.output}: {encoded} images encoded in {seconds:.0f} s"
    if manifest is None:
        say(console, f"{done}; other processes are not done yet")
        return
    shape = " x ".join(map(str, manifest.latent_shape))
    say(console, f"{done}; complete: {len(source)} latents of {shape}, shards: {len(manifest.shards)}")


if __name__ == "__main__":
    main()
