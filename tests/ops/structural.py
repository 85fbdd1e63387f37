"""How the forms of ssim are checked wherever they run: pairs of images, both gradients against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.helpers import RELATIVE_LIMITS, assert_kernel_close
from vfmvae.ops.perceptual import ssim_reference

FEW = 500
"""With fewer windows the largest error of PyTorch is a matter of luck."""


def pair(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Two images in [-1, 1]: smooth and rough, and the same with noise."""
    height, width = shape[-2:]
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    image = 0.6 * torch.sin(y + 1.3 * x) + 0.2 * torch.randn(shape)
    noisy = 0.9 * image + 0.1 + 0.1 * torch.randn(shape)
    a, b = (t.clamp(-1, 1).to(device).to(dtype) for t in (image, noisy))
    return a, b


def index_and_gradients(function: Callable[..., Tensor], a: Tensor, b: Tensor, grad: Tensor) -> list[Tensor]:
    """The index of each pair and the gradients of both images."""
    own = [x.detach().requires_grad_() for x in (a, b)]
    index = function(*own, 2.0)
    return [index.detach(), *torch.autograd.grad(index, own, grad.to(index.dtype))]


def check_against_float64(a: Tensor, b: Tensor, function: Callable[..., Tensor]) -> None:
    """`function(a, b, 2.0)` as exact as the reference in the same precision; deterministic, memory as a's."""
    _, channels, height, width = a.shape
    windows = a.shape[0] * channels * (height - 10) * (width - 10)
    # So large that float16 can hold the gradient of a pixel.
    grad = channels * (height - 10) * (width - 10) * torch.randn(a.shape[0], device=a.device)
    ours = index_and_gradients(function, a, b, grad)
    eager = index_and_gradients(ssim_reference, a, b, grad)
    truth = index_and_gradients(ssim_reference, a.double(), b.double(), grad)
    for what, *results in zip(("index", "gradient of a", "gradient of b"), ours, eager, truth, strict=True):
        if windows >= FEW:
            # A pixel's gradient is a sum over the windows that it is in.
            assert_kernel_close(*results, what, terms=0 if what == "index" else 121)
        size = 1.0 if what == "index" else results[2].norm()  # the index of one window may be 0
        error = (results[0].double() - results[2]).norm() / size
        assert error <= RELATIVE_LIMITS[results[0].dtype], f"{what}: relative error {error:.3g}"
    for image, gradient in zip((a, b), ours[1:], strict=True):
        assert gradient.stride() == torch.ops.aten.empty_like(image).stride()
    again = index_and_gradients(function, a, b, grad)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True)), "not deterministic"
