"""Folders of latents: what one holds and whether it is whole, and folders that other projects have encoded.

    python -m vfmvae.latents info latents/
    python -m vfmvae.latents import their_latents/ --from lightningdit --output latents

See vfmvae.data.latent_folder for the files; `vfmvae encode` makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vfmvae.cli import command, parse
from vfmvae.data.latent_folder import (
    MAX_SHARD_IMAGES,
    STATISTICS,
    Manifest,
    Shard,
    channel_statistics,
    check_shards,
    latents_of,
    not_finite,
    open_shards,
    read_manifest,
)
from vfmvae.data.latent_import import LightningDiTFolder, RepaFolder, joined
from vfmvae.data.latent_writer import LatentWriter
from vfmvae.data.latents import Latents
from vfmvae.inference import progress, say
from vfmvae.weights import read_content

CHUNK = 256
SOURCES: dict[str, Callable[[Path], LightningDiTFolder | RepaFolder]] = {
    "lightningdit": LightningDiTFolder,
    "repa": RepaFolder,
}


@dataclass
class Info:
    """Check every byte of a folder of latents, and say what it holds. Example:
    python -m vfmvae.latents info latents/
    """

    folder: tyro.conf.Positional[Path]
    """A folder that `vfmvae encode` or `vfmvae latents import` has written."""


@dataclass
class Import:
    """Make a folder of latents out of what another project has encoded. Example:
    python -m vfmvae.latents import their_latents/ --from lightningdit --output latents
    """

    source: tyro.conf.Positional[Path]
    """Their folder: LightningDiT's safetensors, or REPA's with `vae-sd/` and `dataset.json` in it."""
    format: Annotated[Literal["lightningdit", "repa"], tyro.conf.arg(name="from")]
    """Whose format it has; REG's is REPA's."""
    output: Path
    """Folder for the shards; one that was begun is completed."""
    shard_images: int = MAX_SHARD_IMAGES
    """Images in one shard."""

    def __post_init__(self) -> None:
        if not 1 <= self.shard_images <= MAX_SHARD_IMAGES:
            raise ValueError(f"shard_images is {self.shard_images}; it must be 1 to {MAX_SHARD_IMAGES}")


Commands = Annotated[Info, tyro.conf.subcommand("info")] | Annotated[Import, tyro.conf.subcommand("import")]


@dataclass(frozen=True)
class Contents:
    """A folder that was read from end to end, and found whole."""

    manifest: Manifest
    shards: list[Shard]
    labels: Tensor  # int64 [N]


def inspect(folder: Path, console: Console) -> Contents:
    """Read every byte of a folder. ValueError names the first thing that is not as it should be."""
    manifest = read_manifest(folder)
    total = len(manifest.shards)
    with progress(console, "checksums", total, "shards") as bar:
        check_shards(folder, manifest, advance=partial(bar.advance, bar.task_ids[0]))
    shards = open_shards(folder, manifest)
    for number, shard in enumerate(shards):
        check_numbers(shard, manifest.settings.rows(number))
    labels = Latents(folder, "validation", verify=False).labels
    with progress(console, "values", 2 * total, "shards") as bar:
        advance = partial(bar.advance, bar.task_ids[0])
        for shard in shards:
            wrong = not_finite(shard, shard.columns)
            if wrong is not None:
                raise ValueError(f"{folder}: {wrong}, and encode again in --storage fp32")
            advance()
        found = channel_statistics(latents_of(shards, manifest.settings, advance))
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (manifest.mean, manifest.std))
    if not close(found, (mean, std), 1e-9):
        raise ValueError(
            f"{folder}: the statistics in its manifest are not those of its latents; encode again"
        )
    if not close(read_statistics(folder / STATISTICS), (mean, std), 1e-6):
        raise ValueError(f"{folder}: {STATISTICS} does not hold the statistics of the latents; encode again")
    return Contents(manifest, shards, labels)


def check_numbers(shard: Shard, planned: range) -> None:
    """ValueError unless each image is there at most once, in order, and belongs here."""
    numbers = shard.columns["numbers"].integers()
    if not len(numbers):
        return
    ascending = bool((numbers[1:] > numbers[:-1]).all())
    if not ascending or numbers[0] not in planned or numbers[-1] not in planned:
        raise ValueError(f"{shard.path} holds images that do not belong there, or twice; encode again")


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> bool:
    """Whether means and stds [C] agree, measured in stds, or in digits where those are many."""
    (mean, std), (their_mean, their_std) = found, expected
    limit = tolerance * (their_std + their_mean.abs())
    return bool(((mean - their_mean).abs() <= limit).all() and ((std - their_std).abs() <= limit).all())


def read_statistics(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and std [C] in float64, of a file as LightningDiT writes it."""
    content = read_content(path)
    found = [content.get(name) if isinstance(content, dict) else None for name in ("mean", "std")]
    mean, std = (value if isinstance(value, Tensor) else torch.empty(0) for value in found)
    if not mean.numel() or mean.shape != std.shape or not mean.is_floating_point():
        raise ValueError(f"{path} holds no mean and std of the same shape")
    return mean.flatten().double(), std.flatten().double()


def describe(contents: Contents) -> list[tuple[str, str]]:
    """What the table says."""
    manifest, shards = contents.manifest, contents.shards
    settings = manifest.settings
    columns = next(shard.columns for shard in shards if len(shard))
    kind = {"sample": "samples", "mean": "means", "unknown": "samples or means"}[settings.kind]
    shape = " x ".join(map(str, manifest.latent_shape))
    left_out = settings.images - len(manifest)
    features = "no"
    if settings.tokens is not None:
        rows, width = settings.tokens
        features = f"{rows} x {width} tokens of {columns['features'].shape[1]}, {settings.encoder}"
    class_token = f"{columns['class_token'].shape[0]}, {settings.encoder}" if settings.class_token else "no"
    size = sum(entry.bytes for entry in manifest.shards)
    ours = settings.origin == "encode"
    return [
        ("encoded by", f"vfmvae, tokenizer {settings.tokenizer}" if ours else settings.origin),
        ("images", f"{len(manifest)}" + (f"; {left_out} could not be read" if left_out else "")),
        ("of", f"{settings.resolution or 'unknown'} px, {settings.preprocessing}"),
        ("latents", f"{shape}, {settings.storage}, {kind}, computed in {settings.compute}"),
        ("mirror images", "yes" if settings.flips else "no"),
        ("moments", "yes" if settings.moments else "no"),
        ("features", features),
        ("class token", class_token),
        ("labels", describe_labels(contents.labels, len(manifest.classes))),
        ("mean", f"{min(manifest.mean):.4g} to {max(manifest.mean):.4g} over channels"),
        ("std", f"{min(manifest.std):.4g} to {max(manifest.std):.4g} over channels"),
        ("shards", f"{len(shards)}, {size / 2**30:.2f} GiB"),
    ]


def describe_labels(labels: Tensor, classes: int) -> str:
    """How many images the classes have, in brief."""
    if not classes:
        return "none"
    counts = torch.bincount(labels[labels >= 0], minlength=classes)
    without = int((labels < 0).sum())
    each = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.min()}"
    plural = "classes" if classes > 1 else "class"
    return f"{classes} {plural} of {each} images" + (f"; {without} images without one" if without else "")


def info(options: Info, console: Console) -> None:
    contents = inspect(options.folder, console)
    say(console, printable(str(options.folder)))
    table = Table("", "", show_header=False)
    for name, value in describe(contents):
        table.add_row(name, Text(printable(value)))
    console.print(table)
    say(console, "whole: checksums, values and statistics are as the manifest says")


def printable(text: str) -> str:
    """Without the control characters that a manifest of others may hold."""
    return "".join(character if character.isprintable() else "?" for character in text)


def import_latents(options: Import, console: Console) -> None:
    source = SOURCES[options.format](options.source)
    settings = source.settings(options.shard_images)
    with progress(console, "checking", settings.shards, "shards") as bar:
        advance = partial(bar.advance, bar.task_ids[0])
        writer = LatentWriter(options.output, settings, source.classes, advance=advance)
    for problem in writer.damaged:
        say(console, f"{problem}; it is imported again")
    writer.discard_damaged()
    todo = sum(len(settings.rows(number)) for number in writer.missing)
    with progress(console, "importing", todo) as bar:
        for number in writer.missing:
            rows, parts = settings.rows(number), []
            for start in range(rows.start, rows.stop, CHUNK):
                parts.append(source.read(start, min(start + CHUNK, rows.stop)))
                bar.advance(bar.task_ids[0], len(parts[-1]["labels"]))
            writer.write(number, joined(parts))
    with progress(console, "finishing", 2 * settings.shards, "shards") as bar:
        manifest = writer.finish(partial(bar.advance, bar.task_ids[0]))
    assert manifest is not None  # nobody shares the work
    shape = " x ".join(map(str, manifest.latent_shape))
    say(console, f"{options.output}: {todo} images imported; complete: {len(manifest)} latents of {shape}")
    if options.format == "lightningdit":
        say(console, compared(options.source / STATISTICS, manifest))


def compared(theirs: Path, manifest: Manifest) -> str:
    """How statistics from a sample of the latents differ from those of all of them."""
    try:
        mean, std = read_statistics(theirs)
    except ValueError as error:
        return f"note: their statistics are not used, and cannot be compared: {error}"
    our_mean, our_std = (torch.tensor(v, dtype=torch.float64) for v in (manifest.mean, manifest.std))
    if mean.shape != our_mean.shape:
        return f"note: {theirs} is of {len(mean)} channels, the latents have {len(our_mean)}; it is not used"
    off, ratio = ((mean - our_mean) / our_std).abs().max(), (std / our_std - 1).abs().max()
    return (
        f"note: {theirs} is replaced by statistics of all latents: its means are off by up to {off:.2g} std,"
        f" its stds by up to {100 * ratio:.2g}%"
    )


@command
def main() -> None:
    options = parse(cast("type[Info | Import]", Commands), "latents")
    console = Console()
    if isinstance(options, Info):
        info(options, console)
    else:
        import_latents(options, console)


if __name__ == "__main__":
    main()
