"""One HTML page about runs: curves, pictures over time, results, configuration, environment.

    python -m vfmvae.report runs/demo                                   writes runs/demo/report.html
    python -m vfmvae.report runs/demo runs/other --output both.html     compares

The page needs neither a network nor other files. A run may be running still, or have nothing to show yet.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import tyro

from vfmvae import __version__
from vfmvae.atomic import write_atomically
from vfmvae.cli import UsageError, command, parse
from vfmvae.diffusion.files import is_diffusion
from vfmvae.report_data import Run, charts, first_and_last, pictures, read_run, short_names, stages
from vfmvae.training.logging import short_count

TEMPLATE = Path(__file__).with_suffix(".html")
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#d4a106", "#0891b2", "#db2777")
SECTIONS = {
    "evaluation": "Evaluation",
    "losses": "Losses",
    "rates": "Learning rates",
    "speed": "Speed and memory",
}
PICTURES = {
    "reconstructions": "Held-out images; below each row of them, their reconstructions.",
    "samples": "Samples of the averaged weights, of classes spread over all, always from the same noise.",
}
ENVIRONMENT = ("device", "processes", "vfmvae", "torch", "cuda", "python", "platform")
SWITCH = '<label class="switch"><input type="checkbox" id="log-scale"> logarithmic</label>'


@dataclass
class Report:
    """Write one HTML page about runs. Example: python -m vfmvae.report runs/demo runs/other"""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs."""
    output: Path | None = None
    """The page; if not given, report.html in the folder of the first run."""


def page(runs: Sequence[Run]) -> str:
    """The whole page; ValueError if plotly, whose script goes into it, is not installed."""
    if find_spec("plotly") is None:
        raise ValueError("the report needs the package plotly, which is not installed: pip install plotly")
    from plotly.offline import get_plotlyjs

    shown = charts(runs)
    drawn = [pictures(run) for run in runs]
    moments = sorted({picture["seen_images"] for found in drawn for picture in found})
    data = {
        "runs": [{"name": run.name, "colour": _colour(i)} for i, run in enumerate(runs)],
        "charts": shown,
        "stages": stages(runs[0]) if len(runs) == 1 else [],
        "images": max(1, *(run.seen_images for run in runs)),
        "pictures": drawn,
        "moments": moments,
    }
    body = [
        overview(runs),
        slider(runs, moments),
        *(curves(name, shown) for name in SECTIONS),
        results(runs),
        stage_tables(runs),
        configurations(runs),
        environments(runs),
    ]
    parts = {
        "title": escape(", ".join(run.name for run in runs)),
        "subtitle": f"vfmvae {__version__}, {_moment(datetime.now(timezone.utc))}",
        "legend": _legend(runs) if len(runs) > 1 else "",
        "body": "\n".join(part for part in body if part),
        "data": json.dumps(data, allow_nan=False).replace("</", "<\\/"),  # "</" would end the script element
        "plotly": get_plotlyjs(),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def overview(runs: Sequence[Run]) -> str:
    """How far each run is, how fast, and with what."""
    cells: dict[str, Callable[[Run], str]] = {
        "images seen": _progress,
        "steps": lambda run: f"{run.train[-1]['step'] if run.train else 0:,}",
        "stages": _reached,
        "images/s, median": lambda run: f"{statistics.median(_column(run, 'images_per_second') or [0]):,.1f}",
        "training time": lambda run: str(timedelta(seconds=round(sum(_column(run, "interval_s"))))),
        "peak memory": lambda run: f"{max(_column(run, 'peak_memory_gib'), default=0):.2f} GiB",
        "skipped steps": lambda run: f"{sum(_column(run, 'skipped_steps')):.0f}",
        "started": lambda run: f"{len(run.starts)} times" if len(run.starts) > 1 else _begun(run),
        "last written": _written,
    }
    rows = {name: [cell(run) for run in runs] for name, cell in cells.items()}
    return _section("Overview", _table([run.name for run in runs], rows, "short"))


def slider(runs: Sequence[Run], moments: Sequence[int]) -> str:
    """A slider over all moments with pictures, and a place for the picture of each run."""
    kinds = list(dict.fromkeys("samples" if is_diffusion(run.config) else "reconstructions" for run in runs))
    heading = " and ".join(kinds).capitalize()
    if not moments:
        return _section(heading, '<p class="quiet">No pictures yet.</p>')
    places = "".join(
        f'<figure><figcaption>{escape(run.name)}</figcaption><div class="scroll"><img id="picture-{i}"'
        f' alt="pictures of {escape(run.name)}"></div></figure>'
        for i, run in enumerate(runs)
    )
    choice = (
        f'<input id="moment" type="range" min="0" max="{len(moments) - 1}" value="{len(moments) - 1}"'
        ' aria-label="moment of the run"><output id="moment-text" for="moment"></output>'
    )
    explanation = " ".join(PICTURES[kind] for kind in kinds)
    content = f'<p class="quiet">{explanation}</p><div class="time">{choice}</div>{places}'
    return _section(heading, content)


def curves(section: str, shown: Sequence[Mapping[str, Any]]) -> str:
    """A heading and the place that the page's script fills; nothing if no chart belongs there."""
    if not any(chart["section"] == section for chart in shown):
        return ""
    switch = SWITCH if section == "losses" else ""
    return f'<h2>{SECTIONS[section]}{switch}</h2><div class="grid" id="charts-{section}"></div>'


def results(runs: Sequence[Run]) -> str:
    """The first and the last value of every evaluation and loss."""
    rows = {}
    for name, pairs in first_and_last(runs).items():
        rows[name] = [cell for pair in pairs for cell in (map(_number, pair) if pair else ("", ""))]
    heads = [f"{run.name}: {moment}" for run in runs for moment in ("first", "last")]
    if len(runs) == 1:
        heads = ["first", "last"]
    return _section("First and last values", _table(heads, rows, "number")) if rows else ""


def stage_tables(runs: Sequence[Run]) -> str:
    """For each run of several stages: in what they differ."""
    tables = []
    for run in runs:
        found = [stage for stage in run.config.get("stages") or [] if isinstance(stage, dict)]
        if len(found) < 2:
            continue
        names = [str(stage.get("name", number)) for number, stage in enumerate(found)]
        rows = _side_by_side([{k: v for k, v in stage.items() if k != "name"} for stage in found])
        different = {name: row for name, row in rows.items() if len(set(row)) > 1}
        tables.append(f"<h3>{escape(run.name)}</h3>{_table(names, different)}")
    return _section("Stages: where they differ", "".join(tables)) if tables else ""


def configurations(runs: Sequence[Run]) -> str:
    """Every field, folded away; fields in which runs differ stand above it."""
    rows = _side_by_side([run.config for run in runs])
    if not rows:
        return _section("Configuration", '<p class="quiet">No config.json.</p>')
    names = [run.name for run in runs]
    different = {name: row for name, row in rows.items() if len(set(row)) > 1}
    above = ""
    if len(runs) > 1:
        above = _table(names, different) if different else '<p class="quiet">The same in all runs.</p>'
    everything = f"<details><summary>all {len(rows)} fields</summary>{_table(names, rows)}</details>"
    return _section("Configuration", above + everything)


def environments(runs: Sequence[Run]) -> str:
    """Device and versions of each run's last start."""
    last = [run.starts[-1] if run.starts else {} for run in runs]
    rows = {name: [str(start.get(name, "")) for start in last] for name in ENVIRONMENT}
    return _section("Environment", _table([run.name for run in runs], rows)) if any(last) else ""


def _side_by_side(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Dotted name of each field -> its value in each config, "" where it lacks the field."""
    flat = [_flat(config) for config in configs]
    return {
        name: [values.get(name, "") for values in flat] for name in dict.fromkeys(n for f in flat for n in f)
    }


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested JSON as one level: {"a": {"b": [1, 2]}} is {"a.b": "1, 2"}; objects in lists are numbered."""
    if isinstance(value, dict):
        parts = {f"{name}.{key}".removeprefix("."): part for key, part in value.items()}
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = {f"{name}[{number}]": part for number, part in enumerate(value)}
    elif isinstance(value, list):
        return {name: ", ".join(_plain(part) for part in value)}
    else:
        return {name: _plain(value)}
    return {inner: text for key, part in parts.items() for inner, text in _flat(part, key).items()}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _section(heading: str, content: str) -> str:
    return f'<h2>{escape(heading)}</h2><div class="card scroll">{content}</div>'


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]], kind: str = "") -> str:
    """`kind`: "number" aligns cells to the right, "short" keeps each on one line."""
    cell = ' class="number"' if kind == "number" else ""
    head = "".join(f"<th{cell}>{escape(head)}</th>" for head in heads)
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td{cell}>{escape(text)}</td>" for text in row) + "</tr>"
        for name, row in rows.items()
    )
    return f'<table class="{kind}"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _legend(runs: Sequence[Run]) -> str:
    names = "".join(f'<span style="--run: {_colour(i)}">{escape(r.name)}</span>' for i, r in enumerate(runs))
    return f'<div class="legend">{names}</div>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _column(run: Run, name: str) -> list[float]:
    return [line[name] for line in run.train if line.get(name) is not None]


def _reached(run: Run) -> str:
    found = [(str(stage["name"]), stage["begins"]) for stage in stages(run)]
    return ", ".join(f"{name} (from {short_count(begins)})" if begins else name for name, begins in found)


def _progress(run: Run) -> str:
    total = run.starts[-1].get("total_images") if run.starts else None
    seen = f"{run.seen_images:,}"
    return f"{seen} of {short_count(total)} ({run.seen_images / total:.0%})" if total else seen


def _begun(run: Run) -> str:
    time = run.starts[0].get("time") if run.starts else None
    return _moment(datetime.fromisoformat(time)) if time else "not yet"


def _written(run: Run) -> str:
    metrics = run.folder / "metrics.jsonl"
    if not metrics.exists():
        return "nothing yet"
    return _moment(datetime.fromtimestamp(metrics.stat().st_mtime, timezone.utc))


def _moment(time: datetime) -> str:
    return f"{time.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


@command
def main() -> None:
    options = parse(Report, "report")
    if not options.runs:
        raise UsageError("name at least one run folder, for example: python -m vfmvae.report runs/demo")
    runs = [read_run(*pair) for pair in zip(options.runs, short_names(options.runs), strict=True)]
    output = options.output or options.runs[0] / "report.html"
    content = page(runs)
    write_atomically(output, lambda partial: partial.write_text(content, encoding="utf-8"))
    print(output)


if __name__ == "__main__":
    main()
