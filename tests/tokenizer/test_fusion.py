from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.tokenizer.fusion import (
    AttentionProjection,
    FusionConfig,
    LatentFusion,
    LatentProjection,
    map_to_tokens,
    tokens_to_map,
    unshuffle_and_concatenate,
)


def by_hand(block: AttentionProjection, x: Tensor) -> Tensor:
    """One attention projection of tokens [N, in], written out head by head."""
    attention, heads = block.attention, block.attention.heads
    in_width, out_width = x.shape[1], attention.out_width
    inner = in_width if in_width > out_width else out_width
    width = inner // heads
    normed = F.layer_norm(x, (in_width,), block.norm_attention.weight, block.norm_attention.bias, 1e-5)
    qkv = normed @ attention.qkv.weight.t()
    query, key, value = qkv[:, :inner] + attention.q_bias, qkv[:, inner : 2 * inner], qkv[:, 2 * inner :]
    value = value + attention.v_bias
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = (query[:, part] @ key[:, part].t() / width**0.5).softmax(dim=1)
        outputs.append(weights @ value[:, part])
    joined = torch.stack(outputs).mean(dim=0) if in_width > out_width else torch.cat(outputs, dim=1)
    if joined.shape[1] != out_width:
        joined = F.adaptive_avg_pool1d(joined[None], out_width)[0]
    skip = F.layer_norm(x, (in_width,), block.norm_skip.weight, block.norm_skip.bias, 1e-5)
    y = skip @ block.skip.weight.t() + block.skip.bias
    y = y + joined @ attention.out.weight.t() + attention.out.bias
    mlp = block.mlp
    h = F.layer_norm(y, (out_width,), block.norm_mlp.weight, block.norm_mlp.bias, 1e-5)
    h = F.layer_norm(h, (out_width,), mlp.norm.weight, mlp.norm.bias, 1e-6)
    gate = F.gelu(h @ mlp.gate.weight.t() + mlp.gate.bias, approximate="tanh")
    hidden = gate * (h @ mlp.value.weight.t() + mlp.value.bias)
    return y + hidden @ mlp.out.weight.t() + mlp.out.bias


@pytest.mark.parametrize(("in_width", "out_width"), [(12, 4), (4, 12), (6, 6), (10, 4)])
def test_block_is_the_formula(in_width: int, out_width: int) -> None:
    block = AttentionProjection(in_width, out_width).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 5, in_width).double()
    for fused in (False, True):
        block.fused = fused
        torch.testing.assert_close(block(x)[0], by_hand(block, x[0]))


def test_compression_changes_the_width_last_and_decompression_first() -> None:
    down = LatentProjection(12, 4, "attention", depth=3)
    assert [(b.skip.in_features, b.skip.out_features) for b in down.blocks] == [(12, 12), (12, 12), (12, 4)]
    up = LatentProjection(4, 12, "attention", depth=3, expand_first=True)
    assert [(b.skip.in_features, b.skip.out_features) for b in up.blocks] == [(4, 12), (12, 12), (12, 12)]
    assert down.last is down.blocks[-1].mlp.out


def test_layers_are_unshuffled_channel_row_column_and_concatenated() -> None:
    fusion = LatentFusion(
        FusionConfig(compress="conv", layer_widths=(1, 1)), encoder_width=1, ratio=2, out_channels=8
    )
    for layer in (*fusion.layers, fusion.final):
        torch.nn.init.eye_(layer.linear.weight)
        torch.nn.init.zeros_(layer.linear.bias)
    first = torch.arange(16.0).view(1, 16, 1)  # a 4 x 4 grid of tokens, so a 2 x 2 latent
    out = fusion([first, 100 + first], (2, 2))
    assert out[0, :, 0, 1].tolist() == [2, 3, 6, 7, 102, 103, 106, 107]


def test_unshuffling_and_concatenating_is_one_copy_of_pixel_unshuffle() -> None:
    layers = [torch.randn(2, 6 * 9, c, requires_grad=True) for c in (5, 3)]
    joint = unshuffle_and_concatenate(layers, (2, 3), 3)
    maps = [F.pixel_unshuffle(tokens_to_map(tokens, (6, 9)), 3) for tokens in layers]
    expected = torch.cat([map_to_tokens(m) for m in maps], dim=2)
    assert joint.is_contiguous() and torch.equal(joint, expected)
    grad = torch.randn_like(joint)
    for found, truth in zip(*(torch.autograd.grad(t, layers, grad) for t in (joint, expected)), strict=True):
        assert torch.equal(found, truth)
    with pytest.raises(ValueError, match="54 tokens do not form a 3 x 9 map"):
        unshuffle_and_concatenate(layers, (1, 3), 3)


def test_initialisation_is_the_published_one() -> None:
    linear = LatentProjection(512, 512, "attention").blocks[0].skip
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not linear.bias.any()
    conv = LatentProjection(300, 500, "conv").linear
    assert conv.weight.std().item() == pytest.approx(0.5 * (2 / 800) ** 0.5, rel=0.03)


def test_maps_and_tokens_are_views_of_each_other() -> None:
    tokens = torch.randn(2, 6, 5)
    fmap = tokens_to_map(tokens, (2, 3))
    assert fmap[1, 4, 1, 2] == tokens[1, 5, 4]
    assert map_to_tokens(fmap).data_ptr() == tokens.data_ptr()
    with pytest.raises(ValueError, match="6 tokens do not form a 2 x 2 map"):
        tokens_to_map(tokens, (2, 2))


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match='fusion.compress is "mlp"; needed is one of attention, conv'):
        FusionConfig(compress="mlp")
    with pytest.raises(ValueError, match=r"layer_widths is \(8, 0\); each entry must be at least 1"):
        FusionConfig(layer_widths=(8, 0))
    with pytest.raises(ValueError, match="fusion.decompress_factor is 0; it must be at least 1"):
        FusionConfig(decompress_factor=0)
    with pytest.raises(ValueError, match="width 7 cannot be divided into 2 heads"):
        AttentionProjection(7, 3)
    with pytest.raises(ValueError, match="1 feature maps were given, 3 are fused"):
        LatentFusion(FusionConfig(), 64, 2, 8)([torch.randn(1, 4, 64)], (1, 1))
