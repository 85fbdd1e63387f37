"""Folders of made-up latents, each row of which tells which image it is and whether it is mirrored."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vfmvae.data.latent_folder import STORAGE, LatentSettings, pack_names
from vfmvae.data.latent_writer import LatentWriter

IMAGES, SHARD = 23, 10
SETTINGS = LatentSettings(
    tokenizer="t",
    images=IMAGES,
    names="n",
    resolution=64,
    kind="sample",
    moments=True,
    storage="fp32",
    compute="float32",
    seed=0,
    shard_images=SHARD,
)
NAMES = [f"größe/{number}.jpg" for number in range(IMAGES)]


def latent(number: int, mirrored: bool = False) -> Tensor:
    """[3, 4, 2], told apart by its values."""
    rng = np.random.default_rng((number, mirrored))
    return torch.from_numpy(rng.normal([[[1.0]], [[-5.0]], [[300.0]]], 2.0, (3, 4, 2))).float()


def token(number: int, mirrored: bool = False) -> Tensor:
    """[5], as latents."""
    return latent(number, mirrored).flatten()[:5]


def shard(rows: Iterable[int], settings: LatentSettings = SETTINGS) -> dict[str, Tensor]:
    """The tensors of the given images."""
    rows = list(rows)
    found: dict[str, Tensor] = {}
    for flip, suffix in [(False, ""), (True, "_flip")][: 1 + settings.flips]:
        values = torch.stack([latent(row, flip) for row in rows]) if rows else torch.empty(0, 3, 4, 2)
        tokens = torch.stack([token(row, flip) for row in rows]) if rows else torch.empty(0, 5)
        every = {
            "latents": values,
            "moments": torch.cat([values, -values], dim=1),
            "features": tokens[:, None] * torch.arange(6)[:, None],
            "class_token": tokens,
        }
        found |= {name + suffix: every[name].to(STORAGE[settings.storage]) for name in settings.fields}
    return {
        **found,
        "labels": torch.tensor([row % 5 for row in rows], dtype=torch.int64),
        "numbers": torch.tensor(rows, dtype=torch.int64),
        "names": pack_names([NAMES[row] for row in rows]),
    }


def writer_for(
    folder: Path, settings: LatentSettings = SETTINGS, share: tuple[int, int] = (0, 1)
) -> LatentWriter:
    return LatentWriter(folder, settings, tuple("abcde"), share)


def fill(folder: Path, settings: LatentSettings = SETTINGS, without: Iterable[int] = ()) -> Path:
    """A finished folder; `without` are the images that could not be read."""
    writer, gone = writer_for(folder, settings), set(without)
    writer.discard_damaged()
    for number in writer.missing:
        writer.write(number, shard([row for row in settings.rows(number) if row not in gone], settings))
    assert writer.finish() is not None
    return folder


def damage(path: Path, how: str) -> None:
    """`how`: missing, cut, or one bit at the end."""
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-100])
    else:
        content[-8] ^= 1
        path.write_bytes(content)
