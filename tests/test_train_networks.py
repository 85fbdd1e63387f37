"""A run's networks: what its encoder computes in; float8, which files and resumed runs do not know of."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import vfmvae.train_networks
from tests.tiny_runs import job, largest_difference, tiny
from tests.whole_runs import CHEAP, assert_same_run, cheap, run, state, weights
from vfmvae.encoders.base import resolve_layers
from vfmvae.encoders.fp8 import Fp8Linear, use_fp8
from vfmvae.train_job import Job
from vfmvae.train_memory import MetaRun
from vfmvae.training.checkpoint_folder import checkpoints
from vfmvae.training.engine import EngineConfig

FP8 = EngineConfig(fp8_encoder=True)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vfmvae.train_networks, "use_fp8", functools.partial(use_fp8, emulate=True))


def test_a_device_without_float8_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="encoder mini cannot compute in float8: cpu has no units"):
        Job(tiny(engine=FP8, device="cpu"))


def test_the_encoder_of_a_job_multiplies_in_float8(emulated: None) -> None:
    plain, found = job(CHEAP), job(CHEAP, fp8_encoder=True)
    layers = [m for m in found.tokenizer.encoder.modules() if isinstance(m, Fp8Linear)]
    assert len(layers) == 4 * found.tokenizer.encoder.depth
    others = [m for m in found.tokenizer.modules() if isinstance(m, Fp8Linear)]
    assert len(others) == len(layers), "only the encoder's"
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    for ours, theirs in zip(found.tokenizer.features(images), plain.tokenizer.features(images), strict=True):
        assert 0 <= (ours - theirs).norm() / theirs.norm() < 0.15
    assert not torch.equal(found.tokenizer.features(images)[-1], plain.tokenizer.features(images)[-1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_encoder_of_a_bf16_run_is_in_bf16_on_a_cpu_too(dtype: Any) -> None:
    tokenizer = Job(tiny(dtype=dtype, device="cpu")).tokenizer
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    found = tokenizer.features(images)
    encoder = tokenizer.encoder
    positions = resolve_layers(encoder.config.layers, encoder.depth)
    for half in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs, _ = encoder.tokens(encoder.prepare(images), set(positions))
        same = [torch.equal(layer, outputs[at].float()) for layer, at in zip(found, positions, strict=True)]
        assert all(same) == (half == (dtype == "bf16"))


def test_resuming_gives_the_same_run_and_files_hold_the_weights_as_they_were(
    emulated: None, tmp_path: Path
) -> None:
    config = cheap(engine=FP8, checkpoint_every=2)
    printed = run(config, tmp_path / "whole")
    assert "engine.fp8_encoder" in printed
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(checkpoints(tmp_path / "resumed" / "checkpoints")[-1])
    assert "from step 2\n" in run(config, tmp_path / "resumed")
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert not any(".encoder." in name for name in state(tmp_path / "whole") if "tokenizer" in name)
    run(cheap(), tmp_path / "plain")
    ours, plain = weights(tmp_path / "whole"), weights(tmp_path / "plain")
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[n], t) for n, t in plain.items() if n.startswith("encoder."))
    assert largest_difference(ours, plain) > 0


def test_the_estimate_counts_a_byte_of_each_number() -> None:
    fixed = {on: MetaRun(tiny(engine=EngineConfig(fp8_encoder=on)))._fixed(0) for on in (False, True)}
    run_ = MetaRun(tiny())
    numbers = sum(p.numel() for b in run_.tokenizer.encoder.blocks for p in b.parameters())
    assert fixed[True] - fixed[False] == numbers > 100_000
