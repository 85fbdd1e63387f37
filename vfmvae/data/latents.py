"""Latents on disk: a folder of shards that diffusion models train on.

    latents_00000.safetensors ...   up to 10,000 images each
        latents, latents_flip       [N, C, h, w] of each image and of its mirror image
        labels                      [N] int64
        names                       [N, L] uint8, UTF-8 filled up with zeros
        moments, moments_flip       [N, 2C, h, w], where asked for: means, then log variances
    latents_stats.pt                mean and std [1, C, 1, 1] over all latents, mirrored ones too
    manifest.json                   what was encoded and how, the same statistics, a checksum per shard

LightningDiT (arXiv 2501.01423) reads such a folder as it is. This project reads the manifest and the shards,
and unpickles nothing. A shard appears whole or not at all, the manifest when all are there; so a writer that
was killed goes on with the shards that are missing, and several can fill one folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vfmvae.atomic import replacing, write_atomically
from vfmvae.data.source import Split, positions
from vfmvae.serialization import from_dict, read_json, to_json

MANIFEST = "manifest.json"
STATISTICS = "latents_stats.pt"
MAX_SHARD_IMAGES = 10_000
FORMAT = 1
MEND = "run the same `vfmvae encode` command again to complete it"
READERS = 8  # threads that compute checksums
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class LatentSettings:
    """What decides the values in the shards; a folder holds latents of one setting."""

    tokenizer: str
    """SHA-256 of its config and weights."""
    images: int
    names: str
    """SHA-256 of the images' names, in order."""
    resolution: int
    kind: Literal["sample", "mean"]
    """What `latents` holds: a sample of each posterior, or its mean."""
    moments: bool
    storage: Literal["fp32", "bf16", "fp16"]
    compute: str
    """dtype that the tokenizer computed in."""
    seed: int
    shard_images: int
    preprocessing: str = "largest centred square, Lanczos"


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest knows it."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The JSON beside the shards."""

    settings: LatentSettings
    latent_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[ShardEntry, ...]
    format: int = FORMAT


class LatentBatch(TypedDict):
    """Some latents, in float32."""

    latent: Tensor  # [B, C, h, w]
    moments: Tensor | None  # [B, 2C, h, w] where the shards hold them: means, then log variances
    label: Tensor  # int64 [B]
    key: list[str]  # the image's name


class Latents:
    """The latents of a finished folder, as a source of batches by position; see vfmvae.data.source.

    Training is endless: every image once per epoch, in an order and mirrored or not as drawn from (seed,
    epoch). Validation is every image in order, not mirrored. Shards are memory-mapped, so that a batch reads
    its own rows and opens no file. `mean` and `std` are [1, C, 1, 1], float32.

    Raises ValueError for a folder without a manifest and for a shard that is missing or damaged.
    `verify=False` compares sizes instead of checksums, which read every byte.
    """

    def __init__(self, path: str | Path, split: Split = "train", seed: int = 0, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.split: Split = split
        self.seed = seed
        check_shards(self.path, self.manifest.shards, verify)
        self.classes = self.manifest.classes
        self.mean = torch.tensor(self.manifest.mean).view(1, -1, 1, 1)
        self.std = torch.tensor(self.manifest.std).view(1, -1, 1, 1)
        self._shards = [_map_shard(self.path / entry.file) for entry in self.manifest.shards]

    def __len__(self) -> int:
        """Images in the folder."""
        return self.manifest.settings.images

    def batch(self, step: int, batch_size: int) -> LatentBatch:
        """Latents step * batch_size and following."""
        chosen = positions(step, batch_size, self.split, len(self))
        if self.split == "validation":
            return self.read(chosen.start, chosen.stop)
        places = [divmod(position, len(self)) for position in chosen]
        draws = [(_epoch(self.seed, epoch, len(self)), place) for epoch, place in places]
        return self._gather(
            [int(epoch.order[place]) for epoch, place in draws],
            [bool(e.mirrored[place]) for e, place in draws],
        )

    def read(self, start: int, stop: int) -> LatentBatch:
        """Latents start to stop - 1 in the order of the folder, not mirrored."""
        rows = range(start, min(stop, len(self)))
        return self._gather(rows, [False] * len(rows))

    def _gather(self, rows: Sequence[int], mirrored: Sequence[bool]) -> LatentBatch:
        size = self.manifest.settings.shard_images
        found = [(self._shards[row // size], row % size) for row in rows]
        suffixes = ["_flip" if flip else "" for flip in mirrored]

        def stack(name: str) -> Tensor:
            pairs = zip(found, suffixes, strict=True)
            return torch.stack([shard[name + suffix][row] for (shard, row), suffix in pairs]).float()

        return {
            "latent": stack("latents"),
            "moments": stack("moments") if self.manifest.settings.moments else None,
            "label": torch.stack([shard["labels"][row] for shard, row in found]),
            "key": [unpack_name(shard["names"][row]) for shard, row in found],
        }


class LatentWriter:
    """Fills a folder shard by shard; `missing` are the numbers of the shards that are not there yet.

    Raises ValueError where the folder holds something else: files of another kind, or latents of other
    settings. Shards that are damaged count as missing; `damaged` says what is wrong with them.
    """

    def __init__(self, folder: Path, settings: LatentSettings, classes: tuple[str, ...]) -> None:
        self.folder = folder
        self.settings = settings
        self.classes = classes
        self.damaged: list[str] = []
        self._names = [shard_name(n) for n in range(-(-settings.images // settings.shard_images))]
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; give a folder for the latents")
        strangers = sorted(f.name for f in folder.glob("*.safetensors") if f.name not in self._names)
        if strangers:
            raise ValueError(f"{folder} holds other files already ({strangers[0]}); give another folder")
        self._manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
        self.missing = [number for number in range(len(self._names)) if not self._is_whole(number)]

    def rows(self, number: int) -> range:
        """The image numbers that belong into a shard."""
        size = self.settings.shard_images
        return range(number * size, min((number + 1) * size, self.settings.images))

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Add a shard; OSError with a sentence if it cannot be written, and nothing is left of it."""
        for partial in self.folder.glob(f".{self._names[number]}.*"):  # of a writer that was killed
            partial.unlink()
        if self._manifest is not None:  # its checksums do not hold any more
            (self.folder / MANIFEST).unlink(missing_ok=True)
            self._manifest = None
        metadata = {"settings": to_json(self.settings)}  # one entry: more are written in a random order
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(
            self.folder / self._names[number], lambda path: save_file(stored, path, metadata=metadata)
        )

    def finish(self) -> Manifest | None:
        """Write statistics and manifest if every shard is there, whoever wrote it; None if not."""
        paths = [self.folder / name for name in self._names]
        if self._manifest is not None or not all(path.exists() for path in paths):
            return self._manifest
        shards = [_map_shard(path) for path in paths]
        with ThreadPoolExecutor(READERS) as pool:
            checksums = list(pool.map(_sha256, paths))
        entries = tuple(
            ShardEntry(path.name, len(shard["labels"]), path.stat().st_size, checksum)
            for path, shard, checksum in zip(paths, shards, checksums, strict=True)
        )
        mean, std = channel_statistics(s[name] for s in shards for name in ("latents", "latents_flip"))
        channels, height, width = shards[0]["latents"].shape[1:]
        manifest = Manifest(
            settings=self.settings,
            latent_shape=(channels, height, width),
            classes=self.classes,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            shards=entries,
        )
        stored = {name: value.float().view(1, -1, 1, 1) for name, value in (("mean", mean), ("std", std))}
        with replacing(self.folder / STATISTICS, self.folder / MANIFEST) as (statistics, description):
            pickled = BytesIO()  # torch.save to a file says no more than "failed" when the disk is full
            torch.save(stored, pickled)
            statistics.write_bytes(pickled.getvalue())
            description.write_text(to_json(manifest), encoding="utf-8")
        self._manifest = manifest
        return manifest

    def _is_whole(self, number: int) -> bool:
        path = self.folder / self._names[number]
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as opened:
                written = (opened.metadata() or {}).get("settings", "")
        except SafetensorError as error:
            self.damaged.append(f"shard {path.name} is damaged: {error}")
            return False
        self._check_settings(path, written)
        if self._manifest is not None:
            entry = self._manifest.shards[number]
            if problem := _problem(path, entry, checksum=True):
                self.damaged.append(problem)
                return False
        return True

    def _check_settings(self, path: Path, written: str) -> None:
        try:
            there = from_dict(LatentSettings, json.loads(written), str(path))
        except json.JSONDecodeError:
            raise ValueError(f"{path} was not written by this command; give another folder") from None
        ours = asdict(self.settings)
        for name, value in asdict(there).items():
            if value != ours[name]:
                raise ValueError(
                    f"{self.folder} holds latents with {name} {value}, and now it would be {ours[name]};"
                    f" give another folder, or the same settings to go on"
                )


def shard_name(number: int) -> str:
    return f"latents_{number:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder, or a ValueError that says what is there instead."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder} exists; give one that encoding has written")
    path = folder / MANIFEST
    if not path.exists():
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} holds no latents; give a folder that encoding has written")
        raise ValueError(f"{folder} has no {MANIFEST}: encoding did not end; {MEND}")
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise ValueError(f"{path} has format {data.get('format')}; this version reads format {FORMAT}")
    return from_dict(Manifest, data, str(path))


def check_shards(folder: Path, entries: Sequence[ShardEntry], checksums: bool) -> None:
    """ValueError naming the first shard that is not as the manifest says."""
    with ThreadPoolExecutor(READERS) as pool:
        for problem in pool.map(lambda entry: _problem(folder / entry.file, entry, checksums), entries):
            if problem:
                raise ValueError(f"{folder}: {problem}; {MEND}")


def channel_statistics(latents: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (with N - 1) of each channel over tensors [N, C, h, w]: float64 [C] each.

    Exact to rounding for any size: a few hundred rows at a time, merged by their means and sums of squared
    deviations (Chan, Golub and LeVeque, 1979).
    """
    count, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rows in (part for tensor in latents for part in tensor.split(ROWS_AT_ONCE)):
        values = rows.double().transpose(0, 1).flatten(1)  # [C, n * h * w]
        added, own_mean = values.shape[1], values.mean(dim=1)
        difference, total = own_mean - mean, count + added
        squares = squares + (values - own_mean[:, None]).square().sum(dim=1)
        squares = squares + difference.square() * (count * added / total)
        mean, count = mean + difference * (added / total), total
    return mean, (squares / (count - 1)).sqrt()


def pack_names(names: Sequence[str]) -> Tensor:
    """Strings as uint8 [N, L], UTF-8 filled up with zeros."""
    encoded = [name.encode() for name in names]
    width = max(1, *(len(name) for name in encoded))
    padded = b"".join(name.ljust(width, b"\0") for name in encoded)
    return torch.from_numpy(np.frombuffer(padded, dtype=np.uint8).reshape(-1, width).copy())


def unpack_name(row: Tensor) -> str:
    """One row of `pack_names`."""
    return bytes(row.tolist()).rstrip(b"\0").decode()


class _Epoch(NamedTuple):
    order: np.ndarray
    mirrored: np.ndarray


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, length: int) -> _Epoch:
    rng = np.random.default_rng((seed, epoch))
    return _Epoch(rng.permutation(length), rng.random(length) < 0.5)


def _problem(path: Path, entry: ShardEntry, checksum: bool) -> str | None:
    """What is wrong with a shard that should be as `entry` says."""
    if not path.is_file():
        return f"shard {entry.file} is missing"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"shard {entry.file} is damaged: {size} bytes instead of {entry.bytes}"
    if checksum and _sha256(path) != entry.sha256:
        return f"shard {entry.file} is damaged: its checksum is not the manifest's"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _map_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped: nothing is read before it is used."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"shard {path} is damaged: {error}") from None
