"""The projected discriminator, from image to logits, against timm, torchvision and published heads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from vfmvae.convert.discriminators import convert_projected_head
from vfmvae.discriminators import (
    AUGMENT_UNIFORMS,
    ProjectedDiscriminator,
    ProjectedDiscriminatorConfig,
    augment,
)
from vfmvae.discriminators.projected import ProjectedHead
from vfmvae.encoders import ViTConfig
from vfmvae.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss, r1_penalty

TINY = ViTConfig(width=16, depth=2, heads=2, patch_size=8, image_size=32, mlp_width=24)
RESIZE, CROP = torch.tensor((0.5, 0.3, 0.7)), torch.tensor((0.499, 0.0, 0.999))


def tiny(name: str = "dino-small-patch16", c_dim: int = 0, dtype: torch.dtype = torch.float32):
    config = ProjectedDiscriminatorConfig(name, layers=(0, 1, -2), c_dim=c_dim, vit=TINY)
    return ProjectedDiscriminator(config, weights=None, dtype=dtype)


def images(*shape: int) -> Tensor:
    return torch.rand(shape) * 2 - 1


def draws(batch: int) -> Tensor:
    return torch.rand(batch, AUGMENT_UNIFORMS)


@pytest.mark.parametrize("name", ["head", "head_conditional"])
def test_published_heads(name: str, parity_dir: Path) -> None:
    folder = parity_dir / "discriminators"
    settings, io = (
        json.loads((folder / "config.json").read_text())[name],
        load_file(folder / "io.safetensors"),
    )
    head = ProjectedHead(settings["channels"], settings["c_dim"]).eval()
    head.load_state_dict(convert_projected_head(load_file(folder / f"{name}.safetensors")))
    prefix, c = ("cond", io["cond_c"]) if settings["c_dim"] else ("head", None)
    logits = head(io[f"{prefix}_input"].transpose(1, 2), c)
    torch.testing.assert_close(logits[:, None], io[f"{prefix}_logits"], rtol=0, atol=2e-5)


def test_unknown_published_parameters_are_named() -> None:
    with pytest.raises(ValueError, match="without a counterpart in vfmvae: main.0.2.bias, main.2.weight"):
        convert_projected_head(dict.fromkeys(["main.2.weight", "cls.bias", "main.0.2.bias"], torch.ones(1)))


@pytest.mark.parametrize("name", ["dino-small-patch16", "mini"])
def test_heads_see_the_tokens_that_timm_computes(name: str) -> None:
    discriminator = tiny(name).eval()
    trunk = discriminator.encoder.trunk
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x, u = images(3, 3, 32, 32), draws(3)
    seen: list[Tensor] = []
    hooks = [trunk.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in trunk.blocks]
    mean, std = (
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if name.startswith("dino") else ([0.5] * 3, [0.5] * 3)
    )
    trunk.forward_features(vision.normalize((augment(x, u) + 1) / 2, mean, std))
    for hook in hooks:
        hook.remove()
    has_class = name.startswith("dino")
    assert seen[0].shape[1] == 16 + has_class
    tokens = [layer[:, 1:] + layer[:, :1] if has_class else layer for layer in seen]
    expected = torch.cat([head(t) for head, t in zip(discriminator.heads, tokens, strict=True)], dim=1)
    logits = discriminator(x, u, RESIZE)
    assert logits.shape == (3, 3 * 16)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_default_backbone_is_dino_small_at_224_px() -> None:
    with torch.device("meta"):
        discriminator = ProjectedDiscriminator(ProjectedDiscriminatorConfig(), weights=None)
        published = timm.create_model("vit_small_patch16_224.dino", num_classes=0)
    assert discriminator.encoder.image_size == 224 and discriminator.positions == (0, 3, 6, 9, 12)
    ours = {name: p.shape for name, p in discriminator.encoder.trunk.state_dict().items()}
    assert ours == {name: p.shape for name, p in published.state_dict().items()}
    heads = sum(p.numel() for p in discriminator.heads.parameters())
    # Two convolutions and norms of width 384, kernels of 1 and 9, and one to a logit; five times.
    assert heads == 5 * (384 * 384 * 10 + 2 * 384 + 4 * 384 + 384 + 1)


def test_mini_judges_without_a_download() -> None:
    discriminator = ProjectedDiscriminator(ProjectedDiscriminatorConfig("mini", (0, 2, 4, 6)))
    assert discriminator(images(2, 3, 64, 64), draws(2), RESIZE).shape == (2, 4 * 64)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(48, 40), (32, 40), (20, 24)])
def test_images_are_resized_as_in_torchvision(interpolation: str, size: tuple[int, int]) -> None:
    config = ProjectedDiscriminatorConfig(layers=(0,), vit=TINY, interpolation=interpolation)
    x = images(2, 3, *size)
    resized = ProjectedDiscriminator(config, weights=None).resize(x, RESIZE)
    expected = vision.resize(x, [32, 32], vision.InterpolationMode(interpolation), antialias=max(size) > 32)
    torch.testing.assert_close(resized, expected, rtol=1e-5, atol=1e-5)


def test_half_of_the_batches_of_larger_images_are_cropped() -> None:
    discriminator, x = tiny(), images(2, 3, 40, 48)
    assert torch.equal(discriminator.resize(x, CROP), x[:, :, :32, 16:])
    assert torch.equal(discriminator.resize(x, torch.tensor((0.0, 0.999, 0.5))), x[:, :, 8:, 8:40])
    draws = (torch.tensor((0.0, u / 90, 0.0)) for u in range(90))
    corners = {tuple(discriminator.resize(x, crop)[0, 0, 0, :1].tolist()) for crop in draws}
    assert len(corners) == 9, "every row from 0 to 8 is a first row"
    same = images(2, 3, 32, 32)
    assert discriminator.resize(same, CROP) is same is discriminator.resize(same, RESIZE)
    narrow = images(2, 3, 64, 32)  # larger on one side only: nothing to choose
    assert torch.equal(discriminator.resize(narrow, CROP), discriminator.resize(narrow, RESIZE))


def test_bytes_and_floats_are_the_same_image() -> None:
    discriminator, u = tiny().eval(), draws(2)
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    same = discriminator(raw.float() / 127.5 - 1, u, RESIZE)
    torch.testing.assert_close(discriminator(raw, u, RESIZE), same)


def test_the_backbone_is_frozen_and_lets_gradients_through() -> None:
    discriminator = tiny().train()
    assert not any(module.training for module in discriminator.encoder.modules())
    x = images(2, 3, 40, 40).requires_grad_()
    hinge_generator_loss(discriminator(x, draws(2), CROP)).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.encoder.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.heads.parameters())


def test_the_gradient_of_the_images_is_the_slope_of_the_loss() -> None:
    discriminator = tiny().double().eval()
    x, u = images(2, 3, 40, 40).double().requires_grad_(), draws(2)
    loss = hinge_generator_loss(discriminator(x, u, RESIZE))
    (gradient,) = torch.autograd.grad(loss, x)
    step = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (
            hinge_generator_loss(discriminator(x + sign * 1e-4 * step, u, RESIZE)) for sign in (1, -1)
        )
    assert ((ahead - behind) / 2e-4).item() == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_a_gradient_penalty_can_be_taken_through_the_backbone() -> None:
    discriminator = tiny().double().eval()
    x, u = images(2, 3, 32, 32).double().requires_grad_(), draws(2)
    plain, double = discriminator(x, u, RESIZE), discriminator(x, u, RESIZE, double_backward=True)
    torch.testing.assert_close(plain, double)
    weight = discriminator.heads[1].first.conv.weight
    (gradient,) = torch.autograd.grad(r1_penalty(x, double), weight)
    direction, value = gradient / gradient.norm(), weight.detach().clone()
    penalties = []
    for sign in (1, -1):
        weight.data = value + sign * 1e-4 * direction
        penalties.append(r1_penalty(x, discriminator(x, u, RESIZE, double_backward=True)))
    weight.data = value
    slope = (penalties[0] - penalties[1]) / 2e-4
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=2e-2)


def test_eval_mode_writes_nothing_and_training_mode_iterates() -> None:
    discriminator, x, u = tiny().eval(), images(2, 3, 32, 32), draws(2)
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    first = discriminator(x, u, RESIZE)
    assert torch.equal(first, discriminator(x, u, RESIZE))
    assert all(torch.equal(value, before[name]) for name, value in discriminator.state_dict().items())
    discriminator.train()(x, u, RESIZE)
    changed = {
        name for name, value in discriminator.state_dict().items() if not torch.equal(value, before[name])
    }
    # The vectors of a layer with one output have one side alone to move.
    assert {name.rsplit(".", 1)[1] for name in changed} == {"u", "v"}
    by_hand = tiny().eval()
    by_hand.load_state_dict(before)
    by_hand.iterate_spectral_norms()
    for name, value in discriminator.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], msg=name)


def train(discriminator: ProjectedDiscriminator, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps of both players' passes; real images have a bright left half, others are noise."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        real, fake = (torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
        real[..., :16] += 2
        u = torch.rand(3, 4, AUGMENT_UNIFORMS, generator=generator)
        loss = hinge_discriminator_loss(
            discriminator(real, u[0], RESIZE), discriminator(fake.detach(), u[1], RESIZE)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hinge_generator_loss(discriminator(fake.requires_grad_(), u[2], RESIZE)).backward()


def test_mini_learns_to_tell_a_pattern_from_noise() -> None:
    discriminator = ProjectedDiscriminator(ProjectedDiscriminatorConfig("mini", (2, 4))).train()
    train(discriminator, torch.optim.Adam(discriminator.heads.parameters(), 3e-3), range(15))
    real, fake = images(8, 3, 32, 32), images(8, 3, 32, 32)
    real[..., :16] += 2
    with torch.no_grad():
        of_real, of_fake = (discriminator.eval()(x, draws(8), RESIZE).mean(dim=1) for x in (real, fake))
    assert of_real.mean() > of_fake.mean() + 0.2
    assert (of_real > of_fake.mean()).float().mean() > 0.8


def test_training_resumes_exactly() -> None:
    def start() -> tuple[ProjectedDiscriminator, torch.optim.Optimizer]:
        discriminator = tiny().train()
        return discriminator, torch.optim.Adam(discriminator.heads.parameters(), 1e-3)

    whole, adam = start()
    first = {name: value.clone() for name, value in whole.state_dict().items()}
    train(whole, adam, range(2))
    saved = {name: value.clone() for name, value in whole.state_dict().items()}
    moments = copy.deepcopy(adam.state_dict())
    train(whole, adam, range(2, 5))
    resumed, adam = start()
    resumed.load_state_dict(saved)
    adam.load_state_dict(moments)
    train(resumed, adam, range(2, 5))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        # The vector of a convolution with one output is 1 or -1.
        fixed = name.startswith("encoder") or name.endswith("last.u")
        assert torch.equal(value, first[name]) == fixed, name


def test_a_backbone_in_bfloat16_keeps_float32_heads_and_logits() -> None:
    exact, half = tiny().eval(), tiny(dtype=torch.bfloat16).eval()
    half.load_state_dict(exact.state_dict())
    assert {parameter.dtype for parameter in half.encoder.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.heads.parameters()} == {torch.float32}
    x, u = images(4, 3, 32, 32).requires_grad_(), draws(4)
    logits, expected = half(x, u, RESIZE), exact(x, u, RESIZE)
    assert logits.dtype == torch.float32
    assert ((logits - expected).norm() / expected.norm()).item() < 0.05
    (gradient,) = torch.autograd.grad(hinge_generator_loss(logits), x)
    (exact_gradient,) = torch.autograd.grad(hinge_generator_loss(expected), x)
    assert gradient.dtype == torch.float32
    assert torch.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0) > 0.98


def test_no_value_is_read_back() -> None:
    with torch.device("meta"):  # tensors without values: reading one raises
        discriminator = tiny(c_dim=5).train()
        x = torch.rand(2, 3, 40, 40).requires_grad_()
        for crop in torch.rand(2, 3):
            discriminator(x, draws(2), crop, torch.rand(2, 5)).sum().backward()


def test_conditions_count() -> None:
    discriminator, x, u = tiny(c_dim=5).eval(), images(2, 3, 32, 32), draws(2)
    first, second = (discriminator(x, u, RESIZE, torch.randn(2, 5)) for _ in range(2))
    assert first.shape == (2, 3 * 16) and not torch.allclose(first, second)


def test_mistakes_are_named() -> None:
    x, u, c = images(2, 3, 32, 32), draws(2), torch.zeros(2, 5)
    with pytest.raises(ValueError, match="was given a condition but has c_dim 0"):
        tiny()(x, u, RESIZE, c)
    with pytest.raises(ValueError, match="has a condition and was given none"):
        tiny(c_dim=5)(x, u, RESIZE)
    with pytest.raises(ValueError, match=r"conditions are \[2, 5\]; needed is \[B, 4\]"):
        tiny(c_dim=4)(x, u, RESIZE, c)
    with pytest.raises(ValueError, match=r"images have shape \(2, 1, 32, 32\)"):
        tiny()(x[:, :1], u, RESIZE)
    with pytest.raises(ValueError, match="a batch of 9 images"):
        tiny()(images(9, 3, 32, 32), draws(9), RESIZE)
    with pytest.raises(ValueError, match="layer 3 does not exist: this encoder has 2 blocks"):
        ProjectedDiscriminator(ProjectedDiscriminatorConfig(layers=(3,), vit=TINY), weights=None)
    with pytest.raises(ValueError, match="c_dim is -1"):
        ProjectedDiscriminatorConfig(c_dim=-1)
