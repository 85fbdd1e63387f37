"""What a stored data set holds, before a long run meets it.

    python -m vfmvae.data inspect photos/

Every image is read and decoded once. Printed are counts, formats, sizes, classes, copies and what is broken;
a contact sheet shows images from all over the data set. Nothing is written into the data set, but for the
indexes of tar shards.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from vfmvae.cli import UsageError, command, parse
from vfmvae.data.contact_sheet import contact_sheet
from vfmvae.data.formats import open_samples
from vfmvae.data.inspection import Copy, Inspection, inspect
from vfmvae.data.quarantine import Quarantine
from vfmvae.data.samples import Fault, Part, Samples
from vfmvae.inference import progress, say, write_picture

HELP = """usage: vfmvae data inspect PATH [options]; `vfmvae data inspect --help` explains them

  inspect        counts, sizes, classes and broken files of stored images, and a contact sheet of them

Example: python -m vfmvae.data inspect photos/"""
FAULTS_SHOWN = 20
CLASSES_SHOWN = 5
"""At each end, of those with most and with fewest images."""
COPIES_SHOWN = 5
SMALL = 256
"""Short sides below are enlarged by the published recipes."""
QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}


@dataclass
class Inspect:
    """Counts, sizes, classes and broken files of stored images, and a contact sheet of them.
    Example: python -m vfmvae.data inspect photos/
    """

    path: tyro.conf.Positional[str]
    """The data set, as --data of the other commands takes it."""
    part: Part = "all"
    """Which images: a split as training makes it, or all."""
    images: int | None = None
    """Look only at the first so many."""
    output: Path = Path("contact_sheet.png")
    """PNG for the contact sheet, outside of the data set."""
    quarantine: Path | None = None
    """List everything broken here, as JSON lines; what the file holds already stays."""
    threads: int | None = None
    """Decode so many images at a time; if not given, one per CPU."""


def check(options: Inspect) -> None:
    """UsageError for a value that cannot be used."""
    for name in ("images", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: it must be at least 1")
    if options.output.suffix.lower() != ".png":
        raise UsageError(
            f"--output {options.output}: the contact sheet is a PNG, give a name that ends in .png"
        )
    for name in ("output", "quarantine"):
        file = getattr(options, name)
        if file is not None and file.resolve().is_relative_to(Path(options.path).resolve()):
            raise UsageError(f"--{name} {file} would lie in the data set: give a file outside of it")


class Section(NamedTuple):
    """A table of the report; the first column names its rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numeric: bool = True
    """Whether all but the first column are numbers."""


@command
def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(HELP)
        sys.exit(0)
    if name != "inspect":
        raise UsageError(f"unknown command data {name!r}; known: inspect")
    run_inspect(parse(Inspect, "data inspect", arguments=sys.argv[2:]))


def run_inspect(options: Inspect) -> None:
    """Raises ValueError if there is no data set to open, OSError if a file cannot be written."""
    check(options)
    console = Console()
    samples = open_samples(options.path, options.part)
    count = len(samples) if options.images is None else min(options.images, len(samples))
    threads = options.threads or len(os.sched_getaffinity(0))
    quarantine = Quarantine(options.quarantine, len(samples), 1.0)
    damage = samples.faults()
    quarantine.add(damage)
    with progress(console, "inspecting", count) as bar:

        def on_seen(fault: Fault | None) -> None:
            if fault is not None:
                quarantine.add([fault])
            bar.advance(bar.task_ids[0])

        found = inspect(samples, count, threads, on_seen)

    for section in report(options, samples, damage, found):
        show(console, section)
    if options.quarantine is not None:
        say(console, f"{options.quarantine}: lists {len(quarantine.found):,} that are broken")
    if not found.tiles:
        say(console, "no image can be read: there is no contact sheet")
        return
    write_picture(options.output, contact_sheet(found.tiles))
    say(console, f"{options.output}: contact sheet of {len(found.tiles)} images")


def report(options: Inspect, samples: Samples, damage: list[Fault], found: Inspection) -> list[Section]:
    """What is printed, in order; tables that would be empty are left out."""
    copies = found.copies()
    sections = [
        count_section(options, samples, damage, found, copies),
        Section("formats", ("format", "images"), _most_common(found.formats)),
        Section("modes", ("mode", "images"), _most_common(found.modes)),
        size_section(found),
        class_section(samples.classes, found.class_images),
        copy_section(samples, copies),
        fault_section([*damage, *found.broken]),
    ]
    return [section for section in sections if section.rows]


def count_section(
    options: Inspect, samples: Samples, damage: list[Fault], found: Inspection, copies: list[Copy]
) -> Section:
    images = _split_images(options) if options.part == "all" else {options.part: len(samples)}
    rows: list[tuple[str, ...]] = [(part, f"{count:,}") for part, count in images.items()]
    if found.looked_at < len(samples):
        rows.append(("looked at", f"the first {found.looked_at:,} of {len(samples):,}"))
    rows += [("decoded", f"{found.decoded:,}"), ("broken", f"{len(found.broken):,}")]
    if damage:
        rows.append(("damage found at opening", f"{len(damage):,}"))
    if found.unlabelled:
        rows.append(("without label, left out of training", f"{found.unlabelled:,}"))
    rows.append(("copies of other images", f"{len(copies):,}"))
    small = int((found.sizes()["short side"] < SMALL).sum())
    rows.append((f"short side below {SMALL} px", f"{small:,}"))
    rows.append(("stored", f"{decimal(found.bytes)} ({found.bytes:,} bytes)"))
    return Section("images", ("what", "images"), rows)


def _split_images(options: Inspect) -> dict[Part, int]:
    """Samples of both splits; 0 where there is none, as in a folder with a single image."""
    images: dict[Part, int] = {"train": 0, "validation": 0}
    for part in images:
        with suppress(ValueError):
            images[part] = len(open_samples(options.path, part))
    return images


def _most_common(counts: dict[str, int]) -> list[tuple[str, ...]]:
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return [(name, f"{count:,}") for name, count in ordered]


def size_section(found: Inspection) -> Section:
    """Every number is the size of an image: the smallest that the given share does not exceed."""
    rows: list[tuple[str, ...]] = []
    for name, values in found.sizes().items():
        if len(values):
            sizes = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
            rows.append((name, *(str(int(size)) for size in sizes)))
    return Section("pixels", ("upright", *QUANTILES), rows)


def class_section(classes: tuple[str, ...], class_images: np.ndarray) -> Section:
    """All of few classes, else those with most and with fewest images; none for a set without classes."""
    rows: list[tuple[str, ...]] = []
    if classes != ("",) and class_images.any():
        order = np.argsort(-class_images, kind="stable").tolist()
        rows = [(classes[label] or "(no folder)", f"{class_images[label]:,}") for label in order]
    if len(rows) > 2 * CLASSES_SHOWN:
        between = len(rows) - 2 * CLASSES_SHOWN
        rows[CLASSES_SHOWN:-CLASSES_SHOWN] = [(f"({between:,} classes between)", "")]
    return Section(f"{len(classes):,} classes", ("class", "images"), rows)


def copy_section(samples: Samples, copies: list[Copy]) -> Section:
    rows: list[tuple[str, ...]] = [
        (samples.key(copy.number), samples.key(copy.first)) for copy in copies[:COPIES_SHOWN]
    ]
    if len(copies) > COPIES_SHOWN:
        rows.append((f"({len(copies) - COPIES_SHOWN:,} more)", ""))
    return Section("copies", ("image", "has the bytes of"), rows, numeric=False)


def fault_section(faults: list[Fault]) -> Section:
    rows: list[tuple[str, ...]] = [(fault.key, fault.reason) for fault in faults[:FAULTS_SHOWN]]
    if len(faults) > FAULTS_SHOWN:
        rows.append((f"({len(faults) - FAULTS_SHOWN:,} more)", "--quarantine FILE lists all"))
    return Section("broken", ("image", "why"), rows, numeric=False)


def show(console: Console, section: Section) -> None:
    """A table on a terminal; elsewhere a line per row, which no width cuts."""
    if console.is_terminal:
        table = Table(title=section.title, title_justify="left")
        for number, column in enumerate(section.columns):
            table.add_column(
                column, overflow="fold", justify="right" if number and section.numeric else "left"
            )
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        return
    for name, *cells in section.rows:
        if len(cells) > 1:
            cells = [f"{column} {cell}" for column, cell in zip(section.columns[1:], cells, strict=True)]
        say(console, ": ".join(filter(None, (section.title, name, ", ".join(cells)))))


if __name__ == "__main__":
    main()
