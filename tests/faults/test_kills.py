"""kill -9 at random points costs no run, and no bit of one."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers import run_python


def test_runs_that_are_killed_again_and_again_end_as_if_undisturbed(tmp_path: Path) -> None:
    output = run_python("-m", "tests.faults.kill_while_training", str(tmp_path), env={"OMP_NUM_THREADS": "1"})
    report = json.loads(output.splitlines()[-1])
    assert report["kills"] == 20
    assert report["finished"] >= 1
    assert report["different"] == []
    assert report["saving"] >= 1, "some kills came while a checkpoint was written"
