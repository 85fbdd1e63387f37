"""A diffusion model saved and loaded, and every way in which its files may be wrong."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vfmvae
from tests import commands
from tests.diffusion.test_transformer import ALL, REG, inputs, outputs, randomised
from vfmvae.diffusion import DiffusionTransformer, TransformerConfig
from vfmvae.diffusion.files import load_transformer, save_transformer, tokenizer_hash_of
from vfmvae.tokenizer import Tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> tuple[DiffusionTransformer, Path]:
    model = randomised(REG, fused=True).eval()
    model.latents_mean.copy_(torch.randn(REG.channels))
    model.latents_std.copy_(torch.rand(REG.channels) + 0.5)
    save_transformer(model, tmp_path / "model", tokenizer="cafe")
    return model, tmp_path / "model"


@torch.no_grad()
def test_a_saved_model_loads_to_the_same_numbers(saved: tuple[DiffusionTransformer, Path]) -> None:
    model, path = saved
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    for load in (vfmvae.load, load_transformer):
        loaded = load(path)
        assert isinstance(loaded, DiffusionTransformer)
        assert loaded.config == model.config and not loaded.training and loaded.fused
        for ours, theirs in zip(outputs(loaded, inputs(REG)), outputs(model, inputs(REG)), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(loaded.latents_mean, model.latents_mean)
        assert torch.equal(loaded.latents_std, model.latents_std)
    assert not vfmvae.load(str(path), fused=False).fused
    assert tokenizer_hash_of(path) == "cafe"


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@torch.no_grad()
def test_every_variant_survives(tmp_path: Path, config: TransformerConfig) -> None:
    model = randomised(config)
    save_transformer(model, tmp_path)
    loaded = load_transformer(tmp_path)
    for ours, theirs in zip(outputs(loaded, inputs(config)), outputs(model, inputs(config)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    assert tokenizer_hash_of(tmp_path) is None


def test_a_training_runs_config_is_read_too(saved: tuple[DiffusionTransformer, Path]) -> None:
    model, path = saved
    (path / "config.json").write_text(json.dumps({"diffusion": asdict(model.config), "steps": 5}))
    assert vfmvae.load(path).config == model.config


def test_a_tokenizer_is_still_a_tokenizer(tmp_path: Path) -> None:
    folder = commands.save_tiny(tmp_path / "tokenizer")
    assert isinstance(vfmvae.load(folder), Tokenizer)
    with pytest.raises(ValueError, match=r"config.json describes no diffusion model .*'diffusion'"):
        load_transformer(folder)


def test_saving_again_replaces_both_files(saved: tuple[DiffusionTransformer, Path]) -> None:
    model, path = saved
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(3.0)
    save_transformer(model, path)
    assert load_transformer(path).final_layer.linear.bias.eq(3.0).all()
    assert len(list(path.iterdir())) == 2 and tokenizer_hash_of(path) is None


def test_a_newer_format_is_refused(saved: tuple[DiffusionTransformer, Path]) -> None:
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    assert config["format"] == 1
    (path / "config.json").write_text(json.dumps(config | {"format": 2}))
    with pytest.raises(
        ValueError, match=r"config.json has format 2.* reads formats up to 1: install a newer"
    ):
        vfmvae.load(path)


def test_damaged_files_are_named(saved: tuple[DiffusionTransformer, Path]) -> None:
    _, path = saved
    weights, config = path / "model.safetensors", path / "config.json"
    whole, described = weights.read_bytes(), config.read_text()
    for length in (0, 5, 500, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=rf"model.safetensors \({length} bytes\) is truncated or damaged"
        ):
            vfmvae.load(path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors does not exist"):
        vfmvae.load(path)
    weights.write_bytes(whole)
    config.write_text(described[:-20])
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        vfmvae.load(path)
    config.unlink()
    with pytest.raises(ValueError, match=r"holds no config.json: it is no saved model"):
        vfmvae.load(path)


def test_parameters_that_do_not_fit_are_named(saved: tuple[DiffusionTransformer, Path]) -> None:
    _, path = saved
    state = load_file(path / "model.safetensors")
    bias = state.pop("final_layer.linear.bias")
    for change, message in (
        ({}, "missing final_layer.linear.bias; unexpected none"),
        ({"final_layer.linear.bias": bias, "extra": bias.clone()}, "missing none; unexpected extra"),
        ({"final_layer.linear.bias": bias[:1]}, r"wrong shapes: final_layer.linear.bias \(1,\) instead of"),
    ):
        save_file(state | change, path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            vfmvae.load(path)


def test_an_unknown_option_is_named(saved: tuple[DiffusionTransformer, Path]) -> None:
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    config["diffusion"]["experts"] = 8
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: unknown field 'experts'; valid fields: latent_size"):
        vfmvae.load(path)
