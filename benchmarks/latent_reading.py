"""Latents per second of this project's reader, and of a loader that opens a file for every item."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from vfmvae.data.latents import Latents

SHAPE = (32, 16, 16)
SHARDS = 4
BATCH = 256
BATCHES = 8  # of one turn


class PerItem(Dataset[tuple[Tensor, Tensor]]):
    """LightningDiT's pattern: a table from item to (file, row), whose file is opened for each item."""

    def __init__(self, files: list[Path]) -> None:
        self.places: dict[int, tuple[Path, int]] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                rows = opened.get_slice("labels").get_shape()[0]
            first = len(self.places)
            self.places |= {first + row: (file, row) for row in range(rows)}
        self.mean, self.std = torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        file, row = self.places[item]
        name = "latents_flip" if torch.rand(1).item() < 0.5 else "latents"
        with safe_open(file, framework="pt") as opened:
            latent = opened.get_slice(name)[row : row + 1]
            label = opened.get_slice("labels")[row : row + 1]
        return latent.squeeze(0), label.squeeze(0)


def measure_latents(count: int, repeats: int) -> list[dict[str, Any]]:
    """One row per reader, in one process each; files lie in the page cache."""
    with tempfile.TemporaryDirectory() as scratch:
        theirs, ours = Path(scratch) / "theirs", Path(scratch) / "ours"
        files = write_lightningdit(theirs, count)
        command = [sys.executable, "-m", "vfmvae.latents", "import", str(theirs)]
        subprocess.run([*command, "--from", "lightningdit", "--output", str(ours)], check=True)
        items, reader = PerItem(files), Latents(ours, verify=False)
        generator = torch.Generator().manual_seed(0)

        def per_item(step: int) -> object:
            chosen = torch.randint(len(items), (BATCH,), generator=generator).tolist()
            return default_collate([items[item] for item in chosen])

        sides: dict[str, Callable[[int], object]] = {
            "a safetensors file opened per item": per_item,
            "Latents": lambda step: reader.batch(step, BATCH),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(repeats + 1):
            for name, read in sides.items():
                begun = time.perf_counter()
                for step in range(turn * BATCHES, (turn + 1) * BATCHES):
                    read(step)
                if turn:  # the first one warms up
                    rates[name].append(BATCHES * BATCH / (time.perf_counter() - begun))
    base = rates["a safetensors file opened per item"]
    return [
        {
            "by": name,
            "latents_per_second": statistics.median(found),
            "times_faster": statistics.median(a / b for a, b in zip(found, base, strict=True)),
        }
        for name, found in rates.items()
    ]


def write_lightningdit(folder: Path, count: int) -> list[Path]:
    """Random latents in the layout of LightningDiT's extraction."""
    folder.mkdir()
    files = []
    for shard in range(SHARDS):
        rows = count // SHARDS
        file = folder / f"latents_rank00_shard{shard:03d}.safetensors"
        tensors = {
            "latents": torch.randn(rows, *SHAPE),
            "latents_flip": torch.randn(rows, *SHAPE),
            "labels": torch.randint(1000, (rows,)),
        }
        save_file(tensors, file)
        files.append(file)
    return files
