"""A whole run in two processes, perhaps with an accident.

    torchrun --nproc-per-node 2 -m tests.distributed.runs FOLDER ACT

Acts: `sharded` and `carried` train with FSDP2, the second from a checkpoint of one process; `poisoned` meets
NaN on one rank until it has rolled back; `dies` loses a rank in step 7, `leaves` its torchrun too; `broken`
reads FOLDER/images, of which no image may be broken.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

import vfmvae.train
from tests.distributed.scenarios import plain
from tests.tiny_runs import tiny
from vfmvae.config import TrainConfig
from vfmvae.train_job import Job
from vfmvae.train_step import StepResult, training_step
from vfmvae.training.checkpoint_folder import path_of
from vfmvae.training.distributed import rank
from vfmvae.training.engine import EngineConfig
from vfmvae.training.guard import SafetyConfig
from vfmvae.training.run_folder import RunFolder

STEPS, HALF = 10, 5
DYING_STEP = HALF + 2


def run_config(parallel: str = "ddp") -> TrainConfig:
    engine = EngineConfig(parallel="fsdp" if parallel == "fsdp" else "ddp")
    return tiny(stages=(plain(),), batch_size=4, steps=STEPS, checkpoint_every=HALF, engine=engine)


def spoiled_step(job: Job, batch: Sequence[Tensor], weights: Mapping[str, float]) -> StepResult:
    """On rank 1, from the fourth step on until the run went back, images that are NaN."""
    if rank() == 1 and job.state.step >= 3 and not job.state.numbers.get("rollbacks"):
        hook = job.tokenizer.fusion.register_forward_hook(lambda module, inputs, output: output * math.nan)
        try:
            return training_step(job, batch, weights)
        finally:
            hook.remove()
    return training_step(job, batch, weights)


def fatal_step(job: Job, batch: Sequence[Tensor], weights: Mapping[str, float]) -> StepResult:
    if rank() == 1 and job.state.step == DYING_STEP - 1:
        while not path_of(Path(sys.argv[1]) / sys.argv[2] / "checkpoints", HALF).exists():
            time.sleep(0.01)  # it is written in the background
        (Path(sys.argv[1]) / f"{sys.argv[2]}.died").touch()  # the test asks when
        if sys.argv[2] == "leaves":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(job, batch, weights)


def train(config: TrainConfig, folder: Path) -> None:
    vfmvae.train.train(config, RunFolder(folder), Console(width=200))


def perform(act: str, folder: Path) -> None:
    if act in ("sharded", "carried"):
        train(run_config("fsdp"), folder / act)
    elif act == "poisoned":
        vfmvae.train.training_step = spoiled_step
        safety = SafetyConfig(max_skips=2, max_rollbacks=1)
        train(replace(run_config(), safety=safety, checkpoint_every=2), folder / act)
    elif act == "broken":
        config = replace(run_config(), data=str(folder / "images"), max_broken=0.0)
        vfmvae.train.command(lambda: train(config, folder / act))()
    else:
        assert act in ("dies", "leaves"), act
        vfmvae.train.training_step = fatal_step
        vfmvae.train.command(lambda: train(run_config(), folder / act))()


if __name__ == "__main__":
    perform(act=sys.argv[2], folder=Path(sys.argv[1]))
