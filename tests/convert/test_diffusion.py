"""Published diffusion transformers through the command, and what the converter refuses."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vfmvae
from tests import commands
from vfmvae.convert import __main__ as command
from vfmvae.convert.diffusion import convert
from vfmvae.convert.diffusion_config import published_config
from vfmvae.convert.files import read_state
from vfmvae.diffusion import DiffusionTransformer, TransformerConfig
from vfmvae.diffusion.files import load_transformer

State = dict[str, Tensor]

# Names that are no parameters: published as buffers or frozen parameters, in the file all the same.
SOURCES = {"repa_sit": "repa", "reg_sit": "reg", "lightningdit": "lightningdit", "samplers": "repa"}


def _fixture(parity_dir: Path, name: str) -> tuple[State, dict[str, Any], State]:
    folder = parity_dir / name
    arguments = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), arguments, load_file(folder / "io.safetensors")


def _command(folder: Path, source: str, state: object, config: object, *more: str | Path) -> tuple[int, Path]:
    """Exit code and output folder of the command, for a checkpoint that torch saves and a config as JSON."""
    torch.save(state, folder / "checkpoint.pt")
    (folder / "config.json").write_text(json.dumps(config))
    files = ("--checkpoint", folder / "checkpoint.pt", "--config", folder / "config.json")
    output = folder / "out"
    return commands.run(command, "--from", source, *files, "--output", output, *more), output


def _published_training(state: State) -> dict[str, Any]:
    """A checkpoint as published training writes it: the average beside what it averages, options beside it."""
    return {
        "model": {f"module.{name}": torch.full_like(tensor, math.nan) for name, tensor in state.items()},
        "ema": {f"module.{name}": tensor for name, tensor in state.items()},
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="SiT-XL/2", seed=0),
        "steps": 400_000,
    }


@pytest.mark.parametrize("name", ["repa_sit", "reg_sit", "lightningdit"])
@torch.no_grad()
def test_a_published_checkpoint_loads_and_gives_the_published_numbers(
    parity_dir: Path, tmp_path: Path, name: str
) -> None:
    state, arguments, io = _fixture(parity_dir, name)
    code, output = _command(tmp_path, SOURCES[name], _published_training(state), arguments)
    assert code == 0
    model = vfmvae.load(output)
    assert isinstance(model, DiffusionTransformer) and not model.training
    # Published LightningDiT has t = 1 as data, and the velocity of that direction.
    t, sign = (1 - io["t"], -1) if name == "lightningdit" else (io["t"], 1)
    out = model(io["x"], t, io["y"], io.get("cls_token"))
    torch.testing.assert_close(sign * out.velocity, io["velocity"], atol=2e-5, rtol=0)
    if "cls_velocity" in io:
        torch.testing.assert_close(out.class_velocity, io["cls_velocity"], atol=2e-5, rtol=0)
    for number, projected in enumerate(out.projected):
        # Up to 45, sums of terms of that size: published float32 values are themselves 6e-5 from float64.
        expected = io[f"projected_{number}"]
        limit = 2e-5 + 1e-6 * expected.abs().max().item()
        torch.testing.assert_close(projected, expected, atol=limit, rtol=0)
    assert len(out.projected) == ("projected_0" in io)


def test_the_command_says_what_it_converted(
    parity_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, arguments, _ = _fixture(parity_dir, "samplers")
    code, output = _command(tmp_path, "repa", state, arguments)
    line = capsys.readouterr().out
    assert (
        code == 0 and line.startswith(f"{output}: 0.") and "latents 4 x 8 x 8 with a mean std of 5.49" in line
    )
    assert line.endswith("(no --statistics given)\n")
