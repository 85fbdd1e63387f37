"""Qwen2.5-VL's vision tower against transformers' own forward, whose tokens come in window order."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from vfmvae.encoders import EncoderConfig, ViTConfig, build_encoder

pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")

# Of every two blocks the first attends within windows of 8 x 8 patches, the second to the whole image.
TINY = ViTConfig(width=32, depth=8, heads=2, patch_size=14, image_size=56, mlp_width=40)
NAME = "qwen2.5-vl-3b"


def theirs_packed(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] as that library wants them: groups of 2 x 2 patches, two equal frames."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // 28, width // 28
    frames = pixels[:, None].expand(-1, 2, -1, -1, -1)
    frames = frames.reshape(batch, 2, channels, rows, 2, 14, columns, 2, 14)
    return frames.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(batch * rows * columns * 4, -1)


def raster(packed: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """Tokens in groups of 2 x 2 -> [B, N, C] in raster order."""
    return packed.view(batch, rows // 2, columns // 2, 2, 2, -1).transpose(2, 3).flatten(1, 4)


@pytest.fixture
def model() -> torch.nn.Module:
    configuration = modeling.Qwen2_5_VLVisionConfig(
        hidden_size=32,
        depth=8,
        num_heads=2,
        intermediate_size=40,
        out_hidden_size=24,
        fullatt_block_indexes=[1, 3, 5, 7],
    )
    model = modeling.Qwen2_5_VisionTransformerPretrainedModel(configuration).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(0.5).add_(noise * 0.2 / parameter[0].numel() ** 0.5)
    return model


@pytest.mark.parametrize(
    ("height", "width"), [(112, 224), (168, 140), (28, 280)]
)  # whole, cut and thin windows
def test_equals_transformers(model: torch.nn.Module, height: int, width: int) -> None:
    layers = (*range(9), -1)
    encoder = build_encoder(EncoderConfig(NAME, layers, 1.0, vit=TINY), model.state_dict())
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows, columns = height // 14, width // 14

    embedded: list[Tensor] = []
    hidden: list[Tensor] = []
    model.patch_embed.register_forward_hook(lambda _, __, out: embedded.append(out))
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: hidden.append(out))
    model.merger.ln_q.register_forward_hook(lambda _, __, out: hidden.append(out))
    with torch.no_grad():
        model(theirs_packed(encoder.prepare(images)), grid_thw=torch.tensor([[1, rows, columns]] * 2))
    # The window order, found by looking where each embedded patch went.
    went_to = (embedded[0][:, None] == hidden[0][None]).all(dim=-1).float().argmax(dim=1)

    features = encoder(images)
    assert features.grid == (rows, columns)
    for ours, theirs in zip(features.layers, hidden, strict=True):
        expected = raster(theirs[went_to], 2, rows, columns)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.pooled, expected.mean(dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_the_tower_within_the_whole_model(model: torch.nn.Module, prefix: str) -> None:
    state = {prefix + name: value for name, value in model.state_dict().items()}
    state |= {
        "model.language_model.embed_tokens.weight": torch.zeros(2, 2),
        "lm_head.weight": torch.zeros(2, 2),
    }
    encoder = build_encoder(EncoderConfig(NAME, (-1,), 1.0, vit=TINY), state)
    assert torch.equal(encoder.tower.blocks[7].mlp.up_proj.weight, model.blocks[7].mlp.up_proj.weight)
    again = build_encoder(EncoderConfig(NAME, (-1,), 1.0, vit=TINY), encoder.state_dict())
    assert torch.equal(again.tower.merger.ln_q.weight, model.merger.ln_q.weight)
    del state[prefix + "blocks.3.attn.proj.bias"]
    with pytest.raises(ValueError, match="missing: blocks.3.attn.proj.bias"):
        build_encoder(EncoderConfig(NAME, (-1,), 1.0, vit=TINY), state)


def test_images_hold_whole_groups_of_patches() -> None:
    encoder = build_encoder(EncoderConfig(NAME, (-1,), 1.0, vit=TINY), weights=None)
    assert encoder.image_multiple == 28
    with pytest.raises(ValueError, match="multiples of 28"):
        encoder(torch.zeros(1, 3, 42, 56))


def test_without_transformers_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'need the package transformers: pip install "vfmvae\[qwen\]"'):
        build_encoder(EncoderConfig(NAME, (-1,), 1.0), weights=None)
