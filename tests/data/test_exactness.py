"""Every sample once per epoch: over ranks, workers and real kills, whoever takes the run up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.commands import save_image
from tests.helpers import ROOT
from vfmvae.data import Images, open_data

SCRIPT = Path(__file__).with_name("read_until_killed.py")
PATIENCE_S = 120
TOGETHER = 6  # images of one step on all ranks


class Session:
    """Ranks that read from a common state on, all killed when each has read some batches."""

    def __init__(
        self, folder: Path, data: str, start: int, world_size: int, workers: int, backend: str
    ) -> None:
        folder.mkdir()
        self.records = [folder / f"{rank}.json" for rank in range(world_size)]
        self.processes = []
        for rank, record in enumerate(self.records):
            arguments = {
                "data": data,
                "record": str(record),
                "start": start,
                "rank": rank,
                "world_size": world_size,
                "workers": workers,
                "batch_size": TOGETHER // world_size,
                "backend": backend,
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(SCRIPT), json.dumps(arguments)],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            )

    def kill_after(self, batches: int) -> list[list[dict[str, Any]]]:
        """What each rank had on record when it was killed with all its workers; at least so many batches."""
        deadline = time.monotonic() + PATIENCE_S
        try:
            while any(len(self.seen(record)) < batches for record in self.records):
                assert time.monotonic() < deadline, "the ranks read on"
                assert all(process.poll() is None for process in self.processes), "and none has died"
                time.sleep(0.01)
        finally:
            for process in self.processes:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [self.seen(record) for record in self.records]

    @staticmethod
    def seen(record: Path) -> list[dict[str, Any]]:
        return json.loads(record.read_text()) if record.exists() else []


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_every_sample_comes_once_per_epoch_whatever_is_killed(backend: str, tmp_path: Path) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    data = tmp_path / "data"
    for number in range(150):
        save_image(data / f"{number % 3}/{number:03}.jpg", 30 + number % 5, 24, seed=number)
    broken = {"0/030.jpg", "1/070.jpg"}
    for key in broken:
        (data / key).write_bytes((data / key).read_bytes()[:200])
    source = open_data(str(data), "train", 16, seed=5)
    assert isinstance(source, Images)
    everything = [source.samples.key(number) for number in range(len(source))]

    kept: list[dict[str, Any]] = []
    start = 0
    for number, (world_size, workers) in enumerate([(2, 2), (1, 1), (2, 0), (1, 2)]):
        left = -(-(len(source) - start) // TOGETHER)
        session = Session(tmp_path / str(number), str(data), start, world_size, workers, backend)
        records = session.kill_after(left if number == 3 else 3)
        # The newest state that all ranks have; what one had read beyond it is lost with the kill.
        start = min(record[-1]["seen_images"] for record in records)
        kept += [piece for record in records for piece in record if piece["seen_images"] <= start]

    assert start >= len(source)
    in_order = sorted(kept, key=lambda piece: (piece["seen_images"], piece["rank"]))
    keys = [key for piece in in_order for key in piece["keys"]][: len(source)]
    faults = {fault for piece in in_order for fault in piece["faults"]}
    assert faults == broken & set(everything)
    counts = Counter(keys)
    extra = counts - Counter(set(everything) - broken)
    assert set(everything) - broken <= set(keys), "each that can be read is there"
    assert sum(extra.values()) == len(faults), "and only in the places of the broken ones, others again"
