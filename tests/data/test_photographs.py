"""The embedded photographs: nothing is downloaded, nothing held out trains, batches depend on position."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vfmvae.data import ImageSource, Photographs, photographs, validation_batches
from vfmvae.data.photographs import (
    PHOTOGRAPHS,
    SCENES,
    VALIDATION_CROPS,
    data_folder,
    levels_within,
    pyramid,
    region,
)
from vfmvae.data.transforms import CropConfig


@pytest.fixture(scope="module")
def train() -> Photographs:
    return Photographs("train", 64, seed=0)


@pytest.fixture(scope="module")
def validation() -> Photographs:
    return Photographs("validation", 64)


def test_every_photograph_is_read_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the photographs must not be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    photographs._read.cache_clear()
    Photographs("train", 64)


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda p: p.file)
def test_the_two_regions_are_the_photograph_cut_in_two(photograph: photographs.Photograph) -> None:
    with Image.open(data_folder() / photograph.file) as image:
        whole = np.asarray(image.convert("RGB"))
    parts = [np.asarray(region(photograph, split)) for split in ("train", "validation")]
    if photograph.held_out in ("left", "top"):
        parts.reverse()
    axis = 1 if photograph.held_out in ("left", "right") else 0
    assert np.array_equal(np.concatenate(parts, axis=axis), whole)
    held_out = region(photograph, "validation")
    assert min(held_out.size) >= 64, "there is a native 64 px crop"
    assert held_out.width * held_out.height == pytest.approx(whole[..., 0].size / 4, rel=0.01)


def test_training_crops_do_not_depend_on_held_out_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Photographs("train", 32).batch(0, 64)["image"]
    read = photographs._read

    def spoilt(file: str) -> Image.Image:
        photograph = next(p for p in PHOTOGRAPHS if p.file == file)
        pixels = np.array(read(file))
        height, width = pixels.shape[:2]
        rows, columns = round(height * 0.25), round(width * 0.25)
        strip = {
            "left": np.s_[:, :columns],
            "right": np.s_[:, width - columns :],
            "top": np.s_[:rows],
            "bottom": np.s_[height - rows :],
        }
        pixels[strip[photograph.held_out]] = np.random.default_rng(0).integers(256)
        return Image.fromarray(pixels)

    monkeypatch.setattr(photographs, "_read", spoilt)
    assert torch.equal(Photographs("train", 32).batch(0, 64)["image"], before)


def test_both_views_of_the_stereo_pair_hold_out_the_same_rows() -> None:
    left, right = (p for p in PHOTOGRAPHS if p.scene == "motorcycle")
    assert left.held_out == right.held_out and left.held_out in ("top", "bottom")


def test_batches(train: Photographs) -> None:
    batch = train.batch(3, 8)
    assert batch["image"].shape == (8, 3, 64, 64) and batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["label"].shape == (8,) and batch["label"].dtype == torch.int64
    for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
        assert key.startswith(train.classes[label]), f"{key} is labelled {train.classes[label]}"


def test_a_batch_depends_on_seed_and_position_alone(train: Photographs) -> None:
    again = Photographs("train", 64, seed=0)
    later = [again.batch(step, 4)["image"] for step in (5, 1, 0)]
    assert torch.equal(later[1], train.batch(1, 4)["image"])
    assert torch.equal(torch.cat([later[2], later[1]]), train.batch(0, 8)["image"])
    assert not torch.equal(later[0], later[1])
    assert not torch.equal(Photographs("train", 64, seed=1).batch(1, 4)["image"], later[1])


def test_validation_is_one_fixed_list(validation: Photographs) -> None:
    other = Photographs("validation", 64, seed=5)
    assert len(validation) == VALIDATION_CROPS * len(PHOTOGRAPHS)
    batches = list(validation_batches(validation, 100))
    assert [len(b["key"]) for b in batches] == [100, 100, 72]
    assert torch.equal(batches[1]["image"], other.batch(1, 100)["image"])
    assert set(validation.batch(0, len(PHOTOGRAPHS))["label"].tolist()) == set(range(len(SCENES)))
    with pytest.raises(ValueError, match="272"):
        validation.batch(3, 100)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_crops_are_slices_of_their_region(split: str) -> None:
    """Crops of native scale are found in the file, at the place their key names."""
    source: ImageSource = Photographs(split, 64)
    batch, native = source.batch(0, 272), 0
    for image, key in zip(batch["image"], batch["key"], strict=True):
        file, size, left, top = re.fullmatch(r"(\S+)/\w+ (\w+)\+(\d+)\+(\d+)", key).groups()
        whole = region(next(p for p in PHOTOGRAPHS if p.file == file), split)
        if size == f"{whole.width}x{whole.height}":
            native += 1
            found = np.asarray(whole)[int(top) : int(top) + 64, int(left) : int(left) + 64]
            crop = image.permute(1, 2, 0).numpy()
            assert np.array_equal(crop, found) or np.array_equal(crop[:, ::-1], found), key
    assert native > 20


def test_pyramids_go_down_to_the_resolution_in_even_steps() -> None:
    levels = pyramid(Image.new("RGB", (600, 256), "red"), 64)
    assert [min(level.shape[:2]) for level in levels] == [256, 215, 181, 152, 128, 108, 91, 76, 64]
    assert all(level.shape[1] / level.shape[0] == pytest.approx(600 / 256, rel=0.01) for level in levels)


def test_the_default_crops_are_drawn_from_all_levels(train: Photographs) -> None:
    for index in range(40):
        rng = np.random.default_rng((0, index))
        number = int(rng.integers(len(PHOTOGRAPHS)))
        levels = pyramid(region(PHOTOGRAPHS[number], "train"), 64)
        level = levels[int(rng.integers(len(levels)))]
        top, left = (int(rng.integers(size - 64 + 1)) for size in level.shape[:2])
        pixels = level[top : top + 64, left : left + 64]
        expected = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        assert np.array_equal(train.crop(index).pixels, expected)


def test_a_range_of_sides_is_a_range_of_levels() -> None:
    levels = pyramid(Image.new("RGB", (600, 256), "red"), 64)  # nine, at 0.5, 0.545, 0.595, ... 0.917, 1

    def shorts(*side: float) -> list[int]:
        return [min(level.shape[:2]) for level in levels_within(levels, side)]

    assert shorts(0.5, 1.0) == shorts(0.1, 1.0) == [256, 215, 181, 152, 128, 108, 91, 76, 64]
    assert shorts(1.0, 1.0) == [64], "the whole short side"
    assert shorts(0.7, 0.9) == [128, 108, 91]
    assert shorts(0.1, 0.2) == [256], "nothing is sharper"
    assert shorts(0.66, 0.67) == [152], "the nearest"
    assert levels_within(levels[:1], (0.5, 0.6)) == levels[:1]


def test_training_crops_keep_to_their_limits(train: Photographs, validation: Photographs) -> None:
    whole = CropConfig(side=(1.0, 1.0), flip=0.0)
    for index in range(40):
        crop = train.crop(index, whole)
        width, height = map(int, re.search(r" (\d+)x(\d+)\+", crop.key).groups())  # type: ignore[union-attr]
        assert min(width, height) == 64
        mirrored = train.crop(index, CropConfig(side=(1.0, 1.0), flip=1.0))
        assert np.array_equal(mirrored.pixels, crop.pixels[:, ::-1])
    held_out = (validation.batch(0, 20, crops)["image"] for crops in (CropConfig(), whole))
    assert torch.equal(*held_out), "validation has no part in it"


def test_small_strips_are_enlarged() -> None:
    batch = Photographs("validation", 256).batch(0, 17)
    assert batch["image"].shape == (17, 3, 256, 256)


def test_bad_requests_are_named(train: Photographs) -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; choose one of train, validation"):
        Photographs("test")
    with pytest.raises(ValueError, match="resolution 0"):
        Photographs("train", 0)
    with pytest.raises(ValueError, match="batch_size 0"):
        train.batch(0, 0)
    with pytest.raises(ValueError, match="step -1"):
        train.batch(-1, 4)


def test_a_missing_photograph_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    photographs._read.cache_clear()
    monkeypatch.setattr(photographs, "data_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"astronaut\.png is missing: reinstall scikit-image"):
        Photographs("train", 64)
