"""What all encoders do alike: pixels, sizes, layers, and being frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision

from vfmvae.encoders import ENCODERS, EncoderConfig, FrozenEncoder, ViTConfig, build_encoder
from vfmvae.encoders.base import resolve_layers

TINY = ViTConfig(width=16, depth=2, heads=2, patch_size=8, image_size=32, mlp_width=24)


def tiny(
    name: str = "siglip2-base-patch16-224", scale: float = 1.0, layers: tuple[int, ...] = (-1,)
) -> FrozenEncoder:
    return build_encoder(EncoderConfig(name, layers, scale, vit=TINY), weights=None)


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("scale", [2.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "mode", "mean", "std"),
    [
        ("siglip2-base-patch16-224", vision.InterpolationMode.BILINEAR, [0.5] * 3, [0.5] * 3),
        ("mae-base", vision.InterpolationMode.BILINEAR, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("dinov2-base", vision.InterpolationMode.BICUBIC, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        (
            "eva02-clip-base-patch16-224",
            vision.InterpolationMode.BICUBIC,
            [0.48145466, 0.4578275, 0.40821073],
            [0.26862954, 0.26130258, 0.27577711],
        ),
    ],
)
def test_pixels_are_those_of_torchvision(
    name: str, mode: vision.InterpolationMode, mean: list[float], std: list[float], scale: float
) -> None:
    encoder, x = tiny(name, scale), images(2, 3, 48, 32)
    unit = (x + 1) / 2
    if scale != 1:  # torchvision antialiases also when enlarging, where it makes no difference
        unit = vision.resize(
            unit, [int(48 * scale), int(32 * scale)], interpolation=mode, antialias=scale < 1
        )
    torch.testing.assert_close(encoder.prepare(x), vision.normalize(unit, mean, std), rtol=1e-5, atol=1e-5)


def test_bytes_and_floats_are_the_same_image() -> None:
    encoder = tiny()
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder.prepare(raw), encoder.prepare(raw.float() / 127.5 - 1))


def test_an_encoder_stays_frozen() -> None:
    encoder = tiny(layers=(0, -1))
    model = nn.Sequential(encoder).train()
    assert model.training and not any(module.training for module in encoder.modules())
    x = images(1, 3, 32, 32).requires_grad_()
    features = model(x)
    assert not any(value.requires_grad for value in (*features.layers, features.pooled))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    # A fixed target for losses: usable in a graph, which inference tensors would not be.
    weight = torch.ones(16, requires_grad=True)
    (features.layers[0] * weight).sum().backward()
    torch.testing.assert_close(weight.grad, features.layers[0].sum(dim=(0, 1)))


@pytest.mark.parametrize("name", ["siglip2-base-patch16-224", "dino-small-patch16"])
def test_images_get_gradients_through_the_frozen_model_where_asked(name: str) -> None:
    encoder = tiny(name, scale=2.0, layers=(1, -1)).double()
    x = images(1, 3, 16, 16).double().requires_grad_()
    weight = torch.randn(1, 16, 16)
    (gradient,) = torch.autograd.grad((encoder(x, image_gradients=True).layers[1] * weight).sum(), x)
    step = gradient / gradient.norm() * 1e-2
    with torch.no_grad():
        ahead, behind = (encoder(x + sign * step, image_gradients=True) for sign in (1, -1))
    assert not ahead.layers[1].requires_grad, "no_grad outside wins"
    difference = (ahead.layers[1] - behind.layers[1]) * weight
    assert (difference.sum() / 2e-2).item() == pytest.approx(gradient.norm().item(), rel=1e-2)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_an_encoder_whose_parameters_require_gradients_is_trained() -> None:
    encoder = tiny(layers=(-1,)).requires_grad_(True)
    encoder(images(1, 3, 32, 32)).pooled.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.trunk.blocks.parameters())
    assert not encoder.train().training
    with torch.no_grad():
        assert not encoder(images(1, 3, 32, 32)).pooled.requires_grad


def test_features_are_float32_in_any_surrounding_precision() -> None:
    encoder = tiny(layers=(0, -1))
    x = images(1, 3, 32, 32)
    plain = encoder(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder(x)
    assert torch.equal(plain.layers[1], inside.layers[1]) and torch.equal(plain.pooled, inside.pooled)
    half = encoder.to(torch.bfloat16)(x)
    assert half.layers[0].dtype == half.pooled.dtype == torch.float32


def test_an_encoder_asked_for_bfloat16_computes_in_it_on_the_cpu_too() -> None:
    encoder = tiny(layers=(-1,))
    x = images(1, 3, 32, 32)
    plain = encoder(x).layers[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = encoder.tokens(encoder.prepare(x), {encoder.depth + 1})
    encoder.always_bfloat16 = True
    low = encoder(x).layers[0]
    assert low.dtype == torch.float32 and torch.equal(low, outputs[encoder.depth + 1].float())
    assert 0 < (low - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize(
    ("size", "scale", "grid"), [((32, 32), 2.0, (8, 8)), ((64, 48), 0.5, (4, 3)), ((16, 40), 1.0, (2, 5))]
)
def test_the_grid_follows_the_image(size: tuple[int, int], scale: float, grid: tuple[int, int]) -> None:
    encoder = tiny(scale=scale)
    features = encoder(images(1, 3, *size))
    assert features.grid == grid == encoder.grid(*size)
    assert features.layers[0].shape == (1, grid[0] * grid[1], 16)


@pytest.mark.parametrize(("scale", "multiple"), [(2.0, 4), (1.0, 8), (0.5, 16), (1.75, 32), (4 / 3, 6)])
def test_the_needed_multiple_is_named(scale: float, multiple: int) -> None:
    encoder = tiny(scale=scale)
    assert encoder.image_multiple == multiple
    assert all(abs(side * scale / 8 % 1) < 1e-9 for side in (multiple, 3 * multiple))
    assert not any(abs(side * scale / 8 % 1) < 1e-9 for side in range(1, multiple))
    wrong = multiple * 3 // 2
    with pytest.raises(ValueError, match=f"height {wrong}.*multiples of {multiple}$"):
        encoder(images(1, 3, wrong, multiple))
    with pytest.raises(ValueError, match=f"width {wrong}.*multiples of {multiple}$"):
        encoder.grid(multiple, wrong)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (torch.zeros(1, 4, 32, 32), r"\[1, 4, 32, 32\]"),
        (torch.zeros(3, 32, 32), r"\[3, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "torch.int64"),
    ],
)
def test_wrong_images_are_named(bad: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny()(bad)


def test_layer_positions() -> None:
    assert resolve_layers((0, 12, -1, -2, -3, 24), depth=24) == (0, 12, 25, 24, 23, 24)
    assert resolve_layers((-26,), depth=24) == (0,)
    for index in (25, -27):
        with pytest.raises(ValueError, match=f"layer {index} does not exist.*24 blocks"):
            resolve_layers((index,), depth=24)


def test_bad_configurations_are_named() -> None:
    with pytest.raises(ValueError, match="unknown encoder 'siglip3'.*siglip2-large-patch16-512.*mini"):
        build_encoder(EncoderConfig("siglip3"), weights=None)
    with torch.device("meta"), pytest.raises(ValueError, match="layer 13 does not exist"):
        build_encoder(EncoderConfig("dinov2-base", (13,)), weights=None)
    with pytest.raises(ValueError, match="layers is empty"):
        EncoderConfig(layers=())
    with pytest.raises(ValueError, match="scale_factor must be positive, got 0"):
        EncoderConfig(scale_factor=0)
    with pytest.raises(ValueError, match="width 30 is not divisible by 4 heads"):
        ViTConfig(30, 2, 4, 8, 32, 64)
    with pytest.raises(ValueError, match="image_size 36 is not a multiple of patch_size 8"):
        ViTConfig(32, 2, 4, 8, 36, 64)


def test_names_are_unique_members() -> None:
    models = [entry.model for entry in ENCODERS.values()]
    assert len(set(models)) == len(models)
