"""The weight of the alignment loss, balanced against the reconstruction loss.

The loss itself is `vfmvae.ops.vf_alignment_loss`, which a tokenizer calls with its margins.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_WEIGHT = 1e8


def adaptive_weight(reconstruction_loss: Tensor, alignment_loss: Tensor, weight: Tensor) -> Tensor:
    """Ratio of the two losses' gradient norms at `weight`, without gradient; a scalar.

    |d reconstruction / d weight| / (|d alignment / d weight| + 1e-4), clamped to [0, 1e8], as in VQGAN
    (arXiv 2012.09841) and VA-VAE (arXiv 2501.01423). Both graphs are kept for the backward pass that follows.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, weight, retain_graph=True)
    (of_alignment,) = torch.autograd.grad(alignment_loss, weight, retain_graph=True)
    ratio = of_reconstruction.float().norm() / (of_alignment.float().norm() + 1e-4)
    return ratio.clamp(0.0, MAX_WEIGHT).detach()
