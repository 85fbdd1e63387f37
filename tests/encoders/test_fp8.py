"""Encoders whose linear layers multiply in float8: what changes, what does not, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.ops.fp8_truth import exact_linear
from tests.tokenizer.tiny import tiny_tokenizer
from vfmvae.encoders import EncoderConfig, FrozenEncoder, ViTConfig, build_encoder
from vfmvae.encoders.fp8 import Fp8Linear, use_fp8

# 40 is no multiple of 16, which float8 products want: weights are filled up.
VIT = ViTConfig(width=32, depth=2, heads=2, patch_size=8, image_size=32, mlp_width=40)
FAMILIES = (
    "siglip2-large-patch16-512",
    "dino-small-patch16",
    "dinov2-base",
    "dinov2-giant",
    "dinov2-with-registers-base",
    "dinov3-vitb16",
    "dinov3-vith16plus",
    "eva02-clip-base-patch16-224",
    "clip-vit-large-patch14",
    "mae-base",
    "mini",
    "qwen2.5-vl-3b",
)


def encoder_of(name: str) -> FrozenEncoder:
    vit = VIT
    if name.startswith("qwen"):
        pytest.importorskip("transformers")
        vit = ViTConfig(width=32, depth=4, heads=2, patch_size=14, image_size=56, mlp_width=40)
    encoder = build_encoder(EncoderConfig(name, (1, -1), 1.0, vit=vit), None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return encoder


def images(encoder: FrozenEncoder) -> Tensor:
    side = 2 * encoder.image_multiple
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_layer_of_the_blocks_multiplies_in_float8(name: str) -> None:
    encoder = encoder_of(name)
    plain = copy.deepcopy(encoder)
    plain.always_bfloat16 = True
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    use_fp8(encoder, emulate=True)

    layers = {n: m for b in encoder.blocks for n, m in b.named_modules() if isinstance(m, nn.Linear)}
    assert len(layers) >= 4 and all(type(layer) is Fp8Linear for layer in layers.values())
    after = encoder.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())

    seen: dict[str, int] = dict.fromkeys(layers, 0)

    def compare(layer: Fp8Linear, inputs: tuple[Tensor, Tensor | None], out: Tensor) -> None:
        x, shift = inputs
        truth, terms = exact_linear(x.float(), layer.values, layer.scale, shift)
        truth, terms = truth[..., : layer.out_features], terms[..., : layer.out_features]
        assert ((out.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6 * terms).all()

    for layer_name, layer in layers.items():
        product = layer.product

        def watched(x: Tensor, shift: Tensor | None, layer=layer, product=product, name=layer_name) -> Tensor:
            out = product(x, shift)
            seen[name] += 1
            compare(layer, (x, shift), out)
            return out

        layer.product = watched  # type: ignore[method-assign]
    found, expected = encoder(images(encoder)), plain(images(encoder))
    assert all(count > 0 for count in seen.values()), seen
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours.dtype == torch.float32
        # A layer's error is 0.04 of its branch (tests/ops/test_fp8.py), of which there are up to eight.
        assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.12


def test_a_bias_beside_the_layer_counts() -> None:
    """EVA's class, which DINOv3 uses, keeps the biases of query and value apart."""
    encoder = encoder_of("dinov3-vitb16")
    use_fp8(encoder, emulate=True)
    before = encoder(images(encoder)).layers[0]
    with torch.no_grad():
        encoder.blocks[0].attn.v_bias.add_(3.0)  # type: ignore[union-attr]
    assert (encoder(images(encoder)).layers[0] - before).norm() > 0.1 * before.norm()


def test_float8_numbers_follow_the_weights() -> None:
    encoder, other = encoder_of("mini"), encoder_of("mini")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    use_fp8(encoder, emulate=True)
    use_fp8(other, emulate=True)
    expected = other(images(other)).layers
    encoder.load_state_dict(other.state_dict())
    for found in (encoder, copy.deepcopy(encoder), encoder.to(torch.float64).to(torch.float32)):
        for ours, theirs in zip(found(images(found)).layers, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_saved_tokenizer_does_not_know_of_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "plain")
    use_fp8(tokenizer.encoder, emulate=True)
    tokenizer.save(tmp_path / "fp8")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "fp8" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_what_is_refused() -> None:
    encoder = encoder_of("mini")
    with pytest.raises(ValueError, match="encoder mini cannot compute in float8: cpu has no units.*leave"):
        use_fp8(encoder)
    assert not any(isinstance(m, Fp8Linear) for m in encoder.modules())
    use_fp8(encoder, emulate=True)
    with pytest.raises(ValueError, match="x requires gradients"):
        encoder(images(encoder).requires_grad_(), image_gradients=True)
    encoder = encoder_of("mini").requires_grad_(True)
    with pytest.raises(ValueError, match="encoder mini: trunk.* requires gradients, and float8"):
        use_fp8(encoder, emulate=True)
