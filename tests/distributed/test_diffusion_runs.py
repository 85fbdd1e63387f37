"""Diffusion runs that torchrun starts end where that of one process does: copies (DDP) and shards (FSDP2)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.launch import run
from tests.tiny_diffusion import ALL_LOSSES, engine, fill, stage, tiny
from tests.tiny_diffusion import run as run_here
from tests.tiny_runs import largest_difference
from tests.whole_runs import lines, weights
from vfmvae.diffusion_config import DiffusionConfig
from vfmvae.serialization import to_json
from vfmvae.training.checkpoint_folder import path_of

STEPS, HALF = 6, 3
# The second stage has no alignment, so that DDP waits for gradients of the projector that never come.
STAGES = (
    stage(name="aligned", images=12),
    stage(replace(ALL_LOSSES, alignment=0.0), name="alone", images=12),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    fill(made / "latents", moments=True, flips=True)
    return made


@pytest.fixture(scope="module")
def config(folder: Path) -> DiffusionConfig:
    return tiny(latents=str(folder / "latents"), stages=STAGES, steps=STEPS, checkpoint_every=HALF)


@pytest.fixture(scope="module")
def alone(folder: Path, config: DiffusionConfig) -> Path:
    run_here(config, folder / "alone")
    return folder / "alone"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_end_where_one_does(
    folder: Path, config: DiffusionConfig, alone: Path, parallel: str
) -> None:
    path, file = folder / parallel, folder / f"{parallel}.json"
    file.write_text(to_json(replace(config, engine=engine(parallel=parallel, accumulate=2))))
    printed = run("vfmvae.train_diffusion", "--config", file, "--run-dir", path)
    assert f"x 2 processes ({parallel})" in printed and "Warning" not in printed
    assert largest_difference(weights(path), weights(alone)) <= 1e-5
    for kind in ("train", "eval"):
        ours, theirs = lines(path, kind), lines(alone, kind)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert {k: v for k, v in one.items() if k not in ("stage", "kind")} == pytest.approx(
                {k: v for k, v in other.items() if k not in ("stage", "kind")}, rel=1e-4
            ), "means over both, and evaluations, are those of one"
    # Its checkpoint goes on in one process.
    resumed = folder / f"{parallel} to one"
    shutil.copytree(path, resumed)
    shutil.rmtree(path_of(resumed / "checkpoints", STEPS))
    assert f"from step {HALF}" in run_here(config, resumed)
    assert largest_difference(weights(resumed), weights(alone)) <= 1e-5
