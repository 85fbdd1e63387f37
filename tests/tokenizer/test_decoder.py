from __future__ import annotations

import pytest
import torch

from vfmvae.tokenizer import DecoderConfig
from vfmvae.tokenizer.decoder import Decoder
from vfmvae.tokenizer.decoder_blocks import ConvNeXtLayer, LatentBranch, Upsample


def test_published_sizes() -> None:
    config = DecoderConfig()
    assert [config.channels(i) for i in range(6)] == [512, 512, 512, 512, 256, 128]
    assert [config.num_layers(i) for i in range(6)] == [7, 7, 7, 7, 5, 5]
    assert [config.blur_size(i) for i in range(6)] == [3, 3, 3, 5, 5, 5]
    assert [DecoderConfig(extra_convnext=False).num_layers(i) for i in range(6)] == [5] * 6
    assert DecoderConfig(num_res_blocks=1).num_styles() == 28


@pytest.mark.parametrize("shrink", [4, 2, 1, 0.5, 0.25])
def test_latent_branch_reaches_the_blocks_input_size(shrink: float) -> None:
    y = LatentBranch(8, 6, shrink, "leaky_relu")(torch.randn(2, 8, 8, 4))
    assert y.shape == (2, 6, int(8 / shrink), int(4 / shrink))


@pytest.mark.parametrize("downsample", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 64), (128, 64)])
def test_every_scale_has_half_the_size_of_the_next(downsample: int, size: tuple[int, int]) -> None:
    config = DecoderConfig(
        channel_base=256, channel_max=8, num_res_blocks=1, latent_widths=(8, 8, 8, 8), style_width=4,
        attention_blocks=(0,), attention_depths=(1,),
    )  # fmt: skip
    decoder = Decoder(config, 4, downsample)
    z_map = torch.randn(1, 4, size[0] // downsample, size[1] // downsample)
    images = decoder(z_map, torch.randn(1, 4))
    assert [tuple(i.shape) for i in images] == [(1, 3, size[0] >> k, size[1] >> k) for k in range(6)]
    only = decoder(z_map, torch.randn(1, 4), multiscale=False)
    assert len(only) == 1


def test_upsampling_adds_the_residual_and_normalises_where_told() -> None:
    x, residual = torch.randn(1, 4, 3, 3), torch.randn(1, 8, 6, 6)
    up = Upsample(4, 8, 3)
    torch.testing.assert_close(up(x, residual), up(x) + residual)
    assert up.norm.weight.shape == (4,)
    assert Upsample(4, 8, 3, norm_after=True).norm.weight.shape == (8,)


def test_noise_is_resized_and_scaled() -> None:
    layer = ConvNeXtLayer(4, 5, 3, noise_size=8)
    layer.gamma.data.fill_(1.0)
    x, style = torch.randn(1, 4, 4, 4), torch.randn(1, 3)
    silent = layer(x, style)
    layer.noise_strength.data.fill_(0.5)
    assert not torch.allclose(layer(x, style), silent)
    expected = (
        layer.noise.view(4, 2, 4, 2).mean(dim=(1, 3)) * 0.5
    )  # bilinear by exactly 2 is the mean of 2 x 2
    torch.testing.assert_close(layer._noise(x.shape[-2:]), expected)


def test_a_new_layer_is_nearly_the_identity() -> None:
    x = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(ConvNeXtLayer(4, 7, 3)(x, torch.randn(1, 3)), x, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_blocks": (1, 2)}, "lacks block 0"),
        ({"attention_blocks": (0, 6), "attention_depths": (1, 1)}, r"must lie in 0\.\.5"),
        ({"latent_widths": (8,)}, "has 1 entries; block 3 needs one"),
        ({"attention_depths": (1,)}, "needs one entry for each"),
        ({"channel_base": 100}, "leaves the last block no channels"),
        ({"channel_max": 0}, "decoder.channel_max is 0; it must be at least 1"),
        ({"style_width": -1}, "decoder.style_width is -1; it must be at least 1"),
        ({"style_pooled": 0}, "decoder.style_pooled is 0; it must be at least 1"),
        ({"num_res_blocks": -1}, "decoder.num_res_blocks is -1; it must be at least 0"),
        (
            {"attention_depths": (1, -1, 1)},
            r"decoder.attention_depths is \(1, -1, 1\); each entry must be at least 0",
        ),
        (
            {"latent_widths": (8, 8, 8, -1)},
            r"decoder.latent_widths is \(8, 8, 8, -1\); each of latent_blocks",
        ),
    ],
)
def test_bad_values_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**changes)
