"""Images per second of encoding and decoding: the reference against the fused operations.

    python benchmarks/throughput.py                             the demo's sizes, random weights
    python benchmarks/throughput.py --config full --batch 1 --repeats 3

All variants are measured in one process, one after the other; only their ratios mean something on a shared
machine. A whole training step is measured by step.py.
The JSON goes to benchmarks/results/throughput.json unless --json says otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import RESULTS, median_seconds, provenance, write_result
from rich.console import Console
from rich.table import Table

from vfmvae.recipes import demo, vfm_vae_siglip2_large
from vfmvae.tokenizer import Tokenizer
from vfmvae.training.device import pick_device

VARIANTS: dict[str, tuple[bool, torch.dtype | None]] = {
    "reference": (False, None),
    "fused": (True, None),
    "fused bf16": (True, torch.bfloat16),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/throughput.py")
    parser.add_argument("--config", choices=("demo", "full"), default="demo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=RESULTS / "throughput.json")
    options = parser.parse_args()
    config = (demo if options.config == "demo" else vfm_vae_siglip2_large)()
    device = pick_device(options.device)
    rates: dict[str, dict[str, float]] = {}
    for name, (fused, dtype) in VARIANTS.items():
        torch.manual_seed(0)
        tokenizer = Tokenizer(config.tokenizer, encoder_weights=None, fused=fused).to(device)
        tokenizer.compute_dtype = dtype
        rates[name] = measure(tokenizer, options.batch, options.repeats, device)
        del tokenizer
    show(rates, provenance(device))
    result = {"config": options.config, "batch_size": options.batch, "images_per_second": rates}
    write_result(options.json, provenance(device) | result)


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
