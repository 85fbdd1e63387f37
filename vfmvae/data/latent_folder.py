"""Latents on disk: a folder of shards that diffusion models train on.

    latents_00000.safetensors ...   up to 10,000 images each
        latents, latents_flip       [N, C, h, w] of each image and of its mirror image
        moments, moments_flip       [N, 2C, h, w], where asked for: means, then log variances
        features, features_flip     [N, T, D], where asked for: the frozen encoder's tokens
        class_token, class_token_flip   [N, D], where asked for
        labels                      [N] int64, -1 for none
        numbers                     [N] int64: the number of each image in the data set, ascending
        names                       [N, L] uint8, UTF-8 filled up with zeros
    latents_stats.pt                mean and std [1, C, 1, 1] over all latents, mirrored ones too
    manifest.json                   what was encoded and how, the same statistics, a checksum per shard

LightningDiT (arXiv 2501.01423) reads such a folder as it is. This project reads the manifest and the shards,
and unpickles nothing. A shard appears whole or not at all, the manifest when all are there; so a writer that
was killed goes on with the shards that are missing, and several can fill one folder. Images that could not be
read are missing from their shard: how many it holds says the manifest, and which ones `numbers`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vfmvae.data.transforms import CENTRE_CROP
from vfmvae.serialization import check_fields, from_dict, read_json

MANIFEST = "manifest.json"
STATISTICS = "latents_stats.pt"
MAX_SHARD_IMAGES = 10_000
FORMAT = 2
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READERS = 8  # threads that compute checksums
ROWS_AT_ONCE = 512
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES |= {"I64": torch.int64, "U8": torch.uint8}


class DamagedShard(ValueError):
    """A shard that is not what its header, or the manifest, says."""


Advance = Callable[[], object]
"""Called once per shard that is done, for a progress bar."""


def quietly() -> None:
    """An `Advance` that shows nothing."""


@dataclass(frozen=True)
class LatentSettings:
    """What decides the values in the shards; a folder holds latents of one setting."""

    tokenizer: str
    """SHA-256 of its config and weights; "unknown" where others have encoded."""
    images: int
    """Images of the data set; those that cannot be read are in no shard."""
    names: str
    """SHA-256 of the images' names, in order."""
    resolution: int | None
    kind: Literal["sample", "mean", "unknown"]
    """What `latents` holds: a sample of each posterior, or its mean."""
    moments: bool
    storage: Literal["fp32", "bf16", "fp16"]
    compute: str
    """dtype that the tokenizer computed in."""
    seed: int
    shard_images: int
    """Images planned for each shard but the last."""
    flips: bool = True
    """Whether mirror images are there too."""
    tokens: tuple[int, int] | None = None
    """Rows and columns of the encoder's tokens in `features`, where they are there."""
    class_token: bool = False
    encoder: str | None = None
    """Whose features these are."""
    origin: Literal["encode", "lightningdit", "repa"] = "encode"
    """Who has encoded: `vfmvae encode`, or the project whose files were imported."""
    preprocessing: str = CENTRE_CROP

    def __post_init__(self) -> None:
        check_fields(self, "settings")
        if self.images < 1 or not 1 <= self.shard_images <= MAX_SHARD_IMAGES:
            raise ValueError(
                f"settings.images is {self.images} and settings.shard_images {self.shard_images};"
                f" they must be at least 1, and shard_images at most {MAX_SHARD_IMAGES}"
            )

    @property
    def shards(self) -> int:
        """How many shards the images are planned for."""
        return -(-self.images // self.shard_images)

    def rows(self, number: int) -> range:
        """The image numbers that are planned for a shard."""
        return range(number * self.shard_images, min((number + 1) * self.shard_images, self.images))

    @property
    def fields(self) -> list[str]:
        """The tensors with numbers of an image, without those of its mirror image."""
        stored = {"moments": self.moments, "features": self.tokens is not None}
        stored["class_token"] = self.class_token
        return ["latents", *(name for name, there in stored.items() if there)]

    @property
    def mend(self) -> str:
        """How to complete a folder."""
        command = "vfmvae encode" if self.origin == "encode" else "vfmvae latents import"
        return f"run the same `{command}` command again to complete it"


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest knows it; `images` is how many it holds."""

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

    def __post_init__(self) -> None:
        """ValueError where the entries contradict each other: others may have written this."""
        files = [entry.file for entry in self.shards]
        planned = [shard_name(number) for number in range(min(self.settings.shards, len(files) + 1))]
        if files != planned:
            raise ValueError(f"{len(files)} shards are listed that are not the {self.settings.shards} needed")
        for number, entry in enumerate(self.shards):
            limit = len(self.settings.rows(number))
            if not 0 <= entry.images <= limit:
                raise ValueError(f"{entry.file} is said to hold {entry.images} images of {limit} planned")
        if not len(self) or min(self.latent_shape) < 1:
            raise ValueError(f"it lists {len(self)} latents of shape {self.latent_shape}")
        if not len(self.mean) == len(self.std) == self.latent_shape[0]:
            raise ValueError(
                f"{len(self.mean)} means and {len(self.std)} stds for {self.latent_shape[0]} channels"
            )

    def __len__(self) -> int:
        """Images that are there."""
        return sum(entry.images for entry in self.shards)


class Column(NamedTuple):
    """One tensor of a shard as bytes, memory-mapped: nothing is read before it is used."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of one row
    rows: np.ndarray  # uint8 [N, bytes of a row]
    offset: int  # of the first row in the file

    def parts(self) -> Iterator[Tensor]:
        """The rows in their own dtype and shape, a few hundred at a time, copied."""
        for start in range(0, len(self.rows), ROWS_AT_ONCE):
            copied = torch.from_numpy(self.rows[start : start + ROWS_AT_ONCE].copy())
            yield copied.view(self.dtype).view(len(copied), *self.shape)

    def integers(self) -> np.ndarray:
        """All rows of a column of int64 [N]."""
        return self.rows.copy().view(np.int64)[:, 0]


@dataclass(frozen=True)
class Shard:
    """A shard that is open: its columns by name."""

    path: Path
    columns: dict[str, Column]

    def __len__(self) -> int:
        return len(self.columns["labels"].rows)


def open_shard(path: Path, settings: LatentSettings) -> Shard:
    """Map a shard, without keeping its file open; ValueError where it is damaged or not as `settings` says.

    Values are not read. Nobody may change the file while it is mapped; replacing it by another is safe.
    """
    _read_metadata(
        path
    )  # safetensors checks that the header's shapes and offsets fit each other and the file
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    begin = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(mapped[8:begin].tobytes())
    columns = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES or not entry["shape"]:
            continue
        (count, *shape), (start, stop) = entry["shape"], entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        width = dtype.itemsize * int(np.prod(shape, dtype=object))
        rows = mapped[begin + start : begin + stop].reshape(count, width)
        columns[name] = Column(dtype, tuple(shape), rows, begin + start)
    shard = Shard(path, columns)
    _check_columns(shard, settings)
    return shard


def _check_columns(shard: Shard, settings: LatentSettings) -> None:
    ranks = {"latents": 3, "moments": 3, "features": 2, "class_token": 1}
    suffixes = ("", "_flip") if settings.flips else ("",)
    stored = STORAGE[settings.storage]
    wanted = {"labels": (torch.int64, 0), "numbers": (torch.int64, 0), "names": (torch.uint8, 1)}
    wanted |= {field + suffix: (stored, ranks[field]) for field in settings.fields for suffix in suffixes}
    for name, (dtype, rank) in wanted.items():
        column = shard.columns.get(name)
        if column is None or column.dtype != dtype or len(column.shape) != rank:
            raise DamagedShard(f"shard {shard.path} is damaged: it holds no {name} of {dtype} as it should")
        if len(column.rows) != len(shard):
            raise DamagedShard(
                f"shard {shard.path} is damaged: {len(column.rows)} rows of {name}, {len(shard)} of labels"
            )
        needed = _shape(shard, name.removesuffix("_flip"))
        if column.shape != needed:
            raise DamagedShard(
                f"shard {shard.path} is damaged: rows of {name} are {column.shape}, not {needed}"
            )


def _shape(shard: Shard, field: str) -> tuple[int, ...]:
    """What the rows of a field and of its mirror images must be."""
    if field == "moments":
        channels, *size = shard.columns["latents"].shape
        return (2 * channels, *size)
    return shard.columns[field].shape


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise DamagedShard(f"shard {path} is damaged: {error}") from None


def describe(settings: LatentSettings) -> dict[str, str]:
    """What a shard's header says about it; one entry, as several are written in a random order."""
    return {"settings": json.dumps({"format": FORMAT, **asdict(settings)})}


def settings_in(path: Path) -> LatentSettings:
    """The settings that a shard was written with; ValueError where it says none, or is damaged."""
    written = _read_metadata(path).get("settings", "")
    try:
        data = json.loads(written)
    except (json.JSONDecodeError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{path} was not written by vfmvae; give another folder")
    check_format(data.pop("format", 1), path)
    return from_dict(LatentSettings, data, str(path))


def check_format(found: object, path: Path) -> None:
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found!r:.20}; this version reads format {FORMAT}: encode the images again"
            f" into another folder"
        )


def shard_name(number: int) -> str:
    return f"latents_{number:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder, or a ValueError that says what is there instead."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder} exists; give one that `vfmvae encode` has written")
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(_unfinished(folder))
    data = read_json(path)
    check_format(data.get("format"), path)
    statistics = [x for x in (data.get("mean"), data.get("std")) if isinstance(x, list)]
    if any(isinstance(x, float) and not math.isfinite(x) for numbers in statistics for x in numbers):
        raise ValueError(
            f"{folder} holds latents that are NaN or infinite, as their mean and deviation say; encode the"
            f" images again, with --dtype fp32 --storage fp32, into another folder"
        )
    return from_dict(Manifest, data, str(path))


def _unfinished(folder: Path) -> str:
    """The sentence for a folder without a manifest: what is missing and how to go on."""
    shards = sorted(folder.glob("latents_*.safetensors"))
    if not shards:
        return f"{folder} holds no latents; give a folder that `vfmvae encode` has written"
    settings = settings_in(shards[0])
    missing = settings.shards - len(shards)  # a header may say any number: nothing here counts up to it
    first = next((name for n, path in enumerate(shards) if path.name != (name := shard_name(n))), None)
    what = f"{MANIFEST} only"
    if missing > 0:
        what = f"{missing} of {settings.shards} shards, the first is {first or shard_name(len(shards))}"
    return f"{folder} is not finished: missing is {what}; {settings.mend}"


def check_shards(
    folder: Path,
    manifest: Manifest,
    checksums: bool = True,
    advance: Advance = quietly,
    finite: Collection[str] = (),
) -> None:
    """ValueError naming the shards that are not as the manifest says, or whose fields named `finite` are not.

    `checksums` read every byte.
    """

    def check(entry: ShardEntry) -> str | None:
        found = problem(folder, entry, checksums)
        if found is None and finite:
            found = not_finite(open_shard(folder / entry.file, manifest.settings), finite)
        advance()
        return found

    with ThreadPoolExecutor(READERS) as pool:
        problems = [found for found in pool.map(check, manifest.shards) if found]
    if problems:
        more = f", and {len(problems) - 1} more are missing or damaged" if len(problems) > 1 else ""
        raise ValueError(f"{folder}: {problems[0]}{more}; {manifest.settings.mend}")


def open_shards(folder: Path, manifest: Manifest) -> list[Shard]:
    """Every shard, mapped; ValueError for one that is not as the manifest says."""
    shards: list[Shard] = []
    for entry in manifest.shards:
        shard = open_shard(folder / entry.file, manifest.settings)
        found, shape = len(shard), shard.columns["latents"].shape
        if (found, shape) != (entry.images, manifest.latent_shape):
            raise DamagedShard(
                f"shard {shard.path} is damaged: it holds {found} latents of {shape}, and the manifest says"
                f" {entry.images} of {manifest.latent_shape}; {manifest.settings.mend}"
            )
        for field in manifest.settings.fields:
            if shards and shard.columns[field].shape != shards[0].columns[field].shape:
                raise DamagedShard(f"shard {shard.path} is damaged: its {field} are not of the others' shape")
        shards.append(shard)
    return shards


def problem(folder: Path, entry: ShardEntry, checksum: bool) -> str | None:
    """What is wrong with a shard that should be as `entry` says."""
    path = folder / entry.file
    if not path.is_file():
        return f"shard {entry.file} is missing"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"shard {entry.file} is damaged: {size} bytes instead of {entry.bytes}"
    if checksum and sha256(path) != entry.sha256:
        return f"shard {entry.file} is damaged: its checksum is not the manifest's"
    return None


def not_finite(shard: Shard, fields: Collection[str]) -> str | None:
    """Which of these fields holds numbers that are not finite, in a sentence."""
    for name in fields:
        for part in shard.columns[name].parts():
            if part.is_floating_point() and not part.isfinite().all():
                return f"shard {shard.path.name} holds {name} that are not all finite: remove it"
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def latents_of(shards: Iterable[Shard], settings: LatentSettings, advance: Advance) -> Iterator[Tensor]:
    """All latents of all shards, mirrored ones too, a few hundred rows [n, C, h, w] at a time."""
    for shard in shards:
        for name in ("latents", "latents_flip") if settings.flips else ("latents",):
            yield from shard.columns[name].parts()
        advance()


def channel_statistics(latents: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (with N - 1) of each channel over tensors [N, C, h, w]: float64 [C] each.

    Exact to rounding for any size: tensor by tensor, merged by their means and sums of squared deviations
    (Chan, Golub and LeVeque, 1979).
    """
    count, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rows in latents:
        values = rows.double().transpose(0, 1).flatten(1)  # [C, n * h * w]
        added, own_mean = values.shape[1], values.mean(dim=1)
        difference, total = own_mean - mean, count + added
        squares = squares + (values - own_mean[:, None]).square().sum(dim=1)
        squares = squares + difference.square() * (count * added / total)
        mean, count = mean + difference * (added / total), total
    return mean, (squares / max(1, count - 1)).sqrt()


def hash_of_names(names: Iterable[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()


def pack_names(names: Sequence[str]) -> Tensor:
    """Strings as uint8 [N, L], UTF-8 filled up with zeros."""
    encoded = [os.fsencode(name) for name in names]
    width = max([1, *(len(name) for name in encoded)])
    padded = b"".join(name.ljust(width, b"\0") for name in encoded)
    return torch.from_numpy(np.frombuffer(padded, dtype=np.uint8).reshape(-1, width).copy())


def unpack_name(row: np.ndarray) -> str:
    """One row of `pack_names`."""
    return row.tobytes().rstrip(b"\0").decode(errors="replace")
