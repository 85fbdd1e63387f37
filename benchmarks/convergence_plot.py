"""The curves and pictures of convergence.py as PNG files.

python benchmarks/convergence_plot.py FILE.json     draws the curves of a result again
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from convergence_models import KINDS, NAMES
from PIL import Image, ImageDraw
from torch import Tensor

COLOURS = dict(zip(KINDS, ("tab:gray", "tab:orange", "tab:blue"), strict=True))
ROW, MARGIN = 15, 18


def draw_curves(result: Mapping[str, Any], path: Path) -> str:
    """Distance, accuracy and alignment by steps: a line per tokenizer, a band from lowest to highest seed.

    `path`: of the JSON file. Returns what to tell: where the plot is, or how to get it without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"written: {path}; plot: pip install matplotlib; python benchmarks/convergence_plot.py {path}"
    figure = Figure(figsize=(15, 7), layout="constrained")
    axes = figure.subplots(2, 4, sharey="col")
    for row, repa in zip(axes, (False, True), strict=True):
        for kind in KINDS:
            runs = [r["curve"] for r in result["runs"] if (r["kind"], r["repa"]) == (kind, repa)]
            steps = [point["step"] for point in runs[0]]
            values = {
                "Frechet distance of samples": [[point["distance"] for point in run] for run in runs],
                "accuracy of samples": [[point["accuracy"] for point in run] for run in runs],
                "CKNNA of the best block": [[max(point["cknna"]) for point in run] for run in runs],
            }
            for axis, (title, curves) in zip(row, values.items(), strict=False):
                _band(axis, steps, curves, kind)
                axis.set(title=title, xlabel="steps")
            last = [run[-1]["cknna"] for run in runs]
            _band(row[3], list(range(1, len(last[0]) + 1)), last, kind)
            row[3].set(title="CKNNA of blocks, at the end", xlabel="block")
            tokenizer = result["tokenizers"][kind]
            for axis, what in ((row[0], "distance"), (row[1], "accuracy"), (row[3], "cknna")):
                axis.axhline(tokenizer[what], color=COLOURS[kind], linestyle=":", linewidth=1)
        row[0].set(ylabel="with REPA" if repa else "without REPA", yscale="log")
        row[0].legend()
    figure.suptitle(
        f"{result['budget']} budget, {len(result['sizes']['seeds'])} seeds; dotted: reconstructions"
        f" (distance, accuracy), latents (CKNNA)"
    )
    figure.savefig(path.with_suffix(".png"), dpi=100)
    return f"written: {path} and {path.with_suffix('.png')}"


def _band(axis: Any, x: list[int], curves: list[list[float]], kind: Any) -> None:
    values = torch.tensor(curves, dtype=torch.float64)
    axis.plot(x, values.mean(dim=0), marker="o", markersize=3, color=COLOURS[kind], label=NAMES[kind])
    axis.fill_between(x, values.amin(dim=0), values.amax(dim=0), color=COLOURS[kind], alpha=0.2)


def picture_grid(pictures: Mapping[str, Tensor], path: Path) -> None:
    """Rows of pictures uint8 [N, 3, R, R] under their names."""
    side = next(iter(pictures.values())).shape[-1]
    rows = {name: -(-len(images) // ROW) for name, images in pictures.items()}
    sheet = Image.new("RGB", (ROW * side, sum(MARGIN + count * side for count in rows.values())), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for name, images in pictures.items():
        pen.text((4, top + 3), name, fill="black")
        for number, image in enumerate(images):
            place = (number % ROW * side, top + MARGIN + number // ROW * side)
            sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), place)
        top += MARGIN + rows[name] * side
    sheet.save(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/convergence_plot.py FILE.json")
    print(draw_curves(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[1])))
