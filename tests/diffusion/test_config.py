from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from vfmvae.diffusion import SIZES, TransformerConfig
from vfmvae.serialization import from_dict, to_json


def test_the_defaults_are_sit_xl_on_a_16_x_16_latent() -> None:
    config = TransformerConfig()
    assert {name: getattr(config, name) for name in SIZES["XL"]} == SIZES["XL"]
    assert (config.grid, config.tokens) == (16, 256)
    assert TransformerConfig(class_token_width=1024, latent_size=32, patch=2).tokens == 257


def test_survives_json() -> None:
    config = TransformerConfig(alignment_widths=(768, 1024), class_token_width=768, norm="rms")
    assert from_dict(TransformerConfig, json.loads(to_json(config)), "c") == config
    assert from_dict(TransformerConfig, asdict(config), "c") == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"latent_size": 15, "patch": 2}, "model.latent_size 15 cannot be divided by patches of 2"),
        ({"width": 100}, "model.width 100 cannot be divided by 16 heads"),
        ({"width": 30, "heads": 3}, "model.width 30 cannot be divided by four"),
        ({"width": 24, "heads": 4, "rope": True}, "4 must divide the heads' width 6"),
        ({"mlp_ratio": 0.0}, "model.mlp_ratio is 0.0; it must be above 0"),
        ({"class_token_width": 0}, "model.class_token_width is 0"),
        ({"alignment_widths": (0,)}, "each entry must be at least 1"),
        (
            {"alignment_widths": (768,), "alignment_depth": 29},
            "alignment_depth 29 is more than model.depth 28",
        ),
        (
            {"class_token_width": 8, "projector": "conv", "alignment_widths": (8,)},
            "'conv' looks at a token's neighbours",
        ),
        ({"depth": 0}, "model.depth is 0; it must be at least 1"),
        ({"norm": "batch"}, 'model.norm is "batch"; needed is one of layer, rms'),
        ({"published_time": 1}, "model.published_time is 1"),
    ],
)
def test_values_that_a_model_cannot_have(given: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        TransformerConfig(**given)
    assert words in str(error.value)
