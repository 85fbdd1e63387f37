"""Losses and gradients in pieces against autograd of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tokenizer.tiny import tiny_tokenizer
from vfmvae.tokenizer.equivariance import Equivariance
from vfmvae.training.forward import StepOutput, TrainingForward
from vfmvae.training.objective import (
    alignment_gradients,
    cut,
    decoder_backward,
    encoder_backward,
    gradients_at,
    image_losses,
    pair_at,
    weighted_sum,
)

ONE = torch.tensor(1.0)


def test_only_terms_with_a_weight_are_computed() -> None:
    image, target = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    assert image_losses([image], target, {}, None) == {}
    found = image_losses([image], target, {"l1": 1.0, "l2": 1.0}, None)
    assert {name: loss.item() for name, loss in found.items()} == {"l1": 0.5, "l2": 0.25}


def test_the_sum_is_weighted_in_float32() -> None:
    losses = {"a": torch.tensor(2.0, dtype=torch.bfloat16), "b": torch.tensor(0.001)}
    total = weighted_sum(losses, {"a": 1.5, "b": 1.0, "unused": 9.0})
    assert total is not None and total.dtype == torch.float32
    assert total.item() == pytest.approx(3.001, abs=1e-6)
    assert weighted_sum({}, {}) is None


def test_gradients_are_zero_where_nothing_depends() -> None:
    first, second = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    found = gradients_at([first, second], first.square().sum(), torch.tensor(4.0))
    assert [g.tolist() for g in found] == [[8.0, 8.0], [0.0, 0.0, 0.0]]
    assert [g.sum() for g in gradients_at([first, second], None, ONE)] == [0, 0]


def test_a_graph_may_be_kept_for_another_gradient() -> None:
    leaf = torch.ones(2, requires_grad=True)
    loss = leaf.square().sum()
    found = [gradients_at([leaf], loss, ONE, retain)[0].tolist() for retain in (True, False)]
    assert found == [[2.0, 2.0], [2.0, 2.0]]


def output_of(align: bool = True) -> tuple[StepOutput, Tensor]:
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer().train()
    tokenizer.encoder.requires_grad_(False)
    images, noise = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 8, 4, 4)
    return TrainingForward(tokenizer)(images, noise, Equivariance(), align), tokenizer.last_fusion_weight


@pytest.mark.parametrize("adversarial", [True, False])
def test_the_cut_passes_add_up_to_the_whole(adversarial: bool) -> None:
    output, weight = output_of()
    leaves = cut(output.images)
    for leaf, image in zip(leaves, output.images, strict=True):
        assert leaf.is_leaf and torch.equal(leaf, image)
    at_images = gradients_at(leaves, sum(leaf.square().mean() for leaf in leaves), ONE)  # type: ignore[arg-type]
    at_image = torch.full_like(leaves[0], 0.01) if adversarial else None
    at_leaf = decoder_backward(output, at_images, at_image, measure=True)
    assert at_leaf is not None
    encoder_backward(output, None, ONE)

    whole, same_weight = output_of()
    reconstruction = sum(image.square().mean() for image in whole.images)
    total = reconstruction + (0.01 * whole.images[0].sum() if adversarial else 0.0)
    (expected_at_leaf,) = torch.autograd.grad(reconstruction, whole.leaf, retain_graph=True)  # type: ignore[arg-type]
    torch.testing.assert_close(at_leaf, expected_at_leaf)
    (of_total,) = torch.autograd.grad(total, whole.leaf)  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(whole.latents, same_weight, of_total)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


def test_images_of_frozen_blocks_have_no_part_in_it() -> None:
    tokenizer = tiny_tokenizer().train().requires_grad_(False)
    tokenizer.decoder.blocks[-1].requires_grad_(True)
    images, noise = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 8, 4, 4)
    output = TrainingForward(tokenizer)(images, noise, Equivariance(), False)
    assert not output.images[1].requires_grad
    decoder_backward(output, [torch.ones_like(image) for image in output.images], None, measure=False)
    encoder_backward(output, None, ONE)
    assert any(p.grad is not None for p in tokenizer.decoder.blocks[-1].parameters())


def test_the_two_gradients_at_the_last_fusion_weight() -> None:
    output, weight = output_of()
    at_leaf = torch.ones_like(output.leaf)
    found = alignment_gradients(output, weight, at_leaf, torch.tensor(3.0))
    assert output.alignment is not None
    (alignment_at_leaf,) = torch.autograd.grad(output.alignment, output.leaf, retain_graph=True)
    of_ones, of_alignment = (
        torch.autograd.grad(output.latents, weight, gradient, retain_graph=True)[0]
        for gradient in (at_leaf, alignment_at_leaf)
    )
    torch.testing.assert_close(found[0], of_ones)
    torch.testing.assert_close(found[1], 3 * of_alignment)


def test_two_gradients_are_carried_on_to_a_weight() -> None:
    weight, x = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([5.0, 7.0])
    found = pair_at(weight, weight * x, (torch.tensor([1.0, 1.0]), torch.tensor([0.0, -1.0])))
    assert [gradient.tolist() for gradient in found] == [[5.0, 7.0], [0.0, -7.0]]
