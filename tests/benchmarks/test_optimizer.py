"""The optimizer benchmark: the shapes of the recipe, what the command writes, its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.scripts import script
from tests.helpers import run_python

optimizer, tables = map(script, ("optimizer", "tables"))


def test_the_shapes_are_those_of_the_full_size_recipe() -> None:
    shapes = optimizer.trained_shapes("full")
    assert 139e6 < sum(shape.numel() for shape in shapes) < 141e6 and len(shapes) > 500
    assert 4e6 < sum(shape.numel() for shape in optimizer.trained_shapes("demo")) < 5e6


def test_a_side_that_computes_something_else_ends_the_command() -> None:
    sides = {name: optimizer.Side("torch", [torch.ones(3)], (0.9, 0.99)) for name in ("torch", "triton")}
    for side in sides.values():
        side.update([torch.ones(3)])
    optimizer.check_agreement(sides)
    sides["triton"].ema.update(0.5)
    with pytest.raises(SystemExit, match="triton does not compute what torch does: a number differs by 0.00"):
        optimizer.check_agreement(sides)


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "optimizer-cpu.json"
    options = ("--device", "cpu", "--size", "demo", "--repeats", "2", "--json", str(path))
    printed = run_python("benchmarks/optimizer.py", *options)
    result = json.loads(path.read_text())
    assert result["left_out"].keys() == {"triton", "apex"} and "host ms" in printed
    assert [(row["by"], tuple(row["betas"])) for row in result["rows"]] == [
        ("torch", betas) for betas in optimizer.BETAS
    ]
    for row in result["rows"]:
        assert row["times_faster"] == 1.0 and row["share"] > 0 and row["host_ms"] <= row["ms"]
    table = tables.tables(tmp_path)["optimizer-cpu"]
    assert "| torch | 0.0, 0.99 | " in table and "'triton' cannot be used" in table
