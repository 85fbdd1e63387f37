"""The training step against plain autograd of its definition, and its schedules against each other."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_runs import ALL_LOSSES, job, largest_difference, parameters, stage, steps, tiny
from vfmvae.images import to_unit
from vfmvae.losses.alignment import adaptive_weight
from vfmvae.train_job import Job
from vfmvae.train_step import GENERATOR, TOKENIZER, Part, begin, forward, generator_backward, training_step
from vfmvae.training.adaptive import BALANCED_TERMS
from vfmvae.training.adversary import ProjectedAdversary
from vfmvae.training.engine import EngineConfig
from vfmvae.training.objective import image_losses, latent_losses
from vfmvae.training.stages import LossWeights, TermSchedule

ADAPTIVE = replace(ALL_LOSSES, adaptive_adversarial=True)


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
    adversarial = {}
    for adversary in built.playing:
        seen = adversary.game.look(decoded, built.draws(0, GENERATOR), None)
        adversarial |= adversary.game.generator_losses(seen, output.targets, None, weights)
    reconstruction = sum(weights[name] * loss for name, loss in of_images.items())
    total = reconstruction
    if built.stage.losses.adaptive_adversarial:
        balanced = sum(weights[n] * adversarial.pop(n) for n in BALANCED_TERMS)
        ratio = adaptive_weight(reconstruction, balanced, tokenizer.last_decoder_weight, 1e4)
        total = total + ratio * balanced
    others = {**adversarial, **latent_losses(output, weights)}
    total = total + sum(weights[name] * loss for name, loss in others.items())
    if "alignment" in weights:
        alignment = tokenizer.alignment_loss(output.latents, output.encoded.layers)
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
        pytest.param(ADAPTIVE, id="adaptive"),
        pytest.param(replace(ADAPTIVE, feature_matching=0.0), id="adaptive, without feature matching"),
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
    generator_backward(built, part, begin(built, part, built.weights()), built.weights(), {})
    found = {n: p.grad for n, p in built.tokenizer.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name] is not None, name
        torch.testing.assert_close(
            found[name], gradient, rtol=2e-4, atol=1e-5 * gradient.norm().item() + 1e-9, msg=name
        )


def test_discriminators_learn_from_their_own_loss_alone() -> None:
    built = job()
    part = first_part(built)
    generator_backward(built, part, begin(built, part, built.weights()), built.weights(), {})
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
    from vfmvae.train_step import discriminator_step, discriminator_views, generator_step

    parts = [Part(to_unit(images), 0) for images in batch]
    weights = built.weights()
    fakes, targets = discriminator_views(built, parts, weights)
    for adversary in built.playing:
        discriminator_step(built, adversary, parts, fakes[adversary.name], targets, weights)
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


@pytest.mark.parametrize("losses", [ALL_LOSSES, ADAPTIVE], ids=["fixed", "adaptive"])
def test_an_accumulated_batch_plays_the_same_game(losses: LossWeights) -> None:
    whole, parts = job(losses, batch_size=16), job(losses, batch_size=16, accumulate=2)
    start = parameters(whole)
    (ours,), (theirs,) = steps(whole, 1), steps(parts, 1)
    assert ours.losses.keys() == theirs.losses.keys()
    for name, loss in ours.losses.items():
        torch.testing.assert_close(theirs.losses[name], loss, rtol=1e-4, atol=1e-5, msg=name)
    one, other = parameters(whole), parameters(parts)
    for part in ("tokenizer.", "projected.", "patch."):
        names = [name for name in one if name.startswith(part)]
        difference, moved = (
            torch.cat([(one[n] - found[n]).flatten() for n in names]).norm() for found in (other, start)
        )
        # Not as close for every single number: batch norms of the discriminators enlarge the last digits.
        assert difference < 2e-3 * moved, part


@pytest.mark.parametrize("engine", [{}, {"accumulate": 2}, {"share_forward": False}])
def test_spectral_norms_are_iterated_three_times_per_step(engine: dict[str, Any]) -> None:
    # In the published step the passes iterate: real and generated images, then the tokenizer's.
    built = job(LossWeights(alignment=0.5, adversarial=0.3), **engine)
    (adversary,) = built.adversaries
    assert isinstance(adversary.game, ProjectedAdversary)
    discriminator = adversary.game.discriminator
    for _ in range(2):
        by_hand = copy.deepcopy(discriminator)
        steps(built, 1)
        for _ in range(2):
            by_hand.iterate_spectral_norms()
        updated = dict(discriminator.named_parameters())
        for name, parameter in by_hand.named_parameters():
            parameter.data.copy_(updated[name])
        by_hand.iterate_spectral_norms()
        found = dict(discriminator.named_buffers())
        for name, expected in by_hand.named_buffers():
            assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("losses", [LossWeights(alignment=0.5), LossWeights(adversarial=0.3)])
@pytest.mark.parametrize("share_forward", [True, False])
def test_the_mean_style_moves_once_per_update(losses: LossWeights, share_forward: bool) -> None:
    whole, parts = (
        job(losses, batch_size=8, accumulate=count, share_forward=share_forward) for count in (1, 4)
    )
    seen: list[Tensor] = []
    hook = whole.tokenizer.style.register_forward_hook(lambda _, __, style: seen.append(style.mean(dim=0)))
    steps(whole, 1), steps(parts, 1)
    hook.remove()
    average = whole.tokenizer.style.average
    torch.testing.assert_close(average, 0.005 * seen[-1].detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.tokenizer.style.average, average, rtol=1e-5, atol=1e-8)
    if not losses.adversarial:  # its batch norms see the parts
        steps(whole, 2), steps(parts, 2)
        torch.testing.assert_close(parts.tokenizer.style.average, average, rtol=1e-4, atol=1e-7)


def test_an_adaptive_weight_is_kept_between_measurements() -> None:
    built = job(LossWeights(alignment=0.5), adaptive_every=3)
    factors = [r.losses["alignment_factor"].item() for r in steps(built, 5)]
    assert factors[0] == factors[1] == factors[2] != factors[3] == factors[4]


def test_the_adaptive_adversarial_weight_is_kept_between_measurements() -> None:
    built = job(LossWeights(alignment=0.5, adversarial=0.3, adaptive_adversarial=True), adaptive_every=2)
    results = steps(built, 3)
    factors = [r.losses["adversarial_factor"].item() for r in results]
    assert 1 != factors[0] == factors[1] != factors[2]
    first = {name: loss.item() for name, loss in results[0].losses.items()}
    expected = first["l1"] + 0.1 * first["multiscale_l1"] + 1e-6 * first["kl"]
    expected += factors[0] * 0.3 * first["adversarial"] + first["alignment_factor"] * first["alignment"]
    assert first["total"] == pytest.approx(expected, rel=1e-5)


def test_recomputed_blocks_give_the_same_update() -> None:
    kept, again = job(), job(recompute=True)
    steps(kept, 2), steps(again, 2)
    assert largest_difference(parameters(kept), parameters(again)) < 1e-6


def test_a_discriminator_whose_update_is_skipped_counts() -> None:
    built = job(ALL_LOSSES)
    steps(built, 1)
    numbers = built.playing[0].guard.state_dict()
    numbers["mean_norm"].fill_(1e-9)
    numbers["good"].fill_(1000)
    weights = {n: p.clone() for n, p in built.playing[0].game.named_parameters()}
    built.begin_step()
    result = training_step(built, next(built.batches(built.state.step)), built.weights())
    assert result.skipped == 1 and built.guard.skipped == 0
    assert built.skips_in_a_row() == 1
    for name, parameter in built.playing[0].game.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_a_late_term_is_balanced_from_its_first_step() -> None:
    late = stage(LossWeights(alignment=0.5), schedules=(TermSchedule(term="alignment", start=4),))
    built = Job(tiny(stages=(late,), batch_size=4, engine=EngineConfig(adaptive_every=5)))
    built.enter_stage(0)
    ratio = built.adaptive["alignment"].ratio
    steps(built, 1)
    assert ratio == 1
    steps(built, 1)
    measured = ratio.clone()
    assert measured != 1
    steps(built, 1)
    assert ratio == measured, "and then in every fifth step"
