"""The gradients of a tokenizer's loss, measured where they are small.

One update sums many losses. Those of the image meet at the decoder's output, those of the latents at the cut
between encoder side and decoder (`StepOutput.leaf`). So each loss is differentiated once, down to the image
or to the latents, and the sums are carried on by one backward pass through the decoder and one through the
encoder side. Adaptive weights (vfmvae.training.adaptive) read the same gradients: that of the alignment loss
costs one more pass through the decoder without weight gradients beside an adversarial loss, else nothing;
that of the adversarial losses costs the way from the image to the decoder's last layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.losses.reconstruction import l1_loss, l2_loss, multiscale_l1_loss, ssim_loss
from vfmvae.tokenizer import DiscretePosterior, Posterior
from vfmvae.training.forward import StepOutput

Weights = Mapping[str, float | Tensor]
"""Of the terms that are on, by name: numbers, or scalars on the device."""


def image_losses(
    images: Sequence[Tensor], targets: Tensor, weights: Weights, perceptual: nn.Module | None
) -> dict[str, Tensor]:
    """The terms that compare with the target, unweighted scalars; those without a weight are left out.

    images: reconstruction [B, 3, H, W] and the smaller ones; targets [B, 3, H, W], both about [-1, 1].
    """
    image = images[0]
    losses = {}
    if "l1" in weights:
        losses["l1"] = l1_loss(image, targets)
    if "l2" in weights:
        losses["l2"] = l2_loss(image, targets)
    if "multiscale_l1" in weights:
        losses["multiscale_l1"] = multiscale_l1_loss(images[1:], targets)
    if "perceptual" in weights:
        assert perceptual is not None
        losses["perceptual"] = perceptual(image, targets).mean()
    if "ssim" in weights:
        losses["ssim"] = ssim_loss(image, targets)
    return losses


def latent_losses(output: StepOutput, weights: Weights) -> dict[str, Tensor]:
    """The terms that the posterior gives by itself, unweighted scalars, and the distance from a snapshot."""
    losses = {}
    posterior = output.posterior
    if isinstance(posterior, Posterior) and "kl" in weights:
        losses["kl"] = posterior.kl().mean()
    if isinstance(posterior, DiscretePosterior):
        if "quantization" in weights:
            losses["quantization"] = posterior.quantization_loss
        if "entropy" in weights:
            losses["entropy"] = posterior.entropy_loss
    if output.preservation is not None:
        losses["preservation"] = output.preservation
    return losses


def weighted_sum(losses: Mapping[str, Tensor], weights: Weights) -> Tensor | None:
    """The sum of each loss times the weight of its name, a scalar; None without losses."""
    if not losses:
        return None
    return torch.stack([weights[name] * loss.float() for name, loss in losses.items()]).sum()


def cut(images: Sequence[Tensor]) -> list[Tensor]:
    """The same images, where new graphs begin."""
    return [image.detach().requires_grad_() for image in images]


def gradients_at(
    leaves: Sequence[Tensor], loss: Tensor | None, scale: Tensor, retain: bool = False
) -> list[Tensor]:
    """Gradient of scale * loss at each leaf; zeros where it does not depend on one, or without a loss.

    `retain`: another gradient through the same graph follows.
    """
    if loss is None:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(scale * loss, list(leaves), retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def decoder_backward(
    output: StepOutput, reconstruction: list[Tensor], adversarial: Tensor | None, measure: bool
) -> Tensor | None:
    """Backward from the images to the decoder's weights and to `output.leaf`.

    Args:
        reconstruction: gradient of the image losses at each image.
        adversarial: gradient of the adversarial losses at the reconstruction.
        measure: return the gradient of the image losses alone at `output.leaf`.
    """
    at_leaf = None
    if measure and adversarial is not None:
        with ops.input_gradients_only():
            (at_leaf,) = torch.autograd.grad(output.images, output.leaf, reconstruction, retain_graph=True)
    total = list(reconstruction)
    if adversarial is not None:
        total[0] = total[0] + adversarial
    # Where the smaller blocks are frozen, their images have no graph.
    rooted = [pair for pair in zip(output.images, total, strict=True) if pair[0].requires_grad]
    if rooted:
        images, gradients = zip(*rooted, strict=True)
        torch.autograd.backward(images, gradients)
    if measure and adversarial is None:
        assert output.leaf.grad is not None
        at_leaf = output.leaf.grad.clone()
    return at_leaf


def alignment_gradients(
    output: StepOutput, weight: Tensor, reconstruction_at_leaf: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients at a weight of the encoder side, times `scale`: of the image losses, and of the alignment."""
    assert output.alignment is not None
    (alignment_at_leaf,) = torch.autograd.grad(scale * output.alignment, output.leaf, retain_graph=True)
    return pair_at(weight, output.latents, (reconstruction_at_leaf, alignment_at_leaf))


def pair_at(weight: Tensor, root: Tensor, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two gradients at `root`, carried on to a weight that it was computed with; the graph is kept."""
    one, other = (torch.autograd.grad(root, weight, g, retain_graph=True)[0] for g in gradients)
    return one, other


def encoder_backward(output: StepOutput, loss: Tensor | None, scale: Tensor) -> None:
    """Backward from `output.leaf.grad`, and from scale * loss of the posterior, to the encoder side."""
    if not output.latents.requires_grad:
        return
    assert output.leaf.grad is not None
    roots, gradients = [output.latents], [output.leaf.grad]
    if loss is not None and loss.requires_grad:
        roots.append(loss)
        gradients.append(scale.to(loss.dtype))
    torch.autograd.backward(roots, gradients)
