"""The list of samples that a run could not use, and the end of patience with them.

quarantine.jsonl holds one line {"key": ..., "reason": ...} for each, once, whatever the epochs and restarts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from vfmvae.data.samples import Fault

QUARANTINE = "quarantine.jsonl"
SHOWN = 3


def check_share(most: float) -> None:
    """ValueError unless `max_broken` can be that."""
    if not 0 <= most <= 1:
        raise ValueError(f"max_broken is {most}; it is a share, from 0 to 1")


class Quarantine:
    """Faults of a data set of `images` samples, of which a share of `most` may be broken.

    What earlier runs of the same folder have written stays in the list and does not count, as it may be
    mended; `lost` samples count that are missing for good. Without a `path` nothing is written (ranks beside
    the first).
    """

    def __init__(self, path: Path | None, images: int, most: float, lost: int = 0) -> None:
        self.path = path
        self.images = images
        self.most = most
        self.found: dict[Fault, None] = {}
        self._written = _listed(path) if path is not None else set()
        self._lost = lost

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Note faults; returns those that are new to this process. OSError if the list cannot be written."""
        new = [fault for fault in dict.fromkeys(faults) if fault not in self.found]
        self.found |= dict.fromkeys(new)
        unwritten = [fault for fault in new if fault[:2] not in self._written]
        if self.path is not None and unwritten:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                lines = [{"key": fault.key, "reason": fault.reason} for fault in unwritten]
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            self._written |= {fault[:2] for fault in unwritten}
        return new

    def check(self) -> None:
        """ValueError if more samples are broken than may be."""
        limit = int(self.images * self.most)
        found = [fault for fault in self.found if fault.counts]
        broken = self._lost + len({fault.key for fault in found})
        if broken <= limit:
            return
        first = [f"{fault.key} ({fault.reason})" for fault in found[:SHOWN]]
        first += [f"{self._lost} left out before"] if self._lost else []
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        where = f"; the whole list is {self.path}" if self.path is not None else ""
        raise ValueError(
            f"{broken} of {self.images:,} images cannot be used, and max_broken {self.most:g} allows"
            f" {limit}: {', '.join(first)}{more}{where}; mend them, or allow more"
        )


def _listed(path: Path) -> set[tuple[str, str]]:
    """The keys and reasons that a list holds; a line that a kill has cut short is left out."""
    listed = set()
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                listed.add(Fault(**json.loads(line))[:2])
            except (json.JSONDecodeError, TypeError):
                continue
    return listed
