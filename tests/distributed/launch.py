"""torchrun with two processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers import ROOT

# A port that is free, chosen by the system.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@contextmanager
def launched(*arguments: str | Path, launcher: tuple[str, ...] = TORCHRUN) -> Iterator[subprocess.Popen[str]]:
    """A module and its arguments, started by torchrun with a thread per process; killed at the end."""
    command = [*launcher, "-m", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # so that it ends its processes; nothing where it has ended


def run(*arguments: str | Path, code: int = 0) -> str:
    """The output of such a run, which must end with this exit code."""
    with launched(*arguments) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    return output
