"""Latents that training reads: batches by position out of memory-mapped shards, in a shuffled order.

What lies in a folder says vfmvae.data.latent_folder. The order of an epoch is drawn from (seed, epoch) as
follows. Rows are cut into blocks of contiguous ones; the blocks are shuffled, and mirrored or not, each as a
whole; then the rows are shuffled within windows of many blocks. So what is read next is a few hundred
contiguous pieces, which the system is asked for a window ahead, and not sixteen thousand single rows. Yet
a row is equally likely anywhere in an epoch, and a batch draws from a window of 16,384 rows: see
docs/latents.md for how close that is to a full shuffle.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from vfmvae.data.latent_folder import (
    Shard,
    check_shards,
    open_shards,
    read_manifest,
    unpack_name,
)
from vfmvae.data.source import Split, check_split_and_resolution, positions

BLOCK = 32
"""Rows that lie next to each other and are read together; 1 shuffles every row for itself."""
WINDOW = 512
"""Blocks in a window; those that are left over are spread over all windows."""


class LatentBatch(TypedDict):
    """Some latents, in float32; None is what the folder does not hold, or what was not asked for."""

    latent: Tensor | None  # [B, C, h, w]
    moments: Tensor | None  # [B, 2C, h, w]: means, then log variances
    features: Tensor | None  # [B, T, D] the frozen encoder's tokens
    class_token: Tensor | None  # [B, D]
    label: Tensor  # int64 [B], -1 where an image has none
    key: list[str]  # the image's name


class Latents:
    """The latents of a finished folder, as a source of batches by position; see vfmvae.data.source.

    Training is endless: every image once per epoch, in an order and mirrored or not as drawn from (seed,
    epoch); nothing is mirrored where the folder has no mirror images. Validation is every image in order, not
    mirrored. Shards are memory-mapped, so that a batch reads its own rows and opens no file. `mean` and `std`
    are [1, C, 1, 1], float32. `labels` are those of all images in order, int64 [N].

    May be used by several threads, and pickled for other processes.
    """

    def __init__(
        self,
        path: str | Path,
        split: Split = "train",
        seed: int = 0,
        verify: bool = True,
        fields: Sequence[str] | None = None,
        block: int = BLOCK,
        window: int = WINDOW,
    ) -> None:
        """
        Args:
            verify: compare checksums, which reads every byte; else sizes and headers only.
            fields: which of "latents", "moments", "features" and "class_token" to read; None is all there
                are.
            block, window: how training is shuffled: rows in a block, blocks in a window.

        Raises ValueError for a folder without a manifest, for a shard that is missing or damaged, and for
        fields that the folder does not hold.
        """
        check_split_and_resolution(split, 1)
        if block < 1 or window < 1:
            raise ValueError(f"block is {block} and window {window}; both must be at least 1")
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.split: Split = split
        self.seed = seed
        self.block = block
        self.window = window
        self.fields = self._known(fields)
        check_shards(self.path, self.manifest, verify)
        self.classes = self.manifest.classes
        self.mean = torch.tensor(self.manifest.mean).view(1, -1, 1, 1)
        self.std = torch.tensor(self.manifest.std).view(1, -1, 1, 1)
        self._shards = [shard for shard in open_shards(self.path, self.manifest) if len(shard)]
        self._stops = np.cumsum([len(shard) for shard in self._shards])
        self.labels = torch.from_numpy(np.concatenate([s.columns["labels"].integers() for s in self._shards]))
        self._check_labels()
        self._announced: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Images in the folder."""
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself; they were checked here."""
        return Latents, (self.path, self.split, self.seed, False, self.fields, self.block, self.window)

    def batch(self, step: int, batch_size: int) -> LatentBatch:
        """Latents step * batch_size and following."""
        chosen = positions(step, batch_size, self.split, len(self))
        if self.split == "validation":
            return self.read(chosen.start, chosen.stop)
        self._read_ahead(chosen.stop - 1)
        rows, mirrored = [], []
        for epoch in range(chosen.start // len(self), (chosen.stop - 1) // len(self) + 1):
            before = epoch * len(self)
            part = slice(max(0, chosen.start - before), min(len(self), chosen.stop - before))
            order = self._order(epoch)
            rows.append(order.rows[part])
            mirrored.append(order.mirrored[part])
        return self._gather(np.concatenate(rows), np.concatenate(mirrored))

    def read(self, start: int, stop: int) -> LatentBatch:
        """Latents start to stop - 1 in the order of the folder, not mirrored."""
        rows = np.arange(start, min(stop, len(self)))
        return self._gather(rows, np.zeros(len(rows), dtype=bool))

    def _gather(self, rows: np.ndarray, mirrored: np.ndarray) -> LatentBatch:
        numbers = np.searchsorted(self._stops, rows, side="right")
        inside = rows - np.concatenate([[0], self._stops])[numbers]
        places = list(zip(numbers.tolist(), inside.tolist(), mirrored.tolist(), strict=True))

        def stack(field: str) -> Tensor | None:
            if field not in self.fields:
                return None
            tables = [[shard.columns[field].rows for shard in self._shards]]
            if self.manifest.settings.flips:
                tables.append([shard.columns[field + "_flip"].rows for shard in self._shards])
            column = self._shards[0].columns[field]
            stored = torch.empty(len(places), column.rows.shape[1], dtype=torch.uint8)
            target = stored.numpy()
            for place, (number, row, flip) in enumerate(places):
                target[place] = tables[flip][number][row]
            return stored.view(column.dtype).view(len(places), *column.shape).float()

        names = [shard.columns["names"].rows for shard in self._shards]
        return {
            "latent": stack("latents"),
            "moments": stack("moments"),
            "features": stack("features"),
            "class_token": stack("class_token"),
            "label": self.labels[torch.from_numpy(rows)],
            "key": [unpack_name(names[number][row]) for number, row, _ in places],
        }

    def _order(self, epoch: int) -> _Order:
        return _order(self.seed, epoch, len(self), self.block, self.window, self.manifest.settings.flips)

    def _read_ahead(self, position: int) -> None:
        """Where a window begins, ask the system for what the next one reads; at first, for this one too."""
        epoch, place = divmod(position, len(self))
        cuts = self._order(epoch).cuts
        here = (epoch, int(np.searchsorted(cuts, place, side="right")) - 1)
        if here == self._announced:
            return
        following = (epoch, here[1] + 1) if here[1] + 2 < len(cuts) else (epoch + 1, 0)
        for window in [here, following] if self._announced is None else [following]:
            self._advise(*window)
        self._announced = here

    def _advise(self, epoch: int, window: int) -> None:
        """Ask for the blocks of one window of an epoch, which this does not wait for."""
        order = self._order(epoch)
        part = slice(order.cuts[window], order.cuts[window + 1])
        blocks, first = np.unique(order.rows[part] // self.block, return_index=True)
        starts, mirrored = blocks * self.block, order.mirrored[part][first]
        stops = np.minimum(starts + self.block, len(self))
        for shard, stop in zip(self._shards, self._stops.tolist(), strict=True):
            begin = stop - len(shard)
            here = (starts < stop) & (stops > begin)
            if not here.any():
                continue
            ranges = zip(
                np.maximum(starts[here] - begin, 0).tolist(),
                (np.minimum(stops[here], stop) - begin).tolist(),
                mirrored[here].tolist(),
                strict=True,
            )
            _will_need(shard, self.fields, list(ranges))

    def _known(self, fields: Sequence[str] | None) -> tuple[str, ...]:
        stored = self.manifest.settings.fields
        unknown = [field for field in fields or () if field not in stored]
        if unknown:
            raise ValueError(
                f"{self.path} holds no {unknown[0]}, only {', '.join(stored)}; encode the images again with"
                f" what is needed (vfmvae encode --help)"
            )
        return tuple(stored if fields is None else fields)

    def _check_labels(self) -> None:
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < -1 or high >= len(self.classes):
            raise ValueError(
                f"{self.path} is damaged: labels go from {low} to {high}, and there are"
                f" {len(self.classes)} classes; {self.manifest.settings.mend}"
            )


class _Order(NamedTuple):
    rows: np.ndarray  # int64 [N]
    mirrored: np.ndarray  # bool [N], of the row in the same place
    cuts: np.ndarray  # int64: where each window begins, and N


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int, block: int, window: int, flips: bool) -> _Order:
    """The order of an epoch: shuffled blocks, and shuffled rows in windows of them."""
    rng = np.random.default_rng((seed, epoch))
    count = -(-length // block)
    flipped = rng.random(count) < 0.5
    blocks = rng.permutation(count)
    rows = (blocks[:, None] * block + np.arange(block)).ravel()
    rows = rows[rows < length]  # the last block may be shorter
    windows = max(1, count // window)  # of equal size: a small one at the end would hardly be shuffled
    sizes = np.minimum(block, length - blocks * block)
    cuts = np.concatenate([[0], np.cumsum(sizes)])[np.arange(windows + 1) * count // windows]
    if block > 1:
        for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            rng.shuffle(rows[start:stop])
    return _Order(rows, flipped[rows // block] if flips else np.zeros(length, dtype=bool), cuts)


def _will_need(shard: Shard, fields: Sequence[str], ranges: Sequence[tuple[int, int, bool]]) -> None:
    """Let the system read ahead rows (first, after the last, mirrored or not) of a shard.

    The file is opened for that, once per window and not per item: a descriptor kept for each shard would
    exhaust the number that a process may have.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    with contextlib.suppress(OSError), open(shard.path, "rb") as file:
        for start, stop, mirrored in ranges:
            for field in fields:
                column = shard.columns[field + "_flip" if mirrored else field]
                width = column.rows.shape[1]
                begin, length = column.offset + start * width, (stop - start) * width
                os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)
