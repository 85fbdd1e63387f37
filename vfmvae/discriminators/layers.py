"""Layers that both discriminators are made of. Parameters and statistics are float32; an input in another
dtype is worked on in that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae import ops

GROUP_SIZE = 8
SLOPE = 0.2


class LocalBatchNorm(nn.Module):
    """Batch normalisation over groups of at most 8 images, in training and evaluation alike; affine.

    [B, C, ...] -> the same. The batch is cut into ceil(B / 8) contiguous groups of equal size, so what an
    image is compared with does not depend on the batch size or the number of processes (StyleGAN-T,
    arXiv 2301.09515). There are no running statistics. Variance is biased, eps 1e-5.
    """

    EPS = 1e-5
    fused: bool = True

    def __init__(self, channels: int, slope: float = 1.0) -> None:
        """`slope`: of a leaky ReLU behind the affine; 1 for none."""
        super().__init__()
        self.slope = slope
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, batches: int = 1) -> Tensor:
        """`batches`: so many equal batches one after another, which are not compared with each other."""
        groups = batches * group_count(len(x) // batches)
        return ops.local_batch_norm(x, groups, self.weight, self.bias, self.EPS, self.slope, fused=self.fused)


def group_count(batch: int) -> int:
    """How many groups a batch is cut into. Raises ValueError where they would not be of equal size."""
    groups = math.ceil(batch / GROUP_SIZE)
    if batch % groups:
        raise ValueError(
            f"a batch of {batch} images per process cannot be cut into {groups} equal groups for the "
            f"discriminator's batch norm; use at most {GROUP_SIZE} images, or a multiple of {GROUP_SIZE}"
        )
    return groups


class SpectralConv1d(nn.Module):
    """Convolution over tokens, [B, in, N] -> [B, out, N], circular, its weight divided by its spectral norm.

    The norm is estimated by power iteration (arXiv 1802.05957): u' W v for the vectors in the buffers `u` and
    `v`. In training mode each forward does one iteration first and stores the vectors; in eval mode nothing
    is written. The iteration sees the parameters alone, so the vectors are equal on all processes. A graph
    from before an iteration stays valid.
    """

    EPS = 1e-12
    FIRST_ITERATIONS = 15
    u: Tensor
    v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1) -> None:
        """`kernel` is odd."""
        super().__init__()
        plain = nn.Conv1d(in_channels, out_channels, kernel)
        assert plain.bias is not None
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0, eps=self.EPS))
        self.register_buffer("v", F.normalize(torch.randn(in_channels * kernel), dim=0, eps=self.EPS))
        for _ in range(self.FIRST_ITERATIONS):
            self.iterate()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.iterate()
        reach = self.weight.shape[2] // 2
        if reach:
            x = F.pad(x, (reach, reach), mode="circular")
        return F.conv1d(x, self.normalised_weight().to(x.dtype), self.bias.to(x.dtype))

    def normalised_weight(self) -> Tensor:
        """The weight that is applied, [out, in, kernel]; the norm is differentiated, u and v are not."""
        # The graph keeps what it multiplies with, and the next iteration writes into the buffers.
        u, v = self.u.clone(), self.v.clone()
        return self.weight / torch.dot(u, torch.mv(self.weight.flatten(1), v))

    @torch.no_grad()
    def iterate(self) -> None:
        """One power iteration; `u` and `v` follow the weight."""
        matrix = self.weight.flatten(1)
        self.v.copy_(F.normalize(torch.mv(matrix.T, self.u), dim=0, eps=self.EPS))
        self.u.copy_(F.normalize(torch.mv(matrix, self.v), dim=0, eps=self.EPS))


@torch.no_grad()
def iterate_together(convolutions: Iterable[SpectralConv1d]) -> None:
    """`iterate` of each, those whose weights have equal shapes in the same few operations."""
    alike: dict[torch.Size, list[SpectralConv1d]] = {}
    for convolution in convolutions:
        alike.setdefault(convolution.weight.shape, []).append(convolution)
    for group in alike.values():
        matrices = torch.stack([c.weight.flatten(1) for c in group])
        u, eps = torch.stack([c.u for c in group])[:, None], SpectralConv1d.EPS
        v = F.normalize(torch.bmm(u, matrices), dim=2, eps=eps)  # [convolutions, 1, in * kernel]
        u = F.normalize(torch.bmm(v, matrices.mT), dim=2, eps=eps)
        torch._foreach_copy_([c.v for c in group], list(v[:, 0].unbind()))
        torch._foreach_copy_([c.u for c in group], list(u[:, 0].unbind()))
