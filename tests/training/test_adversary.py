"""Both games by their definitions: hinge and least squares, feature matching, the penalty, and the blur."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.tiny_runs import tiny
from vfmvae.discriminators import AUGMENT_UNIFORMS, PatchDiscriminator, ProjectedDiscriminator
from vfmvae.discriminators.blur import Blur, gaussian_blur
from vfmvae.training.adversary import PatchAdversary, ProjectedAdversary
from vfmvae.training.draws import StepDraws


@pytest.fixture(scope="module")
def projected() -> ProjectedAdversary:
    torch.manual_seed(1)
    return ProjectedAdversary(ProjectedDiscriminator(tiny().discriminator))


@pytest.fixture
def patch() -> PatchAdversary:
    return PatchAdversary(PatchDiscriminator(width=4))


def draws() -> StepDraws:
    return StepDraws(0, 3, torch.device("cpu"), 0, 2, 2)


def pair() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1


def logits(game: ProjectedAdversary, images: Tensor, **options: bool) -> tuple[list[Tensor], Tensor]:
    """What the discriminator looks at, and what it says."""
    one = draws()
    crop, uniforms = one.uniform_of_batch(3), one.uniform((AUGMENT_UNIFORMS,))
    return game.look(images, draws(), None), game.discriminator(images, uniforms, crop, **options)


def test_the_projected_game_is_the_hinge_game(projected: ProjectedAdversary) -> None:
    real, fake = pair()
    (_, of_real), (seen, of_fake) = (logits(projected, images) for images in (real, fake))
    expected = (1 - of_real).relu().mean() + (1 + of_fake).relu().mean()
    torch.testing.assert_close(projected(real, seen, draws(), None, {}), expected)
    losses = projected.generator_losses(seen, real, None, {"adversarial": 1.0})
    torch.testing.assert_close(losses["adversarial"], -of_fake.mean())
    assert projected.generator_losses(seen, real, None, {}) == {}


def test_r1_is_a_penalty_on_the_gradient_at_real_images(projected: ProjectedAdversary) -> None:
    real, fake = pair()
    seen = projected.look(fake, draws(), None)
    plain, penalised = (projected(real, seen, draws(), None, w) for w in ({}, {"r1": 2.0}))
    leaf = real.clone().requires_grad_()
    _, of_leaf = logits(projected, leaf, double_backward=True)
    (gradient,) = torch.autograd.grad(of_leaf.sum(), leaf)
    per_image = gradient.square().sum((1, 2, 3)).mean()
    ratio = (penalised - plain).item() / per_image.item()
    assert ratio > 0
    other, again = (projected(real, seen, draws(), None, {"r1": w}) for w in (4.0, 0.0))
    assert (other - again).item() == pytest.approx(2 * (penalised - plain).item(), rel=1e-3)
    projected.zero_grad(set_to_none=True)
    penalised.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in projected.parameters())


def test_the_patch_game_is_least_squares(patch: PatchAdversary) -> None:
    real, fake = pair()
    of_real, of_fake = patch.discriminator(real), patch.discriminator(fake)
    scales = range(len(of_real))
    terms = [(of_real[n].logits - 1).square().mean() + of_fake[n].logits.square().mean() for n in scales]
    loss = patch(real, [fake], draws(), None, {})
    ratio = (loss / torch.stack(terms).mean()).item()
    assert ratio == pytest.approx(1.0, rel=1e-5) or ratio == pytest.approx(0.5, rel=1e-5)
    found = patch.generator_losses([fake], real, None, {"patch_adversarial": 1, "feature_matching": 1})
    assert list(found) == ["patch_adversarial", "feature_matching"]
    same = patch.generator_losses([real], real, None, {"feature_matching": 1.0})
    assert list(same) == ["feature_matching"] and same["feature_matching"] == 0


def test_both_see_blurred_images(projected: ProjectedAdversary, patch: PatchAdversary) -> None:
    real, fake = pair()
    # Pixels beyond the filter's reach count nothing.
    blur = Blur(torch.tensor(1.5), reach=7)
    blurred = [gaussian_blur(images, 1.5) for images in (real, fake)]
    for game in (projected, patch):
        with_blur = game(real, game.look(fake, draws(), blur), draws(), blur, {})
        seen = game.look(blurred[1], draws(), None)
        torch.testing.assert_close(with_blur, game(blurred[0], seen, draws(), None, {}))
        assert with_blur != game(real, game.look(fake, draws(), None), draws(), None, {})


def test_spectral_norms_move_between_passes_only(projected: ProjectedAdversary) -> None:
    real, fake = pair()
    by_hand = copy.deepcopy(projected.discriminator)
    for move, iterations in ((lambda: None, 0), (projected.prepare, 2), (projected.follow, 1)):
        move()
        seen = projected.look(fake, draws(), None)
        projected(real, seen, draws(), None, {})
        projected.generator_losses(seen, real, None, {"adversarial": 1.0})
        for _ in range(iterations):
            by_hand.iterate_spectral_norms()
        expected = dict(by_hand.named_buffers())
        for name, found in projected.discriminator.named_buffers():
            assert torch.equal(found, expected[name]), name
