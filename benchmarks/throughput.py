"""Images per second of encoding and decoding: the reference against the fused operations.

    python benchmarks/throughput.py                             the demo's sizes, random weights
    python benchmarks/throughput.py --recipe vfm_vae_siglip2_large --batch-size 1 --repeats 3

All variants are measured in one process, one after the other; only their ratios mean something on a shared
machine. A whole training step is measured by step.py.
The JSON goes to benchmarks/results/throughput.json unless --output says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import RESULTS, median_seconds, provenance, write_result
from rich.console import Console
from rich.table import Table

from vfmvae.recipes import RECIPES
from vfmvae.tokenizer import Tokenizer
from vfmvae.training.device import pick_device

VARIANTS: dict[str, tuple[bool, torch.dtype | None]] = {
    "reference": (False, None),
    "fused": (True, None),
    "fused bf16": (True, torch.bfloat16),
}


@dataclass
class Options:
    """Measure encode and decode. Example: python benchmarks/throughput.py --batch-size 16"""

    recipe: str = "demo"
    batch_size: int = 8
    repeats: int = 5
    device: str = "auto"
    output: Path = RESULTS / "throughput.json"


def main() -> None:
    options = tyro.cli(Options, prog="python benchmarks/throughput.py")
    if options.recipe not in RECIPES:
        raise SystemExit(f"unknown recipe {options.recipe!r}; known: {', '.join(RECIPES)}")
    config, device = RECIPES[options.recipe](), pick_device(options.device)
    rates: dict[str, dict[str, float]] = {}
    for name, (fused, dtype) in VARIANTS.items():
        torch.manual_seed(0)
        tokenizer = Tokenizer(config.tokenizer, encoder_weights=None, fused=fused).to(device)
        tokenizer.compute_dtype = dtype
        rates[name] = measure(tokenizer, options.batch_size, options.repeats, device)
        del tokenizer
    show(rates, provenance(device))
    result = {"recipe": options.recipe, "batch_size": options.batch_size, "images_per_second": rates}
    write_result(options.output, provenance(device) | result)


def measure(tokenizer: Tokenizer, batch_size: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Images per second of each part."""
    size = tokenizer.config.resolution
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=device)
    with torch.no_grad():
        tokenizer.eval()
        latents = tokenizer.encode(images).mode()
        seconds = {
            "encode": median_seconds(lambda: tokenizer.encode(images), device, repeats),
            "decode": median_seconds(lambda: tokenizer.decode(latents), device, repeats),
        }
    return {part: batch_size / s for part, s in seconds.items()}


def show(rates: dict[str, dict[str, float]], where: dict[str, object]) -> None:
    table = Table(title="images/s (ratio to reference)", title_justify="left")
    table.add_column("")
    for part in rates["reference"]:
        table.add_column(part, justify="right")
    for name, row in rates.items():
        cells = [f"{rate:.1f} ({rate / rates['reference'][part]:.2f}x)" for part, rate in row.items()]
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    console.print(
        ", ".join(f"{key} {value}" for key, value in where.items()), highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
