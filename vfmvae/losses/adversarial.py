"""Adversarial losses: logits (or features) in, scalar out, computed in float32. None has a unit.

Logits have any shape, positive for real under the hinge loss, near one for real under the least-squares loss;
losses are means over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean(relu(1 - real)) + mean(relu(1 + fake)); 2 for a discriminator that says 0 to all.

    Geometric GAN (arXiv 1705.02894), as StyleGAN-T (arXiv 2301.09515) uses it.
    """
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean(fake): the generator's side of the hinge loss, which has no bound."""
    return -fake.float().mean()


def lsgan_discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """mean((real - 1)^2) + mean(fake^2), mean over the scales that the sequences list; 1 for "0" to all.

    LSGAN (arXiv 1611.04076) halves this, which Adam does not see.

    Raises:
        ValueError: no scale, or not the same scales on both sides.
    """
    _check_scales(real, fake)
    losses = [
        (r.float() - 1).square().mean() + f.float().square().mean() for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def lsgan_generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """mean((fake - 1)^2), mean over scales; not halved, as in pix2pixHD (arXiv 1711.11585)."""
    _check_scales(fake, fake)
    return torch.stack([(f.float() - 1).square().mean() for f in fake]).mean()


def feature_matching_loss(
    fake_features: Sequence[Sequence[Tensor]], real_features: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Distance of discriminator features, [scale][layer], generated from real; in units of the features.

    Per scale 4 / layers times the sum over layers of the mean absolute difference, then the mean over scales;
    no gradient reaches the real side. pix2pixHD (arXiv 1711.11585), with four layers before the logits.

    Raises:
        ValueError: the two sides differ in scales, layers or shapes.
    """
    _check_scales(real_features, fake_features)
    losses = []
    for fake, real in zip(fake_features, real_features, strict=True):
        if [f.shape for f in fake] != [r.shape for r in real] or not fake:
            raise ValueError(
                f"features of generated images {[list(f.shape) for f in fake]} and real ones "
                f"{[list(r.shape) for r in real]} must be of the same layers and shapes"
            )
        distances = [(f.float() - r.detach().float()).abs().mean() for f, r in zip(fake, real, strict=True)]
        losses.append(4 * torch.stack(distances).mean())
    return torch.stack(losses).mean()


def r1_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """Squared gradient norm of an image's mean logit at the image, mean over the batch; differentiable.

    Mescheder et al. (arXiv 1801.04406), without their factor gamma / 2. An image with many logits is judged
    by their mean, as in the losses, so the penalty does not grow with their number.

    Args:
        images: real images [B, 3, H, W] that require a gradient, from which `logits` were computed.
        logits: [B, ...].

    Raises:
        ValueError: the images do not require a gradient.
    """
    if not images.requires_grad:
        raise ValueError("r1_penalty needs images with requires_grad_() before the discriminator sees them")
    of_each = logits.float().flatten(1).mean(dim=1)
    (gradient,) = torch.autograd.grad(of_each.sum(), images, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


def _check_scales(real: Sequence[object], fake: Sequence[object]) -> None:
    if not real or len(real) != len(fake):
        raise ValueError(
            f"discriminator outputs of {len(real)} scales for real and {len(fake)} for generated images; "
            f"the same number is needed, at least one"
        )
