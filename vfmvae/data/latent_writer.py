"""Filling a folder of latents shard by shard; vfmvae.data.latent_folder says what lies in it.

Two processes may even work at the same shard, as where torchrun was killed and its workers live on while the
command runs again: both write the same bytes, and neither stumbles over what the other has done.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vfmvae.atomic import replacing, write_atomically
from vfmvae.data.latent_folder import (
    MANIFEST,
    READERS,
    STATISTICS,
    Advance,
    DamagedShard,
    LatentSettings,
    Manifest,
    Shard,
    ShardEntry,
    channel_statistics,
    describe,
    latents_of,
    open_shard,
    problem,
    quietly,
    read_manifest,
    settings_in,
    sha256,
    shard_name,
)
from vfmvae.serialization import to_json

STALE_S = 600
"""Nobody writes any more at a file that did not change for so long."""


class LatentWriter:
    """Fills a folder shard by shard, alone or as one of several processes.

    `missing` are the numbers of the shards that this process has to make: of its share, what is not there or
    damaged; `damaged` says what is wrong. Shards of the others are not looked into, beyond their settings.

    Raises ValueError where the folder holds something else: files of another kind, or latents of other
    settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: LatentSettings,
        classes: tuple[str, ...],
        share: tuple[int, int] = (0, 1),
        advance: Advance = quietly,
    ) -> None:
        """share: (i, n), of which the shards i, i + n, ... are made here; advance: for each shard checked."""
        self.folder = folder
        self.settings = settings
        self.classes = classes
        self.damaged: list[str] = []
        self._names = [shard_name(n) for n in range(settings.shards)]
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; give a folder for the latents")
        strangers = sorted(f.name for f in folder.glob("*.safetensors") if f.name not in self._names)
        if strangers:
            raise ValueError(f"{folder} holds other files already ({strangers[0]}); give another folder")
        self._share = index, processes = share
        self._finished = self._complete()
        self._bad: list[int] = []
        self.missing = []
        for number in range(settings.shards):
            mine = number % processes == index
            if not self._is_whole(number, mine) and mine:
                self.missing.append(number)
            advance()

    def discard_damaged(self) -> None:
        """Remove this process's damaged shards, and the manifest first.

        Else another process could take them for finished ones, and write a manifest over them.
        """
        if self._bad:
            self._reopen()
        for number in self._bad:
            (self.folder / self._names[number]).unlink(missing_ok=True)
        self._bad = []

    def is_there(self, number: int) -> bool:
        """Whether a shard is there by now; one that was missing before has come from another process."""
        return (self.folder / self._names[number]).exists()

    def lost(self) -> int:
        """Images that this process's finished shards lack."""
        index, processes = self._share
        done = [n for n in range(index, self.settings.shards, processes) if n not in self.missing]
        shards = (open_shard(self.folder / self._names[n], self.settings) for n in done)
        planned = sum(len(self.settings.rows(n)) for n in done)
        return planned - sum(len(shard) for shard in shards)

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Add a shard, unless it is there by now.

        OSError with a sentence if it cannot be written, and nothing is left of it.
        """
        path = self.folder / self._names[number]
        if self.is_there(number):
            return
        self._clear(f".{path.name}.*.partial", STALE_S)
        if self._finished is not None:
            self._reopen()
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            write_atomically(
                path, lambda partial: save_file(stored, partial, metadata=describe(self.settings))
            )
        except OSError:
            if not self.is_there(number):
                raise

    def finish(self, advance: Advance = quietly) -> Manifest | None:
        """Write statistics and manifest if every shard is there, whoever wrote it; None if not.

        Several processes may do this at once: each writes the same. `advance` is called twice per shard.
        """
        if self._finished and (there := self._complete()) is not None:
            return there
        paths = [self.folder / name for name in self._names]
        if not all(path.exists() for path in paths):
            return None
        shards = [open_shard(path, self.settings) for path in paths]
        filled = [shard for shard in shards if len(shard)]
        if not filled:
            raise ValueError(f"{self.folder}: none of the {self.settings.images} images could be read")
        manifest = self._describe(shards, filled, advance)
        try:
            with replacing(self.folder / STATISTICS, self.folder / MANIFEST) as (statistics, description):
                pickled = BytesIO()  # torch.save to a file says no more than "failed" when the disk is full
                torch.save(_published(manifest), pickled)
                statistics.write_bytes(pickled.getvalue())
                description.write_text(to_json(manifest), encoding="utf-8")
        except OSError:
            if self._complete() != manifest:
                raise
        self._clear(".*.partial", 0)  # of writers that were killed
        self._finished = manifest
        return manifest

    def _describe(self, shards: list[Shard], filled: list[Shard], advance: Advance) -> Manifest:
        """The manifest, for which every byte is read twice."""

        def entry(shard: Shard) -> ShardEntry:
            path = shard.path
            described = ShardEntry(path.name, len(shard), path.stat().st_size, sha256(path))
            advance()
            return described

        with ThreadPoolExecutor(READERS) as pool:
            entries = tuple(pool.map(entry, shards))
        mean, std = channel_statistics(latents_of(shards, self.settings, advance))
        channels, height, width = filled[0].columns["latents"].shape
        return Manifest(
            settings=self.settings,
            latent_shape=(channels, height, width),
            classes=self.classes,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            shards=entries,
        )

    def _complete(self) -> Manifest | None:
        """The manifest if it and the statistics are there."""
        if all((self.folder / name).exists() for name in (MANIFEST, STATISTICS)):
            return read_manifest(self.folder)
        return None

    def _reopen(self) -> None:
        """Before a change: the manifest's checksums will not hold any more, whoever wrote it."""
        self._finished = None
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def _clear(self, pattern: str, age_s: float) -> None:
        """Remove temporary files that did not change for so long."""
        for partial in self.folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - partial.stat().st_mtime >= age_s:
                    partial.unlink()

    def _is_whole(self, number: int, mine: bool) -> bool:
        path = self.folder / self._names[number]
        if not path.exists():
            return False
        try:
            written = settings_in(path)
        except FileNotFoundError:  # another process has discarded it just now
            return False
        except DamagedShard as error:
            found: str | None = str(error)
        else:
            self._check_settings(written)
            entry = self._finished.shards[number] if self._finished is not None and mine else None
            found = problem(self.folder, entry, checksum=True) if entry is not None else None
        if found and mine:
            self.damaged.append(found)
            self._bad.append(number)
        return not found

    def _check_settings(self, there: LatentSettings) -> None:
        ours = asdict(self.settings)
        for name, value in asdict(there).items():
            if value != ours[name]:
                raise ValueError(
                    f"{self.folder} holds latents with {name} {value}, and now it would be {ours[name]};"
                    f" give another folder, or the same settings to go on"
                )


def _published(manifest: Manifest) -> dict[str, Tensor]:
    """The statistics as LightningDiT reads them: float32 [1, C, 1, 1] each."""
    return {name: torch.tensor(getattr(manifest, name)).view(1, -1, 1, 1) for name in ("mean", "std")}
