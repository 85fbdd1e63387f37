"""The alignment loss and the posterior, which kernels.py measures."""

from __future__ import annotations

import math
from functools import partial

import torch
from case import Case, Operation, Shape, activations, flops
from torch import Tensor

from vfmvae import ops
from vfmvae.ops.alignment import _VF_ALIGNMENT
from vfmvae.ops.posterior import _GAUSSIAN_POSTERIOR

FEATURES: dict[str, list[Shape]] = {  # [B, N, D]: latent positions and features of the encoder
    "demo": [(8, 64, 128)],
    "full": [(1, 256, 1024), (1, 1024, 1024), (1, 4096, 1024)],
    "odd": [(1, 1, 8), (3, 131, 40), (1, 300, 24)],
}
LATENTS: dict[str, list[Shape]] = {  # [B, C, h, w]
    "demo": [(8, 8, 8, 8)],
    "full": [(1, 32, 16, 16), (1, 32, 32, 32), (1, 16, 64, 64)],
    "odd": [(1, 1, 1, 1), (3, 5, 3, 7), (2, 33, 9, 5)],
}


def vf_alignment_loss(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Forward with the gradient, which the backward pass scales.

    Of the three products of a sample, b b^T, a a^T and signs times b, the first two are symmetric: half of
    each would do.
    """
    target = activations(shape, dtype, device)
    prediction = target + activations(shape, dtype, device)
    function = partial(ops.vf_alignment_loss, distance_margin=0.25, cosine_margin=0.5)

    def loss(prediction: Tensor, *, fused: bool | str) -> Tensor:
        return function(prediction, target, fused=fused)

    batch, count, width = shape
    scaled = 1 / (4 * count)  # in the backward pass, which reads the gradient that the forward made
    work = flops(4.0 * batch * count * count * width, inputs=scaled, backward=scaled)
    return Case(loss, [prediction], 1, work, "matrix", reads=(0,))


def gaussian_posterior(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """With the noise of a seed, about 60 operations of integers per number."""
    batch, channels, height, width = shape
    both = activations((batch, 2 * channels, height, width), dtype, device)
    seed = torch.tensor([1, 0], device=device)

    def latents(both: Tensor, *, fused: bool | str) -> Tensor:
        z, kl = ops.gaussian_posterior(*both.chunk(2, dim=1), seed, fused=fused)
        return z + kl.view(-1, 1, 1, 1).to(z.dtype)

    return Case(latents, [both], 1, flops(90 * math.prod(shape), 1), "fma", reads=(0,))


OPERATIONS = {
    "vf_alignment_loss": Operation(_VF_ALIGNMENT, vf_alignment_loss, FEATURES),
    "gaussian_posterior": Operation(_GAUSSIAN_POSTERIOR, gaussian_posterior, LATENTS),
}
