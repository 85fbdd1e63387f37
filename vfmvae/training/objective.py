"""The gradients of a tokenizer's loss, measured where they are small.

One update sums many losses. Those of the image meet at the decoder's output, those of the latents at the cut
between encoder side and decoder (`StepOutput.leaf`). So each loss is differentiated once, down to the image
or to the latents, and the sums are carried on by one backward pass through the decoder and one through the
encoder side. The adaptive weight of the alignment loss (VQGAN, arXiv 2012.09841) reads the same gradients:
beside an adversarial loss it costs one more pass through the decoder without weight gradients, else nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.losses.alignment import gradient_ratio
from vfmvae.losses.reconstruction import l1_loss, l2_loss, multiscale_l1_loss, ssim_loss
from vfmvae.tokenizer import DiscretePosterior, Posterior, Tokenizer
from vfmvae.training.distributed import mean_over_ranks
from vfmvae.training.forward import StepOutput


def image_losses(
    images: Sequence[Tensor], targets: Tensor, weights: Mapping[str, float], perceptual: nn.Module | None
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


def latent_losses(output: StepOutput, weights: Mapping[str, float]) -> dict[str, Tensor]:
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


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor | None:
    """The sum of each loss times the weight of its name, a scalar; None without losses."""
    if not losses:
        return None
    return torch.stack([weights[name] * loss.float() for name, loss in losses.items()]).sum()


def cut(images: Sequence[Tensor]) -> list[Tensor]:
    """The same images, where new graphs begin."""
    return [image.detach().requires_grad_() for image in images]


def gradients_at(leaves: Sequence[Tensor], loss: Tensor | None, scale: Tensor) -> list[Tensor]:
    """Gradient of scale * loss at each leaf; zeros where it does not depend on one, or without a loss."""
    if loss is None:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(scale * loss, list(leaves), allow_unused=True)
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
    at_weight = [
        torch.autograd.grad(output.latents, weight, gradient, retain_graph=True)[0]
        for gradient in (reconstruction_at_leaf, alignment_at_leaf)
    ]
    return at_weight[0], at_weight[1]


class AdaptiveWeight:
    """The ratio of gradient norms that balances the alignment loss, as measured last; 1 before that."""

    def __init__(self, device: torch.device) -> None:
        self.ratio = torch.ones((), device=device)

    def measure(self, of_reconstruction: Tensor, of_alignment: Tensor) -> None:
        """Take the two gradients at the last fusion weight, this process's share; averaged over processes.

        One that is not finite leaves the ratio as it was: the step will be skipped.
        """
        mean_over_ranks(of_reconstruction, of_alignment)
        ratio = gradient_ratio(of_reconstruction, of_alignment)
        self.ratio.copy_(torch.where(ratio.isfinite(), ratio, self.ratio))

    def state_dict(self) -> dict[str, Tensor]:
        return {"ratio": self.ratio}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.ratio.copy_(state["ratio"])


class DeferredAlignment:
    """The alignment loss's gradient, kept apart while a batch is accumulated in parts.

    Its adaptive weight is that of the whole batch, which is known after the last part.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._weight = tokenizer.last_fusion_weight
        modules = (tokenizer.encoder, tokenizer.fusion, tokenizer.bottleneck)
        self._encoder_side = [p for m in modules for p in m.parameters() if p.requires_grad]
        self._own = [p for p in tokenizer.align.parameters() if p.requires_grad]
        self._sums: dict[Tensor, Tensor] = {p: torch.zeros_like(p) for p in (*self._encoder_side, *self._own)}
        self._reconstruction = torch.zeros_like(self._weight)

    def add(self, output: StepOutput, reconstruction_at_leaf: Tensor | None, scale: Tensor) -> None:
        """Take in one part, before its graphs are freed."""
        assert output.alignment is not None
        loss = scale * output.alignment
        if output.leaf.requires_grad:
            (at_leaf,) = torch.autograd.grad(loss, output.leaf, retain_graph=True)
            self._add(
                self._encoder_side,
                torch.autograd.grad(
                    output.latents, self._encoder_side, at_leaf, retain_graph=True, allow_unused=True
                ),
            )
        if reconstruction_at_leaf is not None:
            self._reconstruction += torch.autograd.grad(
                output.latents, self._weight, reconstruction_at_leaf, retain_graph=True
            )[0]
        if self._own:
            self._add(self._own, torch.autograd.grad(loss, self._own, retain_graph=True))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """As `alignment_gradients`, of all parts together."""
        mean_over_ranks(*self._sums.values())
        return self._reconstruction, self._sums[self._weight]

    def add_to_gradients(self, factor: Tensor) -> None:
        """Add the sum, times the weight of the loss, to the parameters' gradients."""
        for parameter, gradient in self._sums.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(factor * gradient)

    def _add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                self._sums[parameter] += gradient


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
