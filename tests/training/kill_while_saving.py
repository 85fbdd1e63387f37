"""A process that saves all the time is killed at random moments; each next one goes on from what it finds.

    python -m tests.training.kill_while_saving FOLDER

Prints a JSON object: kills, those that left a half-written checkpoint, steps done, faults found.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.training.small_run import Run, assert_equal_tensors, small_run
from vfmvae.training.checkpoint import Checkpoints
from vfmvae.training.checkpoint_folder import checkpoints, remove_partial_checkpoints, step_of

KILLS = 20


def go_on(folder: Path, started: Path, faults: Path) -> None:
    """Check the newest checkpoint, then train and save after every step until killed."""
    complete = [step_of(path) for path in checkpoints(folder)]
    remove_partial_checkpoints(folder)
    run, saved = small_run(seed=os.getpid()), Checkpoints(folder, keep=2)
    stored = saved.load_newest(run.state)
    if stored is None:
        run = small_run()
    else:
        assert_equal_tensors(run.tensors(), run_of(stored.step).tensors())
        assert stored.damaged == ()
        assert stored.step == max(complete), complete
    faults.unlink()
    while True:
        run.step()
        saved.save(run.state)
        started.touch()


def run_of(steps: int) -> Run:
    """What the state must be, whoever was killed on the way."""
    run = small_run()
    for _ in range(steps):
        run.step()
    return run


def warm_up() -> None:
    """Pay here, not in every child, for what torch does the first time; no thread may start."""
    run = small_run()
    for optimizer in run.optimizers.values():
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        saved = Checkpoints(Path(folder), background=False)
        saved.save(run.state)
        saved.load_newest(run.state)


def main() -> None:
    torch.set_num_threads(1)
    folder, chance = Path(sys.argv[1]), random.Random(0)
    started, faults = folder / "started", folder / "faults"
    report = {"kills": 0, "interrupted": 0, "steps": 0, "faults": 0}
    warm_up()
    for _ in range(KILLS):
        faults.touch()  # the child removes it when it has found none
        child = os.fork()  # quicker than a new interpreter
        if child == 0:
            go_on(folder, started, faults)
        while not started.exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.08))
        if started.exists():  # else it ended by itself, with a traceback
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            started.unlink()
            report["kills"] += 1
        report["faults"] += faults.exists()
        report["interrupted"] += any(folder.glob(".step_*.partial"))
        steps = max([step_of(path) for path in checkpoints(folder)], default=0)
        report["faults"] += steps < report["steps"]
        report["steps"] = steps
    print(json.dumps(report))


if __name__ == "__main__":
    main()
