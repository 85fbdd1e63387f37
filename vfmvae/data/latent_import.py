"""Latents that other projects have encoded, row by row, as vfmvae.data.latent_folder stores them.

LightningDiT (arXiv 2501.01423): `latents_rankRR_shardSSS.safetensors` with latents and latents_flip
[N, C, h, w] and labels [N]. REPA (arXiv 2410.06940) and REG: a .npy for each image with means and standard
deviations [2C, h, w], below `vae-sd/`, and a `dataset.json` with the labels.

Both are read a few hundred rows at a time. Nothing is unpickled. ValueError names the file, and the row, that
is damaged or holds numbers that are not finite.
"""

from __future__ import annotations

import os
import re
import tokenize
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vfmvae.data.latent_folder import LatentSettings, hash_of_names, pack_names
from vfmvae.data.samples import NO_LABEL
from vfmvae.ops.posterior import LOGVAR_RANGE
from vfmvae.serialization import read_json

MOST_CLASSES = 1 << 20
_STORED: dict[str, Literal["fp32", "bf16", "fp16"]] = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
# What NumPy raises for files that are cut short, damaged or not arrays; it tokenises headers.
_DAMAGE = (ValueError, OSError, EOFError, SyntaxError, TypeError, LookupError, tokenize.TokenError)


class LightningDiTFolder:
    """Shards of LightningDiT in the order of their names; a row is named by its file and place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = sorted(_folder(folder).glob("*.safetensors"))
        if not self._files:
            raise ValueError(f"{folder} holds no *.safetensors; give a folder of LightningDiT's shards")
        self._labels: list[Tensor] = []
        self._kind: tuple[str, bool, tuple[int, ...]] | None = None
        for path in self._files:
            try:
                self._open(path)
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}; copy it again") from None
        self._stops = np.cumsum([len(labels) for labels in self._labels])
        if not self._stops[-1]:
            raise ValueError(f"{folder} holds shards without a single row")
        self.classes = numbered_classes(torch.cat(self._labels), folder)

    def __len__(self) -> int:
        return int(self._stops[-1])

    def settings(self, shard_images: int) -> LatentSettings:
        """As far as it is known what these are."""
        assert self._kind is not None
        storage, flips, _ = self._kind
        everything = ((n, row) for n, labels in enumerate(self._labels) for row in range(len(labels)))
        return LatentSettings(
            tokenizer="unknown",
            images=len(self),
            names=hash_of_names(self._name(number, row) for number, row in everything),
            resolution=None,
            kind="unknown",
            moments=False,
            storage=_STORED[storage],
            compute="unknown",
            seed=0,
            shard_images=shard_images,
            flips=flips,
            origin="lightningdit",
            preprocessing="unknown",
        )

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of rows start to stop - 1."""
        assert self._kind is not None
        wanted = ["latents", "latents_flip"] if self._kind[1] else ["latents"]
        parts: dict[str, list[Tensor]] = {name: [] for name in (*wanted, "labels")}
        names: list[str] = []
        for number, after in enumerate(self._stops.tolist()):
            before = after - len(self._labels[number])
            first, last = max(start, before) - before, min(stop, after) - before
            if first >= last:
                continue
            path = self._files[number]
            try:
                with safe_open(path, framework="pt") as opened:
                    for name in wanted:
                        rows = opened.get_slice(name)[first:last]
                        _check_finite(rows, name, path, first)
                        parts[name].append(rows)
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}; copy it again") from None
            parts["labels"].append(self._labels[number][first:last])
            names += [self._name(number, row) for row in range(first, last)]
        tensors = {name: torch.cat(found) for name, found in parts.items()}
        return {**tensors, "names": pack_names(names), "numbers": torch.arange(start, stop)}

    def _name(self, number: int, row: int) -> str:
        return f"{self._files[number].stem}/{row:05d}"

    def _open(self, path: Path) -> None:
        """Read a shard's labels, and hold the rest of it to the first one's kind and shape."""
        with safe_open(path, framework="pt") as opened:
            there = set(opened.keys())
            for name in ("latents", "labels"):
                if name not in there:
                    raise ValueError(f"{path} holds no {name}, as LightningDiT's shards do")
            labels = opened.get_tensor("labels")
            if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
                raise ValueError(f"{path}: labels are {labels.dtype} {list(labels.shape)}, needed is int [N]")
            for name in sorted(there & {"latents", "latents_flip"}):
                rows = opened.get_slice(name)
                (count, *shape), dtype = rows.get_shape() or [0], rows.get_dtype()
                if len(shape) != 3 or dtype not in _STORED or count != len(labels):
                    raise ValueError(
                        f"{path}: {name} are {dtype} {[count, *shape]}, needed is [{len(labels)}, C, h, w] of"
                        f" {', '.join(_STORED)}"
                    )
                kind = (dtype, "latents_flip" in there, tuple(shape))
                self._kind = self._kind or kind
                if kind != self._kind:
                    raise ValueError(
                        f"{path}: {name} are {dtype} {shape}, {'with' if kind[1] else 'without'} mirror"
                        f" images, unlike those of {self._files[0].name}"
                    )
        self._labels.append(labels.to(torch.int64))


class RepaFolder:
    """REPA's moments, one file per image, in the order of their names.

    `latents` become samples, drawn from (seed 0, number of the image) as `vfmvae encode` does; `moments` keep
    means and log variances, the latter computed in float64 and not below those of a posterior.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder / "vae-sd" if (folder / "vae-sd").is_dir() else _folder(folder)
        self._names = _arrays_below(self._root)
        if not self._names:
            raise ValueError(f"{self._root} holds no .npy files; give REPA's folder with vae-sd/ in it")
        self._shape = self._load(self._names[0]).shape
        labels, labelled = self._read_labels()
        self._labels = torch.tensor(labels, dtype=torch.int64)
        self.classes = numbered_classes(self._labels, self._root) if labelled else ("",)
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="npy")

    def __len__(self) -> int:
        return len(self._names)

    def settings(self, shard_images: int) -> LatentSettings:
        """As far as it is known what these are."""
        return LatentSettings(
            tokenizer="unknown",
            images=len(self),
            names=hash_of_names(self._names),
            resolution=None,
            kind="sample",
            moments=True,
            storage="fp32",
            compute="unknown",
            seed=0,
            shard_images=shard_images,
            flips=False,
            origin="repa",
            preprocessing="unknown",
        )

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of images start to stop - 1."""
        names = self._names[start:stop]
        arrays = np.stack(list(self._pool.map(self._load, names)))
        mean, std = np.split(arrays.astype(np.float64), 2, axis=1)
        bad = ~(np.isfinite(mean) & np.isfinite(std) & (std >= 0)).reshape(len(names), -1).all(axis=1)
        if bad.any():
            raise ValueError(
                f"{self._root / names[int(bad.argmax())]}: means and standard deviations must be finite,"
                f" and the latter not negative"
            )
        draws = [np.random.default_rng((0, number, 0)) for number in range(start, stop)]
        noise = np.stack([rng.standard_normal(mean.shape[1:], dtype=np.float32) for rng in draws])
        with np.errstate(divide="ignore"):
            logvar = np.clip(2 * np.log(std), *LOGVAR_RANGE)
        return {
            "latents": torch.from_numpy((mean + std * noise).astype(np.float32)),
            "moments": torch.from_numpy(np.concatenate([mean, logvar], axis=1).astype(np.float32)),
            "labels": self._labels[start:stop],
            "names": pack_names(names),
            "numbers": torch.arange(start, stop),
        }

    def _load(self, name: str) -> np.ndarray:
        """[2C, h, w]; mapped first, so that a header cannot ask for more memory than the file has bytes."""
        path = self._root / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            found = np.array(array) if isinstance(array, np.ndarray) else None
        except _DAMAGE as error:
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} is damaged, or no array: {cause}; copy it again") from None
        if (
            found is None
            or found.ndim != 3
            or found.shape[0] % 2
            or not found.size
            or found.dtype.kind != "f"
        ):
            what = "no array" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ValueError(f"{path} is {what}; needed is float [2C, h, w]: means, then standard deviations")
        if found.shape != getattr(self, "_shape", found.shape):
            raise ValueError(f"{path} is {list(found.shape)}, and {self._names[0]} is {list(self._shape)}")
        return found

    def _read_labels(self) -> tuple[list[int], bool]:
        """A label for each file, and whether there are any: the file says null for a set without."""
        candidates = [self._root / "dataset.json", self.folder / "dataset.json"]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise ValueError(f"{self._root} has no dataset.json, which holds the labels")
        entries = read_json(path).get("labels")
        if entries is None:
            return [0] * len(self), False
        if not isinstance(entries, list):
            raise ValueError(f"{path}: labels are no list of [name, label]")
        labels = dict(_label(entry, path) for entry in entries)
        missing = next((name for name in self._names if _identity(name) not in labels), None)
        if missing is not None:
            raise ValueError(f"{path} has no label for {missing}")
        return [labels[_identity(name)] for name in self._names], True


def numbered_classes(labels: Tensor, where: Path) -> tuple[str, ...]:
    """Names for classes that have numbers only: the numbers."""
    low, high = int(labels.min()), int(labels.max())
    if low < NO_LABEL or high >= MOST_CLASSES:
        raise ValueError(
            f"{where}: labels go from {low} to {high}; needed is {NO_LABEL} (none) or 0 and more"
        )
    return tuple(str(number) for number in range(max(high, 0) + 1))


def _label(entry: Any, path: Path) -> tuple[tuple[str, str], int]:
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
        name, label = entry
        if label is None:
            return _identity(name), NO_LABEL
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MOST_CLASSES:
            return _identity(name), label
    raise ValueError(f"{path}: {str(entry)[:80]} is no [name, label] with a label of 0 and more, or null")


def _identity(name: str) -> tuple[str, str]:
    """What 00000/img00000007.png and 00000/img-mean-std-00000007.npy have in common: folder and number."""
    path = PurePosixPath(name)
    numbers = re.findall(r"\d+", path.stem)
    return str(path.parent), numbers[-1] if numbers else path.stem


def _check_finite(rows: Tensor, name: str, path: Path, first: int) -> None:
    bad = (~rows.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{path}: row {first + bad[0]} of {name} is not finite")


def _arrays_below(root: Path) -> list[str]:
    """Names of .npy files at any depth, sorted, with `/` between folders."""
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(root)
        found += [(below / n).as_posix() for n in names if n.endswith(".npy") and not n.startswith(".")]
    return sorted(found)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"no folder {path} exists; give the one that was encoded")
    return path


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows that were read one after the other, as one shard's tensors."""
    width = max(part["names"].shape[1] for part in parts)
    names = [torch.nn.functional.pad(part["names"], (0, width - part["names"].shape[1])) for part in parts]
    others = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "names"}
    return {**others, "names": torch.cat(names)}
