"""The ratio of gradient norms, and gradients that are kept apart, against autograd of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tokenizer.tiny import tiny_tokenizer
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.equivariance import Equivariance
from vfmvae.training.adaptive import (
    LIMITS,
    AdaptiveWeight,
    DeferredLoss,
    deferred_adversarial,
    deferred_alignment,
)
from vfmvae.training.forward import StepOutput, TrainingForward


def test_the_weight_is_the_ratio_of_norms_and_survives_nan() -> None:
    weight = AdaptiveWeight(torch.device("cpu"))
    assert weight.ratio == 1
    weight.measure(torch.full((4,), 3.0), torch.full((4,), 0.5))
    assert weight.ratio.item() == pytest.approx(6.0, rel=1e-3)
    weight.measure(torch.full((4,), torch.nan), torch.ones(4))
    assert weight.ratio.item() == pytest.approx(6.0, rel=1e-3)
    other = AdaptiveWeight(torch.device("cpu"))
    other.load_state_dict(weight.state_dict())
    assert other.ratio == weight.ratio


def test_each_ratio_has_its_published_limit() -> None:
    assert LIMITS == {"alignment": 1e8, "adversarial": 1e4}
    for limit in LIMITS.values():
        weight = AdaptiveWeight(torch.device("cpu"), limit)
        weight.measure(torch.tensor([1e6]), torch.tensor([0.0]))  # 1e10, with 1e-4 below
        assert weight.ratio == limit


def trained_tokenizer(encoder: bool) -> Tokenizer:
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer().double().train()
    tokenizer.encoder.requires_grad_(encoder)
    return tokenizer


def outputs(tokenizer: Tokenizer) -> list[StepOutput]:
    """Of two images, each a part."""
    generator = torch.Generator().manual_seed(5)
    forward = TrainingForward(tokenizer)
    found = []
    for _ in range(2):
        image = torch.rand(1, 3, 64, 64, generator=generator, dtype=torch.float64) * 2 - 1
        noise = torch.randn(1, 8, 4, 4, generator=generator, dtype=torch.float64)
        found.append(forward(image, noise, Equivariance(), True))
    return found


def losses_of(tokenizer: Tokenizer, output: StepOutput) -> dict[str, Tensor]:
    """Stand-ins for the image and adversarial losses, and the alignment; not cut at the latents."""
    image, *_ = tokenizer.decode(output.latents, return_multiscale=True)
    return {
        "reconstruction": (image - 0.5).square().mean(),
        "adversarial": image.sin().mean(),
        "alignment": tokenizer.alignment_loss(output.latents, output.encoded.layers),
    }


def kept_apart(tokenizer: Tokenizer, name: str, weight: float) -> DeferredLoss:
    """What two parts leave, each with half of the weight."""
    kept = deferred_adversarial(tokenizer) if name == "adversarial" else deferred_alignment(tokenizer, weight)
    half = torch.tensor(0.5, dtype=torch.float64)
    for output in outputs(tokenizer):
        image = output.images[0]
        of_image = torch.autograd.grad((image - 0.5).square().mean() / 2, image, retain_graph=True)[0]
        if name == "adversarial":
            kept.add(output, image, weight * torch.autograd.grad(image.sin().mean() / 2, image)[0])
            kept.add_reconstruction(image, of_image)
        else:
            assert output.alignment is not None
            at_leaf = torch.autograd.grad(image, output.leaf, of_image, retain_graph=True)[0]
            kept.add(output, output.alignment, half)
            kept.add_reconstruction(output.latents, at_leaf)
    return kept


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("name", ["adversarial", "alignment"])
def test_parts_add_up_to_the_gradients_of_the_whole(name: str, encoder: bool) -> None:
    tokenizer = trained_tokenizer(encoder)
    kept = kept_apart(tokenizer, name, weight=0.3)
    of_reconstruction, of_loss = (gradient.clone() for gradient in kept.gradients())
    tokenizer.align.weight.grad = torch.ones_like(tokenizer.align.weight)
    kept.add_to_gradients(torch.tensor(2.0, dtype=torch.float64))

    plain = trained_tokenizer(encoder)
    found = [losses_of(plain, output) for output in outputs(plain)]
    reconstruction, loss = (sum(each[n] for each in found) / 2 for n in ("reconstruction", name))
    assert isinstance(reconstruction, Tensor) and isinstance(loss, Tensor)
    at = plain.last_decoder_weight if name == "adversarial" else plain.last_fusion_weight
    expected = [torch.autograd.grad(each, at, retain_graph=True)[0] for each in (reconstruction, loss)]
    torch.testing.assert_close(of_reconstruction, expected[0])
    torch.testing.assert_close(of_loss, expected[1] * (0.3 if name == "adversarial" else 1.0))
    (2.0 * 0.3 * loss).backward()
    for (which, parameter), theirs in zip(tokenizer.named_parameters(), plain.parameters(), strict=True):
        already = 1.0 if which == "align.weight" else 0.0
        gradient = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        ours = torch.zeros_like(theirs) if parameter.grad is None else parameter.grad
        limit = 1e-5 if which.startswith("encoder.") else 1e-9  # its features are float32
        assert (ours - gradient - already).norm() <= limit * gradient.norm() + 1e-15, which
