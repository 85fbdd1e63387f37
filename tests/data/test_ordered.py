"""Lists of images in a fixed order: which ones, their labels and names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vfmvae.data import Photographs
from vfmvae.data.folder import list_images
from vfmvae.data.ordered import open_in_order


def save(path: Path, grey: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((70, 90, 3), grey, dtype=np.uint8)).save(path)


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for number, name in enumerate(("b/1.png", "a/2.png", "a/1.png")):
        save(tmp_path / name, 10 * number)
    source = open_in_order(str(tmp_path), "all", 64)
    assert source.names() == ["a/1.png", "a/2.png", "b/1.png"] and len(source) == 3
    batch = source.read(1, 99)
    assert batch["image"].shape == (2, 3, 64, 64)
    assert batch["image"][:, 0, 0, 0].tolist() == [10, 0]
    assert (batch["label"].tolist(), batch["key"]) == ([0, 1], ["a/2.png", "b/1.png"])
    assert open_in_order(str(tmp_path), "all", 64, images=2).names() == ["a/1.png", "a/2.png"]


def test_the_parts_are_the_splits_of_training_and_share_their_labels(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/c/2.png", "val/c/3.png"):
        save(tmp_path / name)
    parts = {part: open_in_order(str(tmp_path), part, 64) for part in ("train", "validation", "all")}
    assert parts["train"].names() == ["train/a/1.png", "train/c/2.png"]
    assert parts["validation"].names() == ["val/c/3.png"]
    assert parts["all"].names() == parts["train"].names() + parts["validation"].names()
    assert {source.classes for source in parts.values()} == {("a", "c")}
    assert parts["validation"].read(0, 1)["label"].tolist() == [1]


def test_one_image_is_enough_for_all(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    assert len(open_in_order(str(tmp_path), "all", 64)) == 1
    with pytest.raises(ValueError, match="training and validation need two"):
        open_in_order(str(tmp_path), "train", 64)


def test_photographs_are_the_crops_of_training_and_validation() -> None:
    source = open_in_order(None, "train", 64, images=5, seed=2)
    expected = Photographs("train", 64, 2).batch(0, 5)
    batch = source.read(0, 64)
    assert torch.equal(batch["image"], expected["image"]) and torch.equal(batch["label"], expected["label"])
    assert batch["key"] == source.names() == [f"train/{number:06d}" for number in range(5)]
    assert len(open_in_order(None, "validation", 64)) == len(Photographs("validation", 64))
    with pytest.raises(ValueError, match="choose part train or validation"):
        open_in_order(None, "all", 64)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images for all"):
        open_in_order(str(tmp_path), "all", 64)
    with pytest.raises(ValueError, match="absent does not exist"):
        open_in_order(str(tmp_path / "absent"), "all", 64)
    with pytest.raises(ValueError, match="images is 0"):
        open_in_order(str(tmp_path), "all", 64, images=0)
    (tmp_path / "broken.png").write_bytes(b"no image")
    batch = open_in_order(str(tmp_path), "all", 64).read(0, 1)
    assert batch["image"].shape == (0, 3, 64, 64) and [fault.key for fault in batch["faults"]] == [
        "broken.png"
    ]


def test_files_and_folders_are_listed_with_names(tmp_path: Path) -> None:
    save(tmp_path / "more/deep/2.jpg")
    save(tmp_path / "1.png")
    found = list_images([tmp_path / "1.png", tmp_path / "more"])
    assert found == [(tmp_path / "1.png", "1.png"), (tmp_path / "more/deep/2.jpg", "deep/2.jpg")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in .*empty"):
        list_images([tmp_path / "empty"])
    with pytest.raises(ValueError, match="image .*absent.png does not exist"):
        list_images([tmp_path / "absent.png"])
