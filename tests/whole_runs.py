"""Whole runs of seconds: a folder from a configuration, and what two folders have in common."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from tests.tiny_runs import ALL_LOSSES, stage, tiny
from vfmvae.config import TrainConfig
from vfmvae.discriminators import PatchDiscriminator
from vfmvae.training.checkpoint_folder import checkpoints, step_of
from vfmvae.training.ema import EmaConfig
from vfmvae.training.rates import PartRate
from vfmvae.training.run_folder import RunFolder
from vfmvae.training.stages import LossWeights, StageConfig
from vfmvae.weights import read_safetensors

EVERYTHING = ("encoder", "fusion", "bottleneck", "align", "decompress", "style", "decoder")
DECODER = ("decompress", "style", "decoder")
CHEAP = LossWeights(alignment=0.5)
TIMES = {"images_per_second", "interval_s", "peak_memory_gib"}


def align_tok(images: int = 6) -> tuple[StageConfig, ...]:
    """The stages of AlignTok (arXiv 2509.25162): an adapter and a decoder behind a frozen encoder; all of it,
    the latents kept near to what they were; the decoder alone.

    Its reconstruction loss is L1, LPIPS and an adversarial loss with an adaptive weight, without KL. The
    encoder is pretrained, so that its rate is lower; the average of the weights begins with it.
    """
    losses = LossWeights(
        multiscale_l1=0.0, perceptual=1.0, kl=0.0, alignment=0.0, adversarial=1.0, adaptive_adversarial=True
    )
    behind = ("fusion", "bottleneck", "decompress", "style", "decoder")
    align = stage(losses, name="align", images=images, trains=behind, ema=EmaConfig(half_life_images=0))
    whole = replace(
        align,
        name="whole",
        trains=("encoder", *behind),
        losses=replace(losses, preservation=1.0),
        rates=(PartRate("encoder", 0.1),),
        ema=EmaConfig(half_life_images=4, ramp_up=None),
    )
    return align, whole, replace(align, name="decoder", trains=DECODER)


def three_stages(losses: LossWeights = ALL_LOSSES, images: int = 4) -> tuple[StageConfig, ...]:
    """Behind a frozen encoder; all of it, kept near to what it was; the decoder alone."""
    return (
        stage(losses, name="behind", images=images),
        stage(replace(losses, preservation=1.0), name="whole", images=images, trains=EVERYTHING),
        stage(replace(losses, alignment=0.0, kl=0.0), name="decoder", images=images, trains=DECODER),
    )


@contextmanager
def small_parts() -> Iterator[None]:
    """Few held-out images, and a PatchGAN that is not most of a checkpoint."""
    narrow = functools.partial(PatchDiscriminator, 4)
    with (
        mock.patch("vfmvae.training.evaluation.HELD_OUT_IMAGES", 9),
        mock.patch("vfmvae.train_networks.PatchDiscriminator", narrow),
    ):
        yield


def run(config: TrainConfig, path: Path) -> str:
    """Train in this process, or go on; returns what it printed."""
    # Its command line needs tyro, which a fresh GPU machine lacks; the other things here do not.
    from vfmvae.train import train

    output = io.StringIO()
    with small_parts():
        train(config, RunFolder(path), Console(file=output, width=200))
    return output.getvalue()


def cheap(**changes: Any) -> TrainConfig:
    """Steps of a few hundredths of a second: one stage, without perceptual and adversarial losses."""
    return tiny(**{"stages": (stage(CHEAP),), "steps": 4, **changes})


def lines(path: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one kind, without what depends on the clock."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found if line["kind"] == kind]


def weights(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path / "model.safetensors")


def saved_steps(path: Path) -> list[int]:
    return [step_of(checkpoint) for checkpoint in checkpoints(path / "checkpoints")]


def state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader, load

    newest = checkpoints(path / "checkpoints")[-1]
    reader = FileSystemReader(newest)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in stored.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_run(one: Path, other: Path) -> None:
    """Equal losses in every step, and bit for bit the same averaged weights and checkpoint."""
    for kind in ("train", "eval"):
        assert lines(one, kind) == lines(other, kind)
    for read in (weights, state):
        ours, theirs = read(one), read(other)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
