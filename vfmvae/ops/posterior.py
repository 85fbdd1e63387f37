"""The diagonal Gaussian posterior: clamp, sample and Kullback-Leibler divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.dispatch import Fused, Implementation, Op
from vfmvae.ops.noise import is_seed, seeded_normal
from vfmvae.ops.operation import Autograd, operation

LOGVAR_RANGE = (-30.0, 20.0)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gaussian_posterior(
    mean: Tensor, logvar: Tensor, noise: Tensor, *, fused: Fused = True
) -> tuple[Tensor, Tensor]:
    """Draw from N(mean, exp(logvar)) and measure it against N(0, 1).

    Args:
        mean, logvar: [B, C, h, w]; logvar is clamped to [-30, 20]. float16 and bfloat16 are computed in
            float32.
        noise: [B, C, h, w], standard normal; or a seed, int64 [2]: a random number and the place of the first
            image in the global batch, of which `vfmvae.ops.noise` makes the noise. With a seed nothing of the
            noise is kept for the backward pass, and a captured CUDA graph draws by what the seed then holds.
        fused: "triton" is one pass forward and one backward.

    Returns:
        z = mean + exp(logvar/2) * noise, [B, C, h, w] in the dtype of mean, and the divergence
        0.5 * sum(mean^2 + exp(logvar) - 1 - logvar) of each sample, [B] in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if mean.ndim != 4:
        raise ValueError(f"mean is {list(mean.shape)}; needed is [B, C, h, w]")
    if logvar.shape != mean.shape:
        raise ValueError(f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} differ in shape")
    needed = (2,) if is_seed(noise) else mean.shape
    if noise.shape != needed:
        raise ValueError(
            f"noise is {noise.dtype} of shape {tuple(noise.shape)}; needed are floating point numbers of"
            f" shape {tuple(mean.shape)}, or an int64 seed of shape (2,)"
        )
    for name, tensor in (("logvar", logvar), ("noise", noise)):
        if tensor.device != mean.device:
            raise ValueError(f"mean is on {mean.device}, {name} on {tensor.device}; move one of them")
    return _GAUSSIAN_POSTERIOR(fused, mean, logvar, noise)


def gaussian_posterior_reference(mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    dtype, wide = mean.dtype, torch.promote_types(mean.dtype, torch.float32)
    if is_seed(noise):
        noise = seeded_normal(noise, mean.shape, wide)
    mean, logvar = mean.to(wide), logvar.to(wide).clamp(*LOGVAR_RANGE)
    z = mean + (0.5 * logvar).exp() * noise
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)
    return z.to(dtype), kl


def _run(mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    from vfmvae.kernels.posterior import posterior_fwd

    z = torch.empty_like(mean, memory_format=torch.channels_last)
    noise = noise if is_seed(noise) else _rows(noise).contiguous()
    return z, posterior_fwd(_rows(mean), _rows(logvar), noise, _rows(z))


def _fake(mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.empty_like(mean, memory_format=torch.channels_last)
    return z, torch.empty(mean.shape[:1], dtype=torch.float32, device=mean.device)


def _run_backward(
    grad_z: Tensor, grad_kl: Tensor, mean: Tensor, logvar: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    from vfmvae.kernels.posterior import posterior_bwd

    found = _backward_fake(grad_z, grad_kl, mean, logvar, noise)
    noise = noise if is_seed(noise) else _rows(noise).contiguous()
    given = (_rows(grad_z).contiguous(), grad_kl.float().contiguous(), _rows(mean), _rows(logvar), noise)
    posterior_bwd(*given, *map(_rows, found))
    return found


def _backward_fake(
    grad_z: Tensor, grad_kl: Tensor, mean: Tensor, logvar: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    one, other = (torch.empty_like(t, memory_format=torch.channels_last) for t in (mean, logvar))
    return one, other


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    of_mean, of_logvar = _posterior_backward(grad_z, grad_kl, *ctx.saved_tensors)
    needs = ctx.needs_input_grad
    return (of_mean if needs[0] else None, of_logvar if needs[1] else None, None)


def _rows(x: Tensor) -> Tensor:
    """[B, C, h, w] as [B, h w, C] with dense channels; copied only where memory is not channels-last.

    Halves of one tensor, as means and log variances come, are read in place.
    """
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    return tokens if tokens.stride(2) == 1 or tokens.shape[2] == 1 else tokens.contiguous()


_DEVICES = ("cpu", "cuda")
_posterior_backward = operation("gaussian_posterior_backward", _run_backward, _backward_fake, _DEVICES)
_posterior_triton = operation("gaussian_posterior", _run, _fake, _DEVICES, Autograd(_setup, _backward))


def _why_not_triton(mean: Tensor, logvar: Tensor, noise: Tensor) -> str | None:
    for tensor in (mean, logvar, *([] if is_seed(noise) else [noise])):
        if tensor.dtype not in TRITON_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
    if mean.numel() == 0:
        return f"it takes [B, C, h, w] with elements, not {list(mean.shape)}"
    if mean[0].numel() >= 1 << 31:
        return f"it takes fewer than 2^31 elements of a sample, not {mean[0].numel()}"
    if torch.is_grad_enabled() and noise.requires_grad:
        return "it gives no gradient of the noise, which requires one"
    return native.why_no_triton(mean)


_GAUSSIAN_POSTERIOR = Op(
    "gaussian_posterior",
    gaussian_posterior_reference,
    (Implementation("triton", _posterior_triton, _why_not_triton),),
)
