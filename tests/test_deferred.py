"""Modules built without values and filled from a state dict: the same modules, nothing of them made up."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vfmvae
from tests.tokenizer.tiny import DISCRETE, tiny_config
from vfmvae.deferred import fill, without_parameters
from vfmvae.encoders import ENCODERS, EncoderConfig, ViTConfig, build_encoder
from vfmvae.tokenizer import Tokenizer, TokenizerConfig

VIT = ViTConfig(width=32, depth=4, heads=2, patch_size=14, image_size=56, mlp_width=48)
# One of each family, for each has buffers of its own.
NAMES = list({entry.family: name for name, entry in ENCODERS.items()}.values())


def randomised(module: nn.Module) -> dict[str, Tensor]:
    """A state dict in which no tensor has a value that initialisation gives."""
    return {name: torch.rand_like(value) + 0.5 for name, value in module.state_dict().items()}


def outside_the_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.named_buffers() if name not in module.state_dict()}


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_from_weights_is_the_one_that_is_built_and_then_loaded(name: str) -> None:
    if name.startswith("qwen"):
        pytest.importorskip("transformers")
    config = EncoderConfig(name, (0, -1), 1.0, vit=VIT)
    usual = build_encoder(config, weights=None)
    state = randomised(usual)
    usual.load_state_dict(state)
    encoder = build_encoder(config, state)
    assert encoder.state_dict().keys() == state.keys()
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, state[key]) and value.data_ptr() != state[key].data_ptr(), key
    assert outside_the_state(encoder).keys() == outside_the_state(usual).keys()
    for key, value in outside_the_state(encoder).items():
        torch.testing.assert_close(value, outside_the_state(usual)[key], rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in encoder.parameters()) and not encoder.training
    images = torch.rand(1, 3, 112, 56) * 2 - 1
    assert torch.equal(encoder(images).layers[1], usual(images).layers[1])


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_config(bottleneck=DISCRETE), tiny_config(decoder={"noise": True})]
)
def test_every_tensor_of_a_loaded_tokenizer_comes_from_the_file(
    config: TokenizerConfig, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(config, encoder_weights=None).eval()
    state = randomised(tokenizer)
    tokenizer.load_state_dict(state)
    tokenizer.save(tmp_path)
    loaded = vfmvae.load(tmp_path)
    assert loaded.state_dict().keys() == state.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    trained = {name: parameter.requires_grad for name, parameter in tokenizer.named_parameters()}
    assert trained == {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}
    latents = torch.randn(1, 8, 4, 4)
    assert torch.equal(loaded.decode(latents), tokenizer.decode(latents))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.tied = self.frozen
        self.register_parameter("absent", None)
        self.register_buffer("frequencies", torch.arange(3.0), persistent=False)
        self.register_buffer("average", torch.zeros(2))


def test_values_are_copied_in_the_modules_own_dtype_and_order() -> None:
    with without_parameters():
        toy = Toy()
    assert all(parameter.is_meta for parameter in toy.parameters())
    assert torch.equal(toy.frequencies, torch.arange(3.0))
    weight = torch.arange(6.0).view(3, 2).t().half()
    one = torch.ones(2)
    fill(
        toy, {"linear.weight": weight, "linear.bias": one, "frozen": one, "tied": one, "average": one}, "cpu"
    )
    assert toy.linear.weight.dtype == torch.float32 and toy.linear.weight.is_contiguous()
    assert torch.equal(toy.linear.weight, weight.float())
    assert toy.linear.weight.requires_grad and not toy.frozen.requires_grad
    one.zero_()
    assert toy.linear.bias.sum() == toy.average.sum() == 2


def test_an_incomplete_state_fills_nothing() -> None:
    with without_parameters():
        toy = Toy()
    with pytest.raises(AssertionError, match="linear.bias"):
        fill(toy, {name: torch.ones(2) for name in ("linear.weight", "frozen", "tied", "average")}, "cpu")
    assert toy.linear.weight.is_meta


def test_only_modules_of_this_thread_built_inside_are_concerned() -> None:
    elsewhere: list[nn.Module] = []
    with pytest.raises(KeyError), without_parameters():
        thread = threading.Thread(target=lambda: elsewhere.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        raise KeyError
    assert not elsewhere[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta
