"""Measure a tokenizer's reconstructions: PSNR, SSIM and a perceptual distance, over held-out or any images.

    python -m vfmvae.evaluate --tokenizer runs/demo --data photos/

Images are centre crops; reconstructions come from the posterior's mode, rounded to 8 bits. The perceptual
distance is LPIPS where VGG16's weights are given, else that of the small encoder in this package: it needs no
download, and its numbers compare with each other only.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vfmvae import __version__
from vfmvae.atomic import write_atomically
from vfmvae.cli import command, parse
from vfmvae.data.ordered import OrderedImages, batches_ahead, open_in_order
from vfmvae.data.quarantine import Quarantine, check_share
from vfmvae.data.samples import Part
from vfmvae.data.transforms import CENTRE_CROP
from vfmvae.images import to_unit
from vfmvae.inference import (
    ModelOptions,
    check_resolution,
    dtype_name,
    memory_errors,
    open_tokenizer,
    progress,
    reconstruct_images,
    say,
)
from vfmvae.losses.perceptual import PerceptualNetwork, perceptual_network
from vfmvae.metrics.reconstruction import lpips, psnr, ssim
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.files import tokenizer_hash

RESULT = "evaluation.json"
HEADINGS = {
    "psnr": "PSNR (dB, higher is better)",
    "ssim": "SSIM (higher is better)",
    "lpips": "LPIPS (lower is better)",
    "mini_distance": "mini distance (lower is better)",
}


@dataclass
class Evaluate:
    """PSNR, SSIM and perceptual distance of reconstructions.
    Example: python -m vfmvae.evaluate --tokenizer runs/demo --data photos/
    """

    data: str | None = None
    """Image folder, tar shards, saved data set or parquet, scenes or shapes (drawn); if not given, the
    embedded photographs."""
    part: Part = "validation"
    """Which images: a split as training makes it, or (of a folder) all."""
    images: int | None = None
    """Use only the first so many."""
    resolution: int | None = None
    """Size of the centre squares; if not given, the tokenizer's own."""
    vgg: Path | None = None
    """VGG16 weights for LPIPS: torchvision's vgg16-397923af.pth, or a .safetensors of the same."""
    max_broken: float = 0.001
    """Share of the images that may be unreadable; they are left out. Beyond it the command stops."""
    output: Path | None = None
    """The JSON file; if not given, evaluation.json in the tokenizer's folder, here for one from the hub."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 1:
            raise ValueError(f"images is {self.images}; it must be at least 1")
        check_share(self.max_broken)


@torch.no_grad()
def evaluate(
    tokenizer: Tokenizer,
    source: OrderedImages,
    distance: tuple[str, PerceptualNetwork],
    batch_size: int,
    bar: Progress,
    quarantine: Quarantine,
) -> tuple[dict[str, float], int]:
    """The mean of each measure, and over how many images; `distance` has a name and a network.

    Images that cannot be read go to `quarantine`, which may have enough of them: ValueError.
    """
    device = tokenizer.align.weight.device
    name, network = distance
    sums = dict.fromkeys(("psnr", "ssim", name), 0.0)
    measured = 0
    quarantine.add(source.faults())
    for batch in batches_ahead(source, range(len(source)), batch_size):
        quarantine.add(batch["faults"])
        quarantine.check()
        bar.advance(bar.task_ids[0], len(batch["key"]) + len(batch["faults"]))
        images = batch["image"]
        measured += len(images)
        if not len(images):
            continue
        reconstructions = reconstruct_images(tokenizer, images)
        pair = to_unit(reconstructions).to(device), to_unit(images).to(device)
        sums["psnr"] += psnr(*pair).sum().item()
        sums["ssim"] += ssim(*pair).sum().item()
        sums[name] += lpips(*pair, network).double().sum().item()
    if not measured:
        raise ValueError(f"none of the {len(source)} images can be read")
    return {measure: total / measured for measure, total in sums.items()}, measured


def choose_distance(vgg: Path | None, console: Console) -> tuple[str, PerceptualNetwork]:
    """LPIPS where there are weights for it, else the distance of `mini`, and a line that says so."""
    if vgg is not None:
        return "lpips", perceptual_network("lpips-vgg", vgg)
    say(console, "no --vgg weights for LPIPS: the distance is that of the small encoder mini")
    return "mini_distance", perceptual_network("mini")


@command
def main() -> None:
    options = parse(Evaluate, "evaluate")
    console = Console()
    name, tokenizer = open_tokenizer(options.model, console)
    check_resolution(tokenizer, options.resolution)
    resolution = options.resolution or tokenizer.config.resolution
    source = open_in_order(options.data, options.part, resolution, options.images)
    distance, network = choose_distance(options.vgg, console)
    network = network.to(tokenizer.align.weight.device).eval()
    quarantine = Quarantine(None, len(source), options.max_broken)
    batch_size = options.model.batch_size
    with memory_errors(), progress(console, "evaluating", len(source)) as bar:
        means, measured = evaluate(tokenizer, source, (distance, network), batch_size, bar, quarantine)
    for fault in quarantine.found:
        left_out = " is left out" if fault.counts else ""
        say(console, f"warning: {fault.key}{left_out}: {fault.reason}")

    table = Table("", "mean", title=f"{measured} images at {resolution} px", title_justify="left")
    for measure, value in means.items():
        table.add_row(HEADINGS[measure], f"{value:.4f}")
    console.print(table)
    result = {
        # Equal images have an infinite PSNR, which JSON has no word for.
        **{measure: value if math.isfinite(value) else None for measure, value in means.items()},
        "images": measured,
        "left_out": sorted({fault.key for fault in quarantine.found if fault.counts}),
        "data": options.data or "embedded photographs",
        "part": options.part,
        "resolution": resolution,
        "preprocessing": CENTRE_CROP,
        "tokenizer": name,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "dtype": dtype_name(tokenizer.dtype),
        "device": tokenizer.align.weight.device.type,
        "vfmvae": __version__,
    }
    folder = Path(name) if Path(name).is_dir() else Path()
    output = options.output or folder / RESULT
    write_atomically(
        output, lambda path: path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    )
    say(console, f"written to {output}")


if __name__ == "__main__":
    main()
