"""What a report shows of a run: its folder read, and turned into curves, stages and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vfmvae.serialization import read_json
from vfmvae.training.figures import figures
from vfmvae.training.logging import INTERVAL_KEYS, RATE_PREFIX, SKIPPED_PREFIX, read_metrics

MAX_PICTURES = 24
"""Pictures per run in a page, evenly spread over the run."""
TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "images_per_second": "images/s",
    "peak_memory_gib": "peak memory (GiB)",
    "skipped_steps": "skipped steps per interval",
}
NO_CURVE = ("kind", "step", "seen_images", "stage", "interval_s")
"""What a line holds besides curves."""

Line = dict[str, Any]


class Run(NamedTuple):
    """What the folder of a run says: lines by kind, in the order of images seen."""

    name: str
    folder: Path
    config: dict[str, Any]
    starts: list[Line]
    train: list[Line]
    evaluations: list[Line]

    @property
    def seen_images(self) -> int:
        return max((line["seen_images"] for line in self.train + self.evaluations), default=0)


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder, still running or not; ValueError if the folder holds none."""
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not config.exists() and not metrics.exists():
        raise ValueError(f"{folder} holds no run (neither {config.name} nor {metrics.name})")
    lines = [line for line in read_metrics(metrics) if isinstance(line.get("seen_images"), int)]
    kinds = {
        kind: [line for line in lines if line.get("kind") == kind] for kind in ("start", "train", "eval")
    }
    return Run(
        name,
        folder,
        read_json(config) if config.exists() else {},
        kinds["start"],
        _in_order(kinds["train"]),
        _in_order(kinds["eval"]),
    )


def _in_order(lines: Iterable[Line]) -> list[Line]:
    """By images seen; of lines about the same moment the one written last."""
    return [line for _, line in sorted({line["seen_images"]: line for line in lines}.items())]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole paths if two share it."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def title(name: str, of_section: str) -> str:
    """How a quantity of metrics.jsonl is called in a section of the page."""
    if of_section == "losses":  # one may have the name of a metric
        return name.replace("_", " ")
    return TITLES.get(name, name.removeprefix(RATE_PREFIX).replace("_", " "))


def section(name: str, of_evaluation: bool) -> str:
    """The part of the page that a quantity belongs to."""
    if of_evaluation:
        return "evaluation"
    if name.startswith(RATE_PREFIX):
        return "rates"
    return "speed" if name in INTERVAL_KEYS or name.startswith(SKIPPED_PREFIX) else "losses"


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every quantity of the runs, with a series {"run": number, "x": images seen, "y"} for each that has it.

    A series begins and ends where the quantity is there; in between it is None where a line lacks it, so that
    a stage without a loss is a gap.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        for lines, of_evaluation in ((run.evaluations, True), (run.train, False)):
            for name in _curves(lines):
                there = [i for i, line in enumerate(lines) if name in line]
                shown = lines[there[0] : there[-1] + 1]
                x, y = [line["seen_images"] for line in shown], [line.get(name) for line in shown]
                key = section(name, of_evaluation), name
                found.setdefault(key, []).append({"run": number, "x": x, "y": y})
    if not any(y for s in found.get(("speed", "skipped_steps"), []) for y in s["y"]):
        found.pop(("speed", "skipped_steps"), None)
    return [{"section": part, "title": title(name, part), "series": s} for (part, name), s in found.items()]


def first_and_last(runs: Sequence[Run]) -> dict[str, list[tuple[float | None, float | None] | None]]:
    """Each evaluation and loss -> its first and its last value in each run; None where a run lacks it."""
    found = {}
    for kind, after in (("evaluations", ", evaluation"), ("train", "")):
        columns: list[list[Line]] = [getattr(run, kind) for run in runs]
        for name in dict.fromkeys(name for lines in columns for name in _curves(lines)):
            part = section(name, kind == "evaluations")
            if part in ("evaluation", "losses"):
                values = [[line[name] for line in lines if name in line] for lines in columns]
                pairs = [(column[0], column[-1]) if column else None for column in values]
                found[title(name, part) + after] = pairs
    return found


def _curves(lines: Iterable[Line]) -> list[str]:
    """Names of the quantities, in the order in which they appear."""
    return list(dict.fromkeys(name for line in lines for name in line if name not in NO_CURVE))


def stages(run: Run) -> list[dict[str, Any]]:
    """The name of each stage that was reached, and the images seen when it began."""
    found: list[dict[str, Any]] = []
    before = 0
    for line in run.train:
        if not found or found[-1]["name"] != line.get("stage"):
            found.append({"name": line.get("stage"), "begins": before})
        before = line["seen_images"]
    return found


def pictures(run: Run) -> list[dict[str, Any]]:
    """The run's pictures as WebP in data URLs, {"seen_images", "source"}; unreadable ones are left out."""
    found = figures(run.folder)
    if len(found) > MAX_PICTURES:
        found = [found[round(i * (len(found) - 1) / (MAX_PICTURES - 1))] for i in range(MAX_PICTURES)]
    shown = []
    for seen_images, path in found:
        data = io.BytesIO()
        try:
            with Image.open(path) as picture:
                picture.convert("RGB").save(data, format="WEBP", quality=90)
        except OSError:  # removed, or cut off by a full disk
            continue
        source = "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode("ascii")
        shown.append({"seen_images": seen_images, "source": source})
    return shown
