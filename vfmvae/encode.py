"""Encode images once, so that diffusion models train on latents; see vfmvae.data.latent_folder for the files.

    python -m vfmvae.encode photos/ --tokenizer runs/demo --output latents
    torchrun --nproc-per-node 8 -m vfmvae.encode photos/ --tokenizer runs/demo --output latents

The same command again goes on after a stop, shard by shard, and mends shards that are damaged. Images are
centre crops in the order of their names. A latent depends on (seed, image number), and not on the batch
size, beyond rounding. Processes divide the shards and never talk to each other: torchrun starts them, or
anything else with --share 0/8, --share 1/8, ...
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vfmvae.cli import UsageError, command, parse
from vfmvae.data.latent_folder import (
    MAX_SHARD_IMAGES,
    STORAGE,
    LatentSettings,
    Manifest,
    hash_of_names,
    pack_names,
)
from vfmvae.data.latent_writer import LatentWriter
from vfmvae.data.ordered import OrderedImages, batches_ahead, open_in_order
from vfmvae.data.quarantine import QUARANTINE, Quarantine, check_share
from vfmvae.data.samples import Fault, Part
from vfmvae.images import check_images
from vfmvae.inference import (
    ModelOptions,
    check_resolution,
    dtype_name,
    memory_errors,
    open_tokenizer,
    progress,
    say,
)
from vfmvae.tokenizer import DiscretePosterior, Tokenizer
from vfmvae.tokenizer.files import tokenizer_hash
from vfmvae.training.distributed import place

SHARD_BYTES = 2 << 30
"""A shard is made in memory and lost on a kill: unless the user says how many images, it has at most this."""
FAULTS_SHOWN = 10


@dataclass
class Encode:
    """Images to shards of latents, for diffusion models.
    Example: python -m vfmvae.encode photos/ --tokenizer runs/demo --output latents
    """

    output: Path
    """Folder for the shards; one that was begun is completed."""
    data: tyro.conf.Positional[str | None] = None
    """Image folder, tar shards, saved data set or parquet, scenes or shapes (drawn); if not given, the
    embedded photographs."""
    part: Part = "train"
    """Which images: a split as training makes it, or (of a folder) all."""
    images: int | None = None
    """Encode only so many; of the endless photographs and drawn images 1000 if not given."""
    resolution: int | None = None
    """Size of the centre squares; if not given, the tokenizer's own."""
    kind: Literal["sample", "mean"] = "sample"
    """Latents as samples of the posterior, or its mean."""
    moments: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Store mean and log variance too, so that training can draw new samples."""
    tokens: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Store the frozen encoder's patch tokens after its final norm too, which REPA and REG align to."""
    class_token: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Store the encoder's class token too, for REG; of an encoder without one, what it pools to."""
    storage: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What latents, moments and the encoder's features are stored in."""
    shard_images: int | None = None
    """Images in one shard; if not given, as many as 2 GiB hold, at most 10000."""
    share: str | None = None
    """I/N: this process makes the shards I, I + N, ...; if not given, what torchrun says, else all of them.
    The process that ends last writes the manifest."""
    max_broken: float = 0.001
    """Share of a process's images that may be unreadable: they are left out, and named in quarantine.jsonl
    beside the shards. Beyond it the command stops."""
    seed: int = 0
    """Start of every random draw."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if self.shard_images is not None and not 1 <= self.shard_images <= MAX_SHARD_IMAGES:
            raise ValueError(f"shard_images is {self.shard_images}; it must be 1 to {MAX_SHARD_IMAGES}")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images is {self.images}; it must be at least 1")
        check_share(self.max_broken)
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        self.processes()

    def processes(self) -> tuple[int, int]:
        """Which of how many processes this is."""
        if self.share is None:
            return place()
        first, slash, second = self.share.partition("/")
        if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
            raise ValueError(f"share is {self.share!r}; it must be I/N with I from 0 to N - 1, such as 0/8")
        return int(first), int(second)


class EncodedShard(NamedTuple):
    """The tensors of a shard, and the images that it lacks because they cannot be read."""

    tensors: dict[str, Tensor]
    faults: list[Fault]


@torch.no_grad()
def encode_shard(
    tokenizer: Tokenizer,
    source: OrderedImages,
    rows: range,
    settings: LatentSettings,
    batch_size: int,
    bar: Progress,
    quarantine: Quarantine,
) -> EncodedShard:
    """One shard, as vfmvae.data.latent_folder describes it.

    A batch may lack images that cannot be read: its `number` says which ones are there, and `faults` what is
    wrong with the others. Raises ValueError if `quarantine` has enough of them, and FloatingPointError for an
    image that gives NaN.
    """
    tensors = {
        name: torch.empty(len(rows), *shape, dtype=STORAGE[settings.storage])
        for name, shape in row_shapes(tokenizer, settings).items()
    }
    labels = [torch.empty(0, dtype=torch.int64)]
    names: list[str] = []
    numbers: list[int] = []
    faults: list[Fault] = []
    for batch in batches_ahead(source, rows, batch_size):
        faults += batch["faults"]
        quarantine.add(batch["faults"])
        quarantine.check()
        bar.advance(bar.task_ids[0], len(batch["key"]) + len(batch["faults"]))
        if not batch["key"]:
            continue
        there = batch["number"]
        images = batch["image"].to(tokenizer.align.weight.device)
        for mirrored, suffix in enumerate(("", "_flip")):
            encoded = encode_batch(
                tokenizer, images.flip(-1) if mirrored else images, there, mirrored, settings
            )
            for name, tensor in encoded.items():
                check_finite(name, tensor, batch["key"])
                tensors[name + suffix][len(names) : len(names) + len(there)] = tensor
        labels.append(batch["label"])
        names += batch["key"]
        numbers += there
    tensors = {name: tensor[: len(names)] for name, tensor in tensors.items()}
    tensors |= {"labels": torch.cat(labels), "names": pack_names(names)}
    tensors["numbers"] = torch.tensor(numbers, dtype=torch.int64)
    return EncodedShard(tensors, faults)


def encode_batch(
    tokenizer: Tokenizer, images: Tensor, numbers: Sequence[int], mirrored: int, settings: LatentSettings
) -> dict[str, Tensor]:
    """What a shard stores of uint8 images, by name, as it is stored; one pass of the encoder gives all.

    The noise of a sample is drawn from (seed, image number, mirrored).
    """
    seen = tokenizer.encoder(check_images(images, tokenizer.image_multiple))
    height, width = (side // tokenizer.config.downsample for side in images.shape[-2:])
    posterior = tokenizer.fuse(seen.layers, (height, width))
    if isinstance(posterior, DiscretePosterior) or settings.kind == "mean":
        found = {"latents": posterior.mode()}
    else:
        shape = posterior.mean.shape[1:]
        draws = [np.random.default_rng((settings.seed, number, mirrored)) for number in numbers]
        noise = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in draws])
        found = {"latents": posterior.sample(torch.from_numpy(noise).to(posterior.mean))}
    if settings.moments and not isinstance(posterior, DiscretePosterior):
        found["moments"] = posterior.moments
    if settings.tokens:
        found["features"] = seen.layers[tokenizer.config.encoder.layers.index(-1)]
    if settings.class_token:
        found["class_token"] = seen.pooled
    return {name: tensor.to("cpu", STORAGE[settings.storage]) for name, tensor in found.items()}


def check_finite(name: str, values: Tensor, keys: list[str]) -> None:
    bad = (~values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"the {name} of {keys[bad[0]]} are not finite; try --dtype fp32 --storage fp32"
        )


def row_shapes(tokenizer: Tokenizer, settings: LatentSettings) -> dict[str, tuple[int, ...]]:
    """What is stored of one image: the shape of each tensor by name."""
    assert settings.resolution is not None
    channels, side = tokenizer.config.latent_channels, settings.resolution // tokenizer.config.downsample
    width = tokenizer.encoder.width
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (channels, side, side),
        "moments": (2 * channels, side, side),
        "features": (prod(settings.tokens or ()), width),
        "class_token": (width,),
    }
    return {name + suffix: shapes[name] for name in settings.fields for suffix in ("", "_flip")}


def settings_of(
    options: Encode, tokenizer: Tokenizer, source: OrderedImages, resolution: int
) -> LatentSettings:
    """What decides the values that will be stored."""
    seen = options.tokens or options.class_token
    settings = LatentSettings(
        tokenizer=tokenizer_hash(tokenizer),
        images=len(source),
        names=hash_of_names(source.names()),
        resolution=resolution,
        kind=options.kind,
        moments=options.moments,
        storage=options.storage,
        compute=dtype_name(tokenizer.dtype),
        seed=options.seed,
        shard_images=options.shard_images or MAX_SHARD_IMAGES,
        tokens=tokenizer.encoder.grid(resolution, resolution) if options.tokens else None,
        class_token=options.class_token,
        encoder=tokenizer.config.encoder.name if seen else None,
    )
    if options.shard_images is not None:
        return settings
    numbers = sum(prod(shape) for shape in row_shapes(tokenizer, settings).values())
    fit = SHARD_BYTES // (numbers * STORAGE[options.storage].itemsize)
    return replace(settings, shard_images=max(1, min(fit, MAX_SHARD_IMAGES)))


def check_contents(options: Encode, tokenizer: Tokenizer) -> None:
    """UsageError for what this tokenizer does not have."""
    if options.moments and tokenizer.config.bottleneck.kind == "discrete":
        raise UsageError("--moments: the latents of this tokenizer are codes and have none")
    layers = tokenizer.config.encoder.layers
    if options.tokens and -1 not in layers:
        raise UsageError(
            f"--tokens: this tokenizer reads the layers {layers} of its encoder, and REPA and REG align to"
            f" layer -1, after the final norm"
        )
    check_resolution(tokenizer, options.resolution)


@command
def main() -> None:
    options = parse(Encode, "encode")
    index, processes = options.processes()
    console = Console(quiet=index > 0 and options.share is None)  # one of torchrun's processes draws bars
    started = time.perf_counter()
    _, tokenizer = open_tokenizer(options.model, console)
    check_contents(options, tokenizer)
    resolution = options.resolution or tokenizer.config.resolution
    source = open_in_order(options.data, options.part, resolution, options.images, options.seed)
    settings = settings_of(options, tokenizer, source, resolution)
    if settings.shards < processes and index == 0:
        say(console, few_shards(settings, processes))
    with progress(console, "checking", settings.shards, "shards") as bar:
        writer = LatentWriter(
            options.output,
            settings,
            source.classes,
            (index, processes),
            partial(bar.advance, bar.task_ids[0]),
        )
    for problem in writer.damaged:
        say(console, f"{problem}; it is encoded again")
    writer.discard_damaged()

    todo = sum(len(settings.rows(number)) for number in writer.missing)
    encoded, faults = 0, list[Fault]()
    listed = options.output / (f"quarantine-{index}.jsonl" if index else QUARANTINE)
    share = -(-len(source) // processes)
    quarantine = Quarantine(listed, share, options.max_broken, lost=writer.lost())
    for fault in quarantine.add(source.faults()):
        say(console, f"warning: {fault.key}: {fault.reason}")
    quarantine.check()
    with memory_errors(), progress(console, "encoding", todo) as bar:
        for number in writer.missing:
            rows = settings.rows(number)
            if writer.is_there(number):  # workers of a torchrun that was killed may live on
                bar.advance(bar.task_ids[0], len(rows))
                continue
            shard = encode_shard(tokenizer, source, rows, settings, options.model.batch_size, bar, quarantine)
            writer.write(number, shard.tensors)
            encoded += len(shard.tensors["numbers"])
            faults += shard.faults
    seconds = time.perf_counter() - started
    with progress(console, "finishing", 2 * settings.shards, "shards") as bar:
        manifest = writer.finish(partial(bar.advance, bar.task_ids[0]))
    console.quiet = False
    report(console, options.output, (index, processes), encoded, seconds, faults, manifest)


def report(
    console: Console,
    folder: Path,
    share: tuple[int, int],
    encoded: int,
    seconds: float,
    faults: list[Fault],
    manifest: Manifest | None,
) -> None:
    """What this process has done, in a line and one for each image that it left out."""
    who = f"process {share[0]} of {share[1]}, " if share[1] > 1 else ""
    for fault in faults[:FAULTS_SHOWN]:
        say(console, f"{who}left out {fault.key}: {fault.reason}")
    if len(faults) > FAULTS_SHOWN:
        say(console, f"{who}and {len(faults) - FAULTS_SHOWN} more")
    left_out = f", {len(faults)} could not be read" if faults else ""
    done = f"{who}{folder}: {encoded} images encoded in {seconds:.0f} s{left_out}"
    if manifest is None:
        say(console, f"{done}; other processes are not done yet")
        return
    shape = " x ".join(map(str, manifest.latent_shape))
    lacking = manifest.settings.images - len(manifest)
    lack = (
        f"; {lacking} of the data set's images are left out, see {folder}/quarantine*.jsonl"
        if lacking
        else ""
    )
    what = f"{len(manifest)} latents of {shape}, shards: {len(manifest.shards)}"
    say(console, f"{done}; complete: {what}{lack}")


def few_shards(settings: LatentSettings, processes: int) -> str:
    """The sentence for processes that have nothing to do."""
    even = -(-settings.images // processes)
    if -(-settings.images // even) < processes:
        even = max(1, settings.images // processes)
    return (
        f"note: {settings.shards} shards for {processes} processes, so"
        f" {processes - settings.shards} have nothing to do; --shard-images {even} would share the work"
    )


if __name__ == "__main__":
    main()
