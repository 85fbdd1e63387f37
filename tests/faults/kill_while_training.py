"""Runs of three stages with every loss are killed at random moments, and resumed until they are finished.

    python -m tests.faults.kill_while_training FOLDER

Prints a JSON object: kills, those during a save, runs finished, what differs from an undisturbed run.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from rich.console import Console

from tests.tiny_runs import tiny
from tests.whole_runs import assert_same_run, lines, small_parts, three_stages
from vfmvae.train import train
from vfmvae.train_job import Job
from vfmvae.training.run_folder import RunFolder

KILLS = 20
CONFIG = tiny(stages=three_stages(images=6), workers=2, checkpoint_every=1)


def start(folder: Path) -> int:
    """Begin or resume the run in a process of its own; returns its id."""
    child = os.fork()  # quicker than a new interpreter
    if child:
        return child
    code = 1
    try:
        with small_parts():
            train(CONFIG, RunFolder(folder), Console(file=io.StringIO()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def is_over(child: int) -> bool:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended and status:
        raise RuntimeError(f"a run ended with status {status}")
    return ended != 0


def wait_for_start(child: int, folder: Path, since_ns: int) -> None:
    """Until the run has written to its log; what comes before is no training."""
    log = folder / "metrics.jsonl"
    while not log.exists() or log.stat().st_mtime_ns < since_ns or not lines(folder, "start"):
        assert not is_over(child), "a run ended before it began"
        time.sleep(0.005)


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written, or was when its process ended."""
    return any(run.glob("checkpoints/.step_*.partial"))


def main() -> None:
    torch.set_num_threads(1)
    folder, chance = Path(sys.argv[1]), random.Random(0)
    with small_parts():
        Job(CONFIG)  # pay here, not in every child, for what is done the first time
    child = start(folder / "undisturbed")
    while not is_over(child):
        time.sleep(0.01)
    kills = saving = finished = 0
    different: list[str] = []
    run, begun = folder / "0", False
    while kills < KILLS or begun:
        since_ns, begun = time.time_ns(), True
        child = start(run)
        wait_for_start(child, run, since_ns)
        deadline = time.monotonic() + chance.uniform(0.0, 1.2)
        # Chance alone may miss the moments of saving, on a slow machine above all.
        amid_saving, over = kills % 4 == 3, False
        while not over and (
            kills == KILLS or (not is_saving(run) if amid_saving else time.monotonic() < deadline)
        ):
            time.sleep(0.001)
            over = is_over(child)
        if over:
            try:
                assert_same_run(folder / "undisturbed", run)
            except AssertionError as error:
                different.append(str(error))
            finished += 1
            shutil.rmtree(run)
            run, begun = folder / str(finished), False
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        saving += is_saving(run)
    print(json.dumps({"kills": kills, "saving": saving, "finished": finished, "different": different}))


if __name__ == "__main__":
    main()
