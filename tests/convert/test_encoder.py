"""Published names and Hugging Face configurations of encoders; families are checked by their features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vfmvae.convert.encoder import FAMILIES, resolve_encoder
from vfmvae.encoders import ENCODERS, EncoderConfig, build_encoder

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}
NO_MASK = {
    "mask_ratio": 0.0,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
FOUR_REGISTERS = {"num_register_tokens": 4, "intermediate_size": 48}
# The library's names of configuration and model, and what differs from SIZES.
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("SiglipVisionConfig", "SiglipVisionModel", {"intermediate_size": 48}),
    ("SiglipVisionConfig", "SiglipVisionModel", {"intermediate_size": 48, "image_size": 39}),
    ("CLIPVisionConfig", "CLIPVisionModel", {"intermediate_size": 48}),
    ("Dinov2Config", "Dinov2Model", {"mlp_ratio": 2}),
    ("Dinov2Config", "Dinov2Model", {"use_swiglu_ffn": True}),
    ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"mlp_ratio": 3}),
    ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"use_swiglu_ffn": True, "mlp_ratio": 2}),
    ("DINOv3ViTConfig", "DINOv3ViTModel", FOUR_REGISTERS),
    ("DINOv3ViTConfig", "DINOv3ViTModel", {**FOUR_REGISTERS, "use_gated_mlp": True, "hidden_act": "silu"}),
    ("ViTMAEConfig", "ViTMAEModel", {"intermediate_size": 48, **NO_MASK}),
]


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.mark.parametrize(("config_class", "model_class", "changes"), MODELS)
def test_a_configuration_gives_the_encoder_that_computes_the_models_features(
    config_class: str, model_class: str, changes: dict[str, Any]
) -> None:
    config = getattr(transformers, config_class)(**(SIZES | changes))
    model = randomise(getattr(transformers, model_class)(config))
    name, vit = resolve_encoder("some-tiny-model", config.to_dict())
    assert vit is not None and vit.image_size == 32
    encoder = build_encoder(EncoderConfig(name, (-1,), 1.0, vit=vit), model.state_dict())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        out = model(encoder.prepare(images))
    pooled = out.last_hidden_state[:, 0] if config_class == "ViTMAEConfig" else out.pooler_output
    torch.testing.assert_close(encoder(images).pooled, pooled, rtol=0, atol=2e-5)


def test_qwen_from_the_configuration_of_the_whole_model() -> None:
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    vision = {
        "depth": 8,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 40,
        "patch_size": 14,
        "fullatt_block_indexes": [1, 3, 5, 7],
    }
    model = modeling.Qwen2_5_VisionTransformerPretrainedModel(modeling.Qwen2_5_VLVisionConfig(**vision))
    for config in (
        {"model_type": "qwen2_5_vl", **vision},
        {"model_type": "qwen2_5_vl", "hidden_size": 99, "vision_config": vision},
        model.config.to_dict(),
    ):
        name, vit = resolve_encoder("Qwen/Qwen2.5-VL-7B-Instruct", config)
        build_encoder(EncoderConfig(name, (-1,), 1.0, vit=vit), model.state_dict())
    with pytest.raises(ValueError, match=r"fullatt_block_indexes \[0\]; .* supported with \[1, 3, 5, 7\]"):
        resolve_encoder("x", {"model_type": "qwen2_5_vl", **vision, "fullatt_block_indexes": [0]})


def test_siglip_so400m_states_pixels_that_fill_no_patch() -> None:
    so400m = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    name, vit = resolve_encoder("google/siglip2-so400m-patch14-384", so400m)
    with torch.device("meta"):
        stated = build_encoder(EncoderConfig(name, (-1,), vit=vit), weights=None)
        known = build_encoder(EncoderConfig("siglip2-so400m-patch14-384", (-1,)), weights=None)
    assert stated.state_dict().keys() == known.state_dict().keys()
    for key, value in known.state_dict().items():
        assert stated.state_dict()[key].shape == value.shape, key


@pytest.mark.parametrize(
    ("published", "name"),
    [
        ("google/siglip2-large-patch16-512", "siglip2-large-patch16-512"),
        ("google/siglip2-so400m-patch14-384", "siglip2-so400m-patch14-384"),
        ("google/siglip-base-patch16-256", "siglip-base-patch16-256"),
        ("timm/vit_large_patch16_siglip_512.v2_webli", "siglip2-large-patch16-512"),
        ("vit_so400m_patch14_siglip_378.v2_webli", "siglip2-so400m-patch14-384"),
        ("facebook/dinov2-large", "dinov2-large"),
        ("facebook/dinov2-with-registers-giant", "dinov2-with-registers-giant"),
        ("dinov2_vitl14", "dinov2-large"),
        ("dinov2_vitb14_reg", "dinov2-with-registers-base"),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", "dinov3-vitl16"),
        ("facebook/dinov3-vits16plus-pretrain-lvd1689m", "dinov3-vits16plus"),
        ("facebook/dinov3-vit7b16-pretrain-lvd1689m", "dinov3-vit7b16"),
        ("facebook/vit-mae-large", "mae-large"),
        ("vit_large_patch16_224.mae", "mae-large"),
        ("openai/clip-vit-large-patch14-336", "clip-vit-large-patch14-336"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b"),
        ("timm/eva02_large_patch14_clip_336.merged2b", "eva02-clip-large-patch14-336"),
        ("eva02_large_patch14_clip_336", "eva02-clip-large-patch14-336"),
        ("EVA02-CLIP-L-14-336", "eva02-clip-large-patch14-336"),
    ],
)
def test_published_spellings(published: str, name: str) -> None:
    assert resolve_encoder(published, None) == (name, None)
    wrapped = {"model_type": "timm_wrapper", "architecture": published}
    assert resolve_encoder("anything", wrapped) == (name, None)


def test_every_name_of_the_table_means_itself() -> None:
    assert {name: resolve_encoder(name, None)[0] for name in ENCODERS} == {name: name for name in ENCODERS}
    assert {family.name for family in FAMILIES.values()} <= ENCODERS.keys()


@pytest.mark.parametrize(
    "unknown",
    [
        "vit_large_patch16_siglip_256",  # SigLIP or SigLIP 2: only the tag tells
        "facebook/dinov3-vitl16-pretrain-sat493m",  # normalises its pixels otherwise
        "vit_tiny_patch16_224",
        "",
    ],
)
def test_unknown_names_list_the_known(unknown: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve_encoder(unknown, None)
    assert repr(unknown) in str(error.value)
    assert all(name in str(error.value) for name in ENCODERS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type None; supported are siglip, .*dinov3_vit, .*vit_mae, qwen2_5_vl"),
        (
            {"model_type": "vit_mae", "use_swiglu_ffn": True},
            "model_type 'vit_mae' with a gated MLP; supported",
        ),
        (
            {"model_type": "timm_wrapper", "architecture": "resnet50"},
            "architecture in vfm_config is 'resnet50'",
        ),
        ({"model_type": "dinov3_vit", "num_register_tokens": 0}, "num_register_tokens 0; dinov3_vit is supp"),
        ({"model_type": "clip_vision_model", "hidden_act": "gelu"}, "hidden_act 'gelu'; .*'quick_gelu'"),
        ({"model_type": "siglip2_vision_model", **SIZES, "image_size": None}, "lacks 'image_size'"),
        (
            {"model_type": "clip", **SIZES, "hidden_size": "big"},
            "hidden_size 'big'; needed is a whole number",
        ),
        ({"model_type": "clip", **SIZES}, "lacks 'intermediate_size'"),
        ({"model_type": "siglip", "vision_config": 3}, "needed is the encoder's configuration, a mapping"),
    ],
)
def test_configurations_that_cannot_be_followed(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_encoder("siglip2-large-patch16-512", config)
