"""How alike two images look: structural similarity (Wang et al. 2004) and the distance of deep features that
LPIPS is made of (arXiv 1801.03924).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import lpips_compiled, ssim_compiled
from vfmvae.ops.dispatch import Fused, Implementation, Op

WINDOW, SIGMA = 11, 1.5
UNIT_EPSILON = 1e-10  # added to the length of a feature vector, where LPIPS v0.1 adds it


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0, *, fused: Fused = True) -> Tensor:
    """Mean structural similarity of each pair of images, [B]; 1 for equal images.

    Gaussian window 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, biased variances, averaged over channels and
    all positions where the window fits.

    Args:
        a, b: [B, C, H, W] with H, W >= 11; computed in float32 (float64 for float64).
        data_range: largest minus smallest possible value; 2 for images in [-1, 1].
    """
    if a.ndim != 4:
        raise ValueError(f"the images are {list(a.shape)}; needed is [B, C, H, W]")
    if a.shape != b.shape:
        raise ValueError(f"the images differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"the images are on {a.device} and {b.device}; they must be on one device")
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW} x {WINDOW} pixels, not {a.shape[-2]} x {a.shape[-1]}")
    return _SSIM(fused, a, b, data_range)


def ssim_reference(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(wide), b.to(wide)
    channels = a.shape[1]
    x = torch.arange(WINDOW, dtype=wide, device=a.device) - WINDOW // 2
    line = torch.exp(-0.5 * (x / SIGMA) ** 2)
    line = line / line.sum()

    def blur(image: Tensor) -> Tensor:
        image = F.conv2d(image, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(image, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a**2
    variance_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


_SSIM = Op(
    "ssim",
    ssim_reference,
    (
        Implementation("cuda", ssim_compiled.ssim, ssim_compiled.why_not_cuda),
        Implementation("cpu", ssim_compiled.ssim, ssim_compiled.why_not_cpu),
    ),
)


def lpips_distance(a: Tensor, b: Tensor, weights: Tensor | None = None, *, fused: Fused = True) -> Tensor:
    """Distance of two feature maps, [B]: one layer's term of LPIPS.

    With u(x) = x / (|x| + 1e-10), the length taken over channels at each position:

        mean over positions of sum over channels of weights * (u(a) - u(b))^2

    A position where all channels are 0 gets no gradient (the slope there would be 1e10).

    Args:
        a, b: [B, C, H, W] of one shape.
        weights: [C]; None for ones, and then the distance is at most 4.

    Returns:
        [B], computed in float32 for 16-bit inputs and otherwise in the wider dtype of the two.

    Raises:
        ValueError: shapes that do not go together.
    """
    if a.shape != b.shape:
        raise ValueError(f"the feature maps differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim != 4:
        raise ValueError(f"feature maps must be [B, C, H, W], got {tuple(a.shape)}")
    if a.device != b.device or (weights is not None and weights.device != a.device):
        places = ", ".join(str(t.device) for t in (a, b, weights) if t is not None)
        raise ValueError(f"feature maps and weights are on {places}; they must be on one device")
    if weights is not None and weights.shape != a.shape[1:2]:
        raise ValueError(f"weights {tuple(weights.shape)} do not fit maps of {a.shape[1]} channels")
    return _LPIPS_DISTANCE(fused, a, b, weights)


def lpips_distance_reference(a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    difference = (_unit(a.to(wide)) - _unit(b.to(wide))).square()
    if weights is not None:
        difference = difference * weights.to(wide).view(-1, 1, 1)
    return difference.sum(dim=1).mean(dim=(1, 2))


def _unit(x: Tensor) -> Tensor:
    """[B, C, H, W] with length 1 over the channels; 0 stays 0."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * torch.where(length > 0, 1.0 / (length + UNIT_EPSILON), 0.0)


_LPIPS_DISTANCE = Op(
    "lpips_distance",
    lpips_distance_reference,
    (
        Implementation("triton", lpips_compiled.lpips_distance_triton, lpips_compiled.why_not_triton),
        Implementation("cpu", lpips_compiled.lpips_distance_cpu, lpips_compiled.why_not_cpu),
    ),
)
