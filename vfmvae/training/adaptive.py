"""Adaptive weights: a loss is balanced against the reconstruction by the ratio of their gradients' norms.

The gradients are compared at one weight: those of the alignment loss at the last of the fusion (VA-VAE, arXiv
2501.01423), those of the adversarial losses at the decoder's last layer (VQGAN, arXiv 2012.09841). The
reconstruction is the sum of all image terms with their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vfmvae.losses.alignment import MAX_WEIGHT, gradient_ratio
from vfmvae.tokenizer import Tokenizer
from vfmvae.training.distributed import mean_over_ranks
from vfmvae.training.forward import StepOutput

Balanced = Literal["alignment", "adversarial"]
"""What may have an adaptive weight."""
LIMITS: dict[Balanced, float] = {"alignment": MAX_WEIGHT, "adversarial": 1e4}
"""The largest ratio of each."""
BALANCED_TERMS = ("adversarial", "patch_adversarial")
"""The terms that share the adaptive weight of the adversarial losses; feature matching has no part in it."""


class AdaptiveWeight:
    """The ratio of gradient norms that balances a loss, as measured last; 1 before that."""

    def __init__(self, device: torch.device, limit: float = MAX_WEIGHT) -> None:
        self.ratio = torch.ones((), device=device)
        self._limit = limit

    def measure(self, of_reconstruction: Tensor, of_loss: Tensor) -> None:
        """Take the two gradients at one weight, this process's share; averaged over processes.

        One that is not finite leaves the ratio as it was: the step will be skipped.
        """
        mean_over_ranks(of_reconstruction, of_loss)
        ratio = gradient_ratio(of_reconstruction, of_loss, self._limit)
        self.ratio.copy_(torch.where(ratio.isfinite(), ratio, self.ratio))

    def state_dict(self) -> dict[str, Tensor]:
        return {"ratio": self.ratio}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.ratio.copy_(state["ratio"])


class DeferredLoss:
    """The gradient of a loss with an adaptive weight, kept apart while a batch is accumulated in parts.

    The weight is that of the whole batch, which is known after the last part. This costs another gradient of
    every parameter that the loss reaches, and a backward pass of its own for each part: through the encoder
    side for the alignment loss, through the whole tokenizer for adversarial losses.
    """

    def __init__(
        self,
        at: Tensor,
        encoder_side: Sequence[nn.Module],
        beyond: Sequence[nn.Module],
        weight: float | Tensor,
    ) -> None:
        """at: the weight where gradients are compared, in one of the modules. beyond: the modules between the
        latents and the loss. weight: of the loss, beside the adaptive one."""
        self.weight = weight
        self._at = at
        self._encoder_side, self._beyond = (
            [p for m in modules for p in m.parameters() if p.requires_grad]
            for modules in (encoder_side, beyond)
        )
        self._sums: dict[Tensor, Tensor] = {
            p: torch.zeros_like(p) for p in (*self._encoder_side, *self._beyond)
        }
        self._reconstruction = torch.zeros_like(at)

    def add(self, output: StepOutput, loss: Tensor, gradient: Tensor) -> None:
        """Take in one part, before its graphs are freed: `gradient` at `loss`, or at what it comes from."""
        leaf = [output.leaf] if output.leaf.requires_grad else []
        found = torch.autograd.grad(
            loss, [*self._beyond, *leaf], gradient, retain_graph=True, allow_unused=True
        )
        self._add(self._beyond, found[: len(self._beyond)])
        if leaf and self._encoder_side:
            self._add(
                self._encoder_side,
                torch.autograd.grad(
                    output.latents, self._encoder_side, found[-1], retain_graph=True, allow_unused=True
                ),
            )

    def add_reconstruction(self, root: Tensor, gradient: Tensor) -> None:
        """Take in the image losses of one part: their gradient at `root`, which leads to the weight."""
        self._reconstruction += torch.autograd.grad(root, self._at, gradient, retain_graph=True)[0]

    def gradients(self) -> tuple[Tensor, Tensor]:
        """At the weight, of all parts together: of the image losses, and of this loss."""
        mean_over_ranks(*self._sums.values())
        return self._reconstruction, self._sums[self._at]

    def add_to_gradients(self, factor: Tensor) -> None:
        """Add the sum, times both weights of the loss, to the parameters' gradients."""
        for parameter, gradient in self._sums.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(self.weight * factor * gradient)

    def _add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                self._sums[parameter] += gradient


def deferred_alignment(tokenizer: Tokenizer, weight: float | Tensor) -> DeferredLoss:
    """For `add(output, output.alignment, ...)` and `add_reconstruction(output.latents, ...)`."""
    return DeferredLoss(tokenizer.last_fusion_weight, _encoder_side(tokenizer), [tokenizer.align], weight)


def deferred_adversarial(tokenizer: Tokenizer) -> DeferredLoss:
    """For `add(output, output.images[0], ...)` and `add_reconstruction(output.images[0], ...)`; the gradients
    have the weights of the terms already.
    """
    beyond = [tokenizer.decompress, tokenizer.style, tokenizer.decoder]
    return DeferredLoss(tokenizer.last_decoder_weight, _encoder_side(tokenizer), beyond, 1.0)


def _encoder_side(tokenizer: Tokenizer) -> list[nn.Module]:
    return [tokenizer.encoder, tokenizer.fusion, tokenizer.bottleneck]
