"""The training step against plain autograd of its definition, and its schedules against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.tiny_runs import ALL_LOSSES, job, largest_difference, parameters, steps
from vfmvae.images import to_unit
from vfmvae.losses.alignment import adaptive_weight
from vfmvae.train_job import Job
from vfmvae.train_step import GENERATOR, TOKENIZER, Part, forward, generator_backward, training_step
from vfmvae.training.objective import image_losses, latent_losses
from vfmvae.training.stages import LossWeights


def first_part(built: Job) -> Part:
    built.begin_step()
    (images,) = next(built.batches(0))
    return Part(to_unit(images), 0)


def plain_gradients(built: Job, part: Part) -> dict[str, Tensor]:
    """Of the whole loss by one backward pass, the adaptive weight by two of its own: the definition."""
    weights = built.weights()
    output = forward(built, part, weights, TOKENIZER)
    # The forward is cut at the latents; join it again.
    tokenizer = built.tokenizer
    decoded, smaller = tokenizer.decode(output.latents, return_multiscale=True)
    images = [decoded, *smaller]
    of_images = image_losses(images, output.targets, weights, built.perceptual)
    draws, adversarial = built.draws(0, GENERATOR), {}
    for adversary in built.playing:
        adversarial |= adversary.game.generator_losses(decoded, output.targets, draws, 0.0, weights)
    others = {**adversarial, **latent_losses(output, weights)}
    reconstruction = sum(weights[name] * loss for name, loss in of_images.items())
    total = reconstruction + sum(weights[name] * loss for name, loss in others.items())
    if "alignment" in weights:
        alignment = tokenizer.alignment_loss(output.latents, output.features)
        factor = weights["alignment"]
        if built.stage.losses.adaptive_alignment:
            factor = factor * adaptive_weight(reconstruction, alignment, tokenizer.last_fusion_weight)
        total = total + factor * alignment
    names = {n: p for n, p in tokenizer.named_parameters() if p.requires_grad}
    return dict(zip(names, torch.autograd.grad(total, list(names.values())), strict=True))


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param(ALL_LOSSES, id="all"),
        pytest.param(LossWeights(alignment=0.5), id="no adversary"),
        pytest.param(
            LossWeights(adversarial=1.0, alignment=0.5, adaptive_alignment=False), id="fixed weight"
        ),
    ],
)
def test_cut_gradients_are_those_of_the_whole_loss(losses: LossWeights) -> None:
    built = job(losses)
    part = first_part(built)
    expected = plain_gradients(built, part)
    output = forward(built, part, built.weights(), TOKENIZER)
    generator_backward(built, part, output, built.weights(), 1, None)
    found = {n: p.grad for n, p in built.tokenizer.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name] is not None, name
        torch.testing.assert_close(
            found[name], gradient, rtol=2e-4, atol=2e-6 * gradient.norm().item() + 1e-9, msg=name
        )


def test_discriminators_learn_from_their_own_loss_alone() -> None:
    built = job()
    part = first_part(built)
    output = forward(built, part, built.weights(), TOKENIZER)
    generator_backward(built, part, output, built.weights(), 1, None)
    assert all(p.grad is None for a in built.adversaries for p in a.parameters)


def test_one_forward_gives_what_two_with_the_same_draws_give() -> None:
    shared, apart = job(), job()
    batch = next(shared.batches(0))
    for built in (shared, apart):
        built.begin_step()
    training_step(shared, batch, shared.weights())
    two_forwards(apart, batch)
    assert largest_difference(parameters(shared), parameters(apart)) < 1e-6


def two_forwards(built: Job, batch: list[Tensor]) -> None:
    """The published order: a forward for the discriminators without a graph, then one for the tokenizer."""
    from vfmvae.train_step import discriminator_images, discriminator_step, generator_step

    parts = [Part(to_unit(images), 0) for images in batch]
    weights = built.weights()
    fakes = discriminator_images(built, parts, weights)
    for adversary in built.playing:
        discriminator_step(built, adversary, parts, fakes, weights)
    generator_step(built, parts, weights, None)


def test_the_switch_draws_twice() -> None:
    shared, independent = job(), job(share_forward=False)
    ours, theirs = (steps(built, 1)[0].losses for built in (shared, independent))
    assert ours["discriminator_projected"] != theirs["discriminator_projected"]
    torch.testing.assert_close(ours["l1"], theirs["l1"])


def test_an_accumulated_batch_gives_the_same_update() -> None:
    losses = replace(ALL_LOSSES, adversarial=0.0, patch_adversarial=0.0, feature_matching=0.0)
    whole, parts = job(losses, batch_size=16), job(losses, batch_size=16, accumulate=2)
    steps(whole, 3), steps(parts, 3)
    assert largest_difference(parameters(whole), parameters(parts)) < 1e-6


def test_an_accumulated_batch_plays_the_same_game() -> None:
    # One step of 1e-3, and not as close: the discriminators' batch norms enlarge the last digits.
    whole, parts = job(batch_size=16), job(batch_size=16, accumulate=2)
    (ours,), (theirs,) = steps(whole, 1), steps(parts, 1)
    assert ours.losses.keys() == theirs.losses.keys()
    for name, loss in ours.losses.items():
        torch.testing.assert_close(theirs.losses[name], loss, rtol=1e-4, atol=1e-5, msg=name)
    one, other = parameters(whole), parameters(parts)
    for part, limit in (("tokenizer.", 5e-5), ("projected.", 5e-4), ("patch.", 5e-4)):
        ours, theirs_ = ({n: p for n, p in found.items() if n.startswith(part)} for found in (one, other))
        assert largest_difference(ours, theirs_) < limit, part


def test_an_adaptive_weight_is_kept_between_measurements() -> None:
    built = job(LossWeights(alignment=0.5), adaptive_every=3)
    factors = [r.losses["alignment_factor"].item() for r in steps(built, 5)]
    assert factors[0] == factors[1] == factors[2] != factors[3] == factors[4]


def test_recomputed_blocks_give_the_same_update() -> None:
    kept, again = job(), job(recompute=True)
    steps(kept, 2), steps(again, 2)
    assert largest_difference(parameters(kept), parameters(again)) < 1e-6
