"""The multi-scale PatchGAN against published outputs and closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfmvae.convert.discriminators import convert_patch_discriminator
from vfmvae.discriminators import PatchDiscriminator


def test_published_features_and_logits(parity_dir: Path) -> None:
    folder = parity_dir / "discriminators"
    settings = json.loads((folder / "config.json").read_text())["patchgan"]
    io = load_file(folder / "io.safetensors")
    discriminator = PatchDiscriminator(settings["ndf"], settings["num_D"])
    discriminator.load_state_dict(convert_patch_discriminator(load_file(folder / "patchgan.safetensors")))
    scales = discriminator(io["patchgan_input"])
    assert len(scales) == settings["num_D"]
    for scale, (features, logits) in enumerate(scales):
        for layer, output in enumerate([*features, logits]):
            expected = io[f"patchgan_scale{scale}_layer{layer}"]
            torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)


def test_published_names_count_scales_the_other_way() -> None:
    names = [f"scale{scale}_layer{layer}.0.bias" for scale in (0, 1) for layer in (0, 4)]
    ours = convert_patch_discriminator({name: torch.full((1,), float(i)) for i, name in enumerate(names)})
    assert {name: int(value) for name, value in ours.items()} == {
        "scales.1.layers.0.conv.bias": 0,
        "scales.1.last.bias": 1,
        "scales.0.layers.0.conv.bias": 2,
        "scales.0.last.bias": 3,
    }
    with pytest.raises(ValueError, match="without a counterpart in vfmvae: scale0_layer7.0.bias"):
        convert_patch_discriminator({"scale0_layer7.0.bias": torch.ones(1)})


def test_full_size_has_the_published_widths() -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator()
        scales = discriminator(torch.empty(2, 3, 256, 256))
    assert [tuple(f.shape[1:]) for f in scales[0].features] == [
        (64, 129, 129),
        (128, 65, 65),
        (256, 33, 33),
        (512, 34, 34),
    ]
    assert [tuple(s.logits.shape) for s in scales] == [(2, 1, 35, 35), (2, 1, 19, 19), (2, 1, 11, 11)]
    weights = [p for name, p in discriminator.named_parameters() if name.endswith("weight") and p.ndim == 4]
    # 4x4 convolutions: 3 -> 64 -> 128 -> 256 -> 512 -> 1, at three scales
    assert sum(w.numel() for w in weights) == 3 * 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)


def test_smaller_scales_see_averages_that_do_not_count_the_border() -> None:
    discriminator = PatchDiscriminator(4)
    for network in discriminator.scales[1:]:
        network.load_state_dict(discriminator.scales[0].state_dict())
    grey = torch.full((2, 3, 64, 64), 0.25)
    scales = discriminator(grey)
    expected = [discriminator.scales[0](grey[..., :side, :side]) for side in (64, 32, 16)]
    for ours, theirs in zip(scales, expected, strict=True):
        torch.testing.assert_close(ours.features[0], theirs.features[0])


def test_weights_start_small_and_gradients_reach_the_images() -> None:
    discriminator = PatchDiscriminator(16)
    assert discriminator.scales[0].layers[3].conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    images = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    sum(scale.logits.mean() for scale in discriminator(images)).backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_bfloat16_computes_in_bfloat16_with_float32_parameters() -> None:
    exact, half = PatchDiscriminator(8), PatchDiscriminator(8, dtype=torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    for ours, expected in zip(half(images), exact(images), strict=True):
        assert ours.logits.dtype == ours.features[0].dtype == torch.bfloat16
        for a, b in zip(ours.features, expected.features, strict=True):
            assert ((a.float() - b).norm() / b.norm()).item() < 0.05
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


def test_bytes_and_floats_are_the_same_image_and_wrong_ones_are_named() -> None:
    discriminator = PatchDiscriminator(4)
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ours, same = discriminator(raw), discriminator(raw.float() / 127.5 - 1)
    torch.testing.assert_close(ours[0].logits, same[0].logits)
    with pytest.raises(ValueError, match=r"images have shape \(2, 4, 32, 32\)"):
        discriminator(torch.zeros(2, 4, 32, 32))
    with pytest.raises(ValueError, match="a batch of 9 images"):
        discriminator(torch.zeros(9, 3, 32, 32))
