"""The run's configuration: what it refuses, and what a resumed run may change."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from vfmvae.config import LossConfig, TrainConfig, check_same_run, read_config
from vfmvae.recipes import demo
from vfmvae.serialization import to_json
from vfmvae.training.optim import OptimizerConfig


def test_reading_a_written_config_gives_an_equal_one(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    config = replace(demo(), data="/images", seed=7, fused=True, dtype="bf16")
    file.write_text(to_json(config))
    assert read_config(file) == config


def test_the_error_names_the_file_and_the_valid_fields(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"optimizer": {"momentum": 0.9}}')
    message = r"config\.json: unknown field 'momentum' in optimizer; valid fields: learning_rate, betas"
    with pytest.raises(ValueError, match=message):
        read_config(file)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "batch_size is 0; it must be at least 1"),
        ("steps", 0, "steps is 0; it must be at least 1"),
        ("log_every", 0, "log_every is 0; it must be at least 1"),
        ("checkpoint_every", -1, "checkpoint_every is -1; it must be at least 0"),
        ("seed", -1, "seed is -1; it must be at least 0"),
        ("dtype", "fp8", "dtype is 'fp8'; it must be auto, fp32 or bf16"),
    ],
)
def test_bad_values_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TrainConfig(), **{field: value})


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_loss_weights_are_finite_and_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match=f"losses.kl is {value}"):
        LossConfig(kl=value)


def test_something_must_ask_for_a_reconstruction() -> None:
    with pytest.raises(ValueError, match="losses.l1 and losses.multiscale_l1 are both 0"):
        LossConfig(l1=0, multiscale_l1=0)


def test_alignment_needs_the_last_layer() -> None:
    tokenizer = replace(demo().tokenizer, encoder=replace(demo().tokenizer.encoder, layers=(0, 1, 3)))
    with pytest.raises(ValueError, match=r"layers \(0, 1, 3\) lacks -1"):
        replace(demo(), tokenizer=tokenizer)
    assert replace(demo(), tokenizer=tokenizer, losses=LossConfig(alignment=0)).losses.alignment == 0


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"warmup": 1.0},
        {"schedule": "linear"},
    ],
)
def test_bad_optimizer_values_are_refused(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=f"optimizer.{name} is "):
        OptimizerConfig(**values)  # type: ignore[arg-type]


def test_a_resumed_run_may_change_how_it_trains() -> None:
    config = demo()
    moved = replace(config.tokenizer, encoder=replace(config.tokenizer.encoder, weights="/elsewhere"))
    changed = replace(config, tokenizer=moved, steps=9, device="cpu", losses=LossConfig(kl=0), fused=True)
    check_same_run(changed, config)


def test_a_resumed_run_may_not_change_what_it_trains() -> None:
    config = demo()
    with pytest.raises(ValueError, match="cannot change its batch_size from 32 to 31"):
        check_same_run(replace(config, batch_size=31), replace(config, batch_size=32))
    with pytest.raises(ValueError, match="cannot change its seed from 0 to 1"):
        check_same_run(replace(config, seed=1), config)
    with pytest.raises(ValueError, match="cannot change its tokenizer; start a new run"):
        check_same_run(replace(config, tokenizer=replace(config.tokenizer, latent_channels=8)), config)
