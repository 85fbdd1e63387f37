"""Drawn scenes: classes that need shape and pattern, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from vfmvae.data import Scenes
from vfmvae.data.scenes import CLASSES
from vfmvae.data.transforms import CropConfig


def test_side_is_a_limit_of_the_same_scene() -> None:
    source = Scenes("train", 64)
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
