"""The alignment loss between latents and foundation-model features ("VF" loss, arXiv 2501.01423).

Shapes: prediction and target [B, N, D].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops.dispatch import Fused, Op


def vf_alignment_loss(
    prediction: Tensor,
    target: Tensor,
    distance_margin: float = 0.0,
    cosine_margin: float = 0.0,
    distance_weight: float = 1.0,
    cosine_weight: float = 1.0,
    *,
    fused: Fused = True,
) -> Tensor:
    """Distance-matrix plus marginal cosine loss; a scalar in float32 (float64 for float64 input).

    With b = prediction and a = target, each position scaled to unit length:

        distance = mean over (batch, i, j) of relu(|b_i . b_j - a_i . a_j| - distance_margin)
        cosine   = mean over (batch, i) of relu(1 - cosine_margin - a_i . b_i)
        loss     = distance_weight * distance + cosine_weight * cosine

    Args:
        prediction: [B, N, D], projected latents; receives the gradient.
        target: [B, N, D], frozen features.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    return _VF_ALIGNMENT(
        fused, prediction, target, distance_margin, cosine_margin, distance_weight, cosine_weight
    )


def vf_alignment_loss_reference(
    prediction: Tensor,
    target: Tensor,
    distance_margin: float,
    cosine_margin: float,
    distance_weight: float,
    cosine_weight: float,
) -> Tensor:
    if prediction.element_size() < 4:
        prediction, target = prediction.float(), target.float()
    b, a = F.normalize(prediction, dim=-1), F.normalize(target.to(prediction.dtype), dim=-1)
    difference = (b @ b.transpose(1, 2) - a @ a.transpose(1, 2)).abs()  # [B, N, N]
    distance = F.relu(difference - distance_margin).mean()
    cosine = F.relu(1.0 - cosine_margin - (a * b).sum(dim=-1)).mean()
    return distance_weight * distance + cosine_weight * cosine


_VF_ALIGNMENT = Op("vf_alignment_loss", vf_alignment_loss_reference)
