"""Drawn images: each by its number alone, outlines that are what their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vfmvae.data import ImageLoader, ImageSource, Scenes, Shapes, open_data, validation_batches
from vfmvae.data.drawn import Drawn
from vfmvae.data.ordered import open_in_order
from vfmvae.data.outlines import OUTLINES, distances
from vfmvae.data.transforms import CropConfig

drawn = pytest.mark.parametrize("kind", [Scenes, Shapes])


@pytest.mark.parametrize("kind, resolution", [(Scenes, 32), (Scenes, 50), (Shapes, 16), (Shapes, 256)])
def test_batches(kind: type[Drawn], resolution: int) -> None:
    source: ImageSource = kind("train", resolution)
    batch = source.batch(3, 8)
    assert batch["image"].shape == (8, 3, resolution, resolution) and batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["label"].dtype == torch.int64 and batch["number"] == list(range(24, 32))
    for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
        assert key.startswith(source.classes[label] + "/train "), f"{key} is labelled {label}"


@drawn
def test_an_image_depends_on_seed_split_and_number_alone(kind: type[Drawn]) -> None:
    train = kind("train", 32, seed=3)
    whole = train.batch(0, 13)["image"]
    assert torch.equal(torch.cat([kind("train", 32, seed=3).batch(n, 1)["image"] for n in range(13)]), whole)
    assert torch.equal(train.read([12, 0, 5])["image"], whole[[12, 0, 5]])
    others = [kind("train", 32, seed=4), kind("validation", 32, seed=3)]
    assert not any(torch.equal(image, whole) for image in (s.batch(0, 13)["image"] for s in others))
    assert len({image.numpy().tobytes() for image in train.batch(0, 500)["image"]}) == 500


@drawn
def test_validation_is_one_list_in_rounds_over_the_classes(kind: type[Drawn]) -> None:
    held_out = kind("validation", 32)
    batches = list(validation_batches(held_out, 128))
    labels = torch.cat([batch["label"] for batch in batches])
    assert len(held_out) == len(labels) == 40 * len(kind.classes)
    assert torch.equal(labels, torch.arange(len(labels)) % len(kind.classes))
    other = kind("validation", 32, seed=8).batch(1, 128, CropConfig(side=(1.0, 1.0)))
    assert torch.equal(batches[1]["image"], other["image"]), "neither seed nor crops change it"
    with pytest.raises(ValueError, match=f"beyond the {len(labels)} validation images"):
        held_out.batch(6, 128)


@drawn
def test_training_draws_every_class_alike(kind: type[Drawn]) -> None:
    counts = kind("train", 32).batch(0, 3000)["label"].bincount(minlength=len(kind.classes))
    expected = 3000 / len(kind.classes)
    assert len(counts) == len(kind.classes)
    assert (counts - expected).abs().max() < 5 * expected**0.5, "within five deviations"


@drawn
def test_flip_mirrors_and_a_smaller_side_shows_larger_ones(kind: type[Drawn]) -> None:
    source = kind("train", 64)
    plain, mirrored = (source.batch(0, 32, CropConfig((0.7, 0.7), flip))["image"] for flip in (0.0, 1.0))
    assert torch.equal(mirrored, plain.flip(3)) and not torch.equal(mirrored, plain)
    near, far = (source.batch(0, 32, CropConfig((side, side)))["image"] for side in (0.7, 1.0))
    assert not torch.equal(near, far)


def test_a_shape_is_bright_on_a_dark_ground_and_as_large_as_its_side_says() -> None:
    source = Shapes("train", 64)
    areas = {}
    for side in (1.0, 0.8):
        images = source.batch(0, 200, CropConfig((side, side), flip=0.0))["image"].float().amax(dim=1) / 255
        corners = torch.stack([images[:, 0, 0], images[:, 0, -1], images[:, -1, 0], images[:, -1, -1]])
        assert corners.max() < 0.5 < images.amax(dim=(1, 2)).min(), "a shape keeps away from the corners"
        ground, colour = corners.mean(dim=0)[:, None, None], images.amax(dim=(1, 2), keepdim=True)
        areas[side] = ((images - ground) / (colour - ground)).mean(dim=(1, 2))
    discs = source.batch(0, 200)["label"] == Shapes.classes.index("disc")
    assert areas[1.0][discs].mean().item() == pytest.approx(np.pi * (0.85 * 0.3) ** 2, rel=0.02)
    ratio = areas[0.8] / areas[1.0]
    assert (ratio - 1 / 0.8**2).abs().max() < 0.1


def test_the_outlines_are_what_their_names_say() -> None:
    axis = (np.arange(400, dtype=np.float32) + 0.5) / 200 - 1
    u, v = (np.broadcast_to(g, (1, 400, 400)) for g in (axis[None, None, :], axis[None, :, None]))
    radius, cell = np.sqrt(u**2 + v**2), 1 / 200**2
    areas = {"disc": np.pi * 0.85**2, "square": 1.4**2, "triangle": 3 * np.sqrt(3) * 0.25}
    areas |= {"ring": np.pi * (0.9**2 - 0.42**2), "star": 5 * 0.42 * np.sin(np.pi / 5)}
    areas |= {"diamond": 2 * 0.9**2, "cross": 2 * 1.7 * 0.56 - 0.56**2}
    areas |= {"heart": 2 * 0.62**2 + np.pi * 0.62**2 / 2}
    assert areas.keys() == OUTLINES.keys()
    for name, area in areas.items():
        distance = distances([name], u, v)
        assert (distance < 0).sum() * cell == pytest.approx(area, rel=0.01), name
        assert radius[distance < 0].max() <= 1.0 and (distance[0, 200, 200] < 0) == (name != "ring")
        assert np.allclose(distance, distance[..., ::-1], atol=1e-6), f"{name} is its own mirror image"
        # Beside an outline its value is a distance: it grows by one per length.
        across, down = np.gradient(distance[0], 1 / 200)
        steepness = np.sqrt(across**2 + down**2)[np.abs(distance[0]) < 0.05]
        assert np.quantile(np.abs(steepness - 1), 0.9) < 0.02, name


@drawn
def test_their_name_opens_them_for_training_and_in_order(kind: type[Drawn]) -> None:
    source = open_data(kind.name, "train", 48, seed=2)
    assert isinstance(source, kind) and (source.seed, source.resolution) == (2, 48)
    loader = iter(ImageLoader(source, batch_size=4))
    assert torch.equal(next(loader)["image"], source.batch(0, 4)["image"])
    ordered = open_in_order(kind.name, "train", 48, images=10, seed=2)
    assert len(ordered) == 10 and ordered.names()[3] == "train/000003" and ordered.classes == kind.classes
    assert torch.equal(ordered.read(3, 99)["image"], source.batch(0, 10)["image"][3:])
    assert len(open_in_order(kind.name, "validation", 48)) == 40 * len(kind.classes)
    with pytest.raises(ValueError, match=f"{kind.name} are without an end: choose part train or validation"):
        open_in_order(kind.name, "all", 48)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="resolution 16: scenes are drawn at 32 to 256 pixels"):
        Scenes("train", 16)
    with pytest.raises(ValueError, match="resolution 8: shapes are drawn at 16 to 256 pixels"):
        Shapes("train", 8)
    with pytest.raises(ValueError, match="seed -1"):
        Scenes("train", 32, -1)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        Shapes("test")
