"""Drawn scenes: an image by its number alone, labels that need shape and pattern, pictures that show them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vfmvae.data import ImageLoader, ImageSource, Scenes, open_data, validation_batches
from vfmvae.data.ordered import open_in_order
from vfmvae.data.scenes import CLASSES, PATTERNS, SHAPES, VALIDATION_IMAGES, outline
from vfmvae.data.transforms import CropConfig


@pytest.mark.parametrize("resolution", [32, 50, 256])
def test_batches(resolution: int) -> None:
    source: ImageSource = Scenes("train", resolution)
    batch = source.batch(3, 8)
    assert batch["image"].shape == (8, 3, resolution, resolution) and batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["label"].dtype == torch.int64 and batch["number"] == list(range(24, 32))
    for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
        assert key.startswith(source.classes[label] + "/train "), f"{key} is labelled {label}"


def test_an_image_depends_on_seed_split_and_number_alone() -> None:
    train = Scenes("train", 32, seed=3)
    whole = train.batch(0, 13)["image"]
    assert torch.equal(
        torch.cat([Scenes("train", 32, seed=3).batch(n, 1)["image"] for n in range(13)]), whole
    )
    assert torch.equal(train.read([12, 0, 5])["image"], whole[[12, 0, 5]])
    others = [Scenes("train", 32, seed=4), Scenes("validation", 32, seed=3)]
    assert not any(torch.equal(image, whole) for image in (s.batch(0, 13)["image"] for s in others))
    assert len({image.numpy().tobytes() for image in train.batch(0, 500)["image"]}) == 500


def test_validation_is_one_list_in_rounds_over_the_classes() -> None:
    held_out = Scenes("validation", 32)
    batches = list(validation_batches(held_out, 128))
    labels = torch.cat([batch["label"] for batch in batches])
    assert len(held_out) == len(labels) == VALIDATION_IMAGES
    assert torch.equal(labels, torch.arange(VALIDATION_IMAGES) % len(CLASSES))
    other = Scenes("validation", 32, seed=8).batch(1, 128, CropConfig(side=(1.0, 1.0)))
    assert torch.equal(batches[1]["image"], other["image"]), "neither seed nor crops change it"
    with pytest.raises(ValueError, match="beyond the 600 validation images"):
        held_out.batch(6, 128)


def test_training_draws_every_class_alike() -> None:
    labels = Scenes("train", 32).batch(0, 3000)["label"]
    counts = labels.bincount(minlength=len(CLASSES))
    assert (
        len(counts) == len(CLASSES) == len(SHAPES) * len(PATTERNS) and 130 < counts.min() < counts.max() < 270
    )


def test_the_outlines_are_what_their_names_say() -> None:
    axis = (np.arange(400, dtype=np.float32) + 0.5) / 200 - 1
    u, v = (np.broadcast_to(g, (1, 400, 400)) for g in (axis[None, None, :], axis[None, :, None]))
    radius, cell = np.sqrt(u**2 + v**2), 1 / 200**2
    areas = {"disc": np.pi * 0.85**2, "square": 1.4**2, "triangle": 3 * np.sqrt(3) * 0.25}
    areas |= {"ring": np.pi * (0.9**2 - 0.42**2), "star": 5 * 0.42 * np.sin(np.pi / 5)}
    for number, name in enumerate(SHAPES):
        distance = outline(np.array([number * len(PATTERNS)]), u, v)
        assert (distance < 0).sum() * cell == pytest.approx(areas[name], rel=0.01), name
        assert radius[distance < 0].max() <= 1.0 and (distance[0, 200, 200] < 0) == (name != "ring")
        # Beside an outline its value is a distance: it grows by one per length.
        across, down = np.gradient(distance[0], 1 / 200)
        steepness = np.sqrt(across**2 + down**2)[np.abs(distance[0]) < 0.05]
        assert np.quantile(np.abs(steepness - 1), 0.9) < 0.02, name


def test_flip_and_side_are_limits_of_the_same_scene() -> None:
    source = Scenes("train", 64)
    plain, mirrored = (source.batch(0, 32, CropConfig((0.7, 0.7), flip))["image"] for flip in (0.0, 1.0))
    assert torch.equal(mirrored, plain.flip(3))
    massive = [number for number, label in enumerate(source.batch(0, 64)["label"]) if label < 6]
    near, nearer = (source.read(massive, CropConfig((side, side)))["image"].int() for side in (0.3, 0.1))
    middle = (near - nearer)[:, :, 24:40, 24:40]
    assert len(massive) > 10 and not middle.any(), "a disc or square that fills the image grows no more"
    assert torch.equal(source.batch(0, 32)["label"], source.batch(0, 32, CropConfig((0.7, 0.7)))["label"])


def test_a_higher_resolution_shows_the_same_scene() -> None:
    small, large = (Scenes("train", r).batch(0, 64)["image"].float() for r in (32, 128))
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - shrunk).abs().mean() < 4 and (small - small.roll(1, 0)).abs().mean() > 30


def linear_accuracy(features: Tensor, labels: Tensor, train: int) -> float:
    features = torch.cat([features.double(), torch.ones(len(features), 1).double()], dim=1)
    one_hot = torch.nn.functional.one_hot(labels, len(CLASSES)).double()
    x, y = features[:train], one_hot[:train]
    weight = torch.linalg.solve(x.t() @ x + 1e-3 * torch.eye(x.shape[1]).double(), x.t() @ y)
    return ((features[train:] @ weight).argmax(dim=1) == labels[train:]).double().mean().item()


def test_colour_does_not_tell_the_class() -> None:
    batch = Scenes("train", 32).batch(0, 3000)
    pixels = batch["image"].double().flatten(2) / 255
    colour = torch.cat([pixels.mean(dim=2), pixels.std(dim=2), pixels.quantile(0.5, dim=2)], dim=1)
    assert linear_accuracy(colour, batch["label"], 2500) < 2.5 / len(CLASSES)


def test_the_name_scenes_opens_them_for_training_and_in_order() -> None:
    source = open_data("scenes", "train", 48, seed=2)
    assert isinstance(source, Scenes) and (source.seed, source.resolution) == (2, 48)
    loader = iter(ImageLoader(source, batch_size=4))
    assert torch.equal(next(loader)["image"], source.batch(0, 4)["image"])
    ordered = open_in_order("scenes", "train", 48, images=10, seed=2)
    assert len(ordered) == 10 and ordered.names()[3] == "train/000003" and ordered.classes == CLASSES
    assert torch.equal(ordered.read(3, 99)["image"], source.batch(0, 10)["image"][3:])
    assert len(open_in_order("scenes", "validation", 48)) == VALIDATION_IMAGES
    with pytest.raises(ValueError, match="scenes are without an end: choose part train or validation"):
        open_in_order("scenes", "all", 48)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="resolution 16: scenes are drawn at 32 to 256 pixels"):
        Scenes("train", 16)
    with pytest.raises(ValueError, match="seed -1"):
        Scenes("train", 32, -1)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        Scenes("test")
