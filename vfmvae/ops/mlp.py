"""The style-modulated 1 x 1 convolutions of the decoder (StyleGAN2 weight modulation, arXiv 1912.04958).

Shapes: x [B, C, H, W], style [B, C]. The references build per-sample weights and run one grouped convolution,
which is how modulation is published. The fused forms use that modulating the weights' inputs equals scaling
the activations: W (v * x), demodulated by d = rsqrt((v^2) (W^2)^T + 1e-8) on the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import mlp_cpu, mlp_triton, to_rgb_triton
from vfmvae.ops.arguments import check_maps, check_tensors
from vfmvae.ops.demodulation import DEMODULATION_EPS, demodulation
from vfmvae.ops.dispatch import Fused, Implementation, Op, always


def modulated_mlp(
    residual: Tensor,
    x: Tensor,
    style: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    contract_weight: Tensor,
    contract_bias: Tensor,
    gamma: Tensor,
    *,
    fused: Fused = True,
) -> Tensor:
    """residual + gamma * (W2 gelu(d * (W1 (style * x)) + b1) + b2): the tail of a modulated ConvNeXt layer.

    Args:
        residual, x: [B, C, H, W]; x is the normalised input. A residual of another dtype is converted to
            x's.
        style: [B, C], the per-input scale v; float32 whatever x is.
        expand_weight, expand_bias: W1 [E, C], b1 [E] (E is 4C in the published decoder).
        contract_weight, contract_bias: W2 [C, E], b2 [C].
        gamma: [C], layer scale.

    Returns:
        [B, C, H, W] in x.dtype. GELU is the exact form; d demodulates each output of W1 to unit input norm.
        The fused forms can be differentiated once.

    Raises:
        ValueError: tensors of other shapes or on other devices.
    """
    check_maps(x)
    weights = (expand_weight, expand_bias, contract_weight, contract_bias, gamma)
    check_tensors(x, ("residual", residual, x.shape), *rows_of_mlp(x, style, *weights))
    return _MODULATED_MLP(fused, residual.to(x.dtype), x, style, *weights)


def rows_of_mlp(
    x: Tensor,
    style: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    contract_weight: Tensor,
    contract_bias: Tensor,
    gamma: Tensor,
) -> tuple[tuple[str, Tensor, Sequence[int]], ...]:
    """What `check_tensors` takes, for all arguments but the residual."""
    batch, channels, *_ = x.shape
    hidden = expand_weight.shape[0]
    return (
        ("style", style, (batch, channels)),
        ("expand_weight", expand_weight, (hidden, channels)),
        ("expand_bias", expand_bias, (hidden,)),
        ("contract_weight", contract_weight, (channels, hidden)),
        ("contract_bias", contract_bias, (channels,)),
        ("gamma", gamma, (channels,)),
    )


def modulated_mlp_reference(
    residual: Tensor, x: Tensor, style: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor
) -> Tensor:
    wide = torch.float64 if torch.float64 in (style.dtype, w1.dtype) else torch.float32
    weight = w1.to(wide) * style[:, None, :].to(wide)  # [B, E, C]; in float16 the epsilon would be 0
    weight = weight * (weight.square().sum(dim=2, keepdim=True) + DEMODULATION_EPS).rsqrt()
    hidden = F.gelu(_grouped_conv1x1(x, weight) + b1[:, None, None].to(x.dtype))  # [B, E, H, W]
    y = F.conv2d(hidden, w2[:, :, None, None].to(x.dtype), b2.to(x.dtype)).to(x.dtype)  # autocast has its own
    return residual + gamma[:, None, None].to(x.dtype) * y


def _modulated_mlp_gemm(
    residual: Tensor, x: Tensor, style: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor
) -> Tensor:
    batch, channels, height, width = x.shape
    scale = demodulation(style, w1)
    # Layer scale folds into the second weight: one pass over the output less.
    contract = (w2 * gamma[:, None]).to(x.dtype)
    contract_bias = (b2 * gamma).to(x.dtype)
    tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    if height * width >= channels:  # building B small weights costs less than two passes over the activations
        weight = scale[:, :, None] * w1 * style[:, None, :]
        hidden = torch.baddbmm(b1.to(x.dtype), tokens, weight.to(x.dtype).transpose(1, 2))
    else:
        scaled = F.linear(tokens * style[:, None, :].to(x.dtype), w1.to(x.dtype))
        hidden = torch.addcmul(b1.to(scaled.dtype), scaled, scale[:, None, :].to(scaled.dtype))
    y = F.linear(F.gelu(hidden), contract, contract_bias).to(x.dtype)  # [B, HW, C]
    return residual + y.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _modulated_mlp_triton(
    residual: Tensor, x: Tensor, style: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor
) -> Tensor:
    modulated = x * style[:, :, None, None].to(x.dtype)
    scale = demodulation(style, w1)
    return mlp_triton.demodulated_mlp(residual, modulated, scale, w1, b1, w2, b2, gamma)


def _why_not_triton(residual: Tensor, x: Tensor, style: Tensor, w1: Tensor, *_: Tensor) -> str | None:
    return mlp_triton.why_not(x, w1)


def _why_not_triton_first(residual: Tensor, x: Tensor, *_: Tensor) -> str | None:
    return mlp_triton.why_not_first(x)


def _modulated_mlp_compiled(
    residual: Tensor, x: Tensor, style: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor
) -> Tensor:
    # Autograd takes the gradients of style and gamma through these small tensors.
    return mlp_cpu.modulated_mlp(
        residual, x, style, demodulation(style, w1), w1, b1, w2 * gamma[:, None], b2 * gamma
    )


def modulated_to_rgb(
    x: Tensor, style: Tensor, weight: Tensor, bias: Tensor, *, fused: Fused = True
) -> Tensor:
    """1 x 1 convolution to an image with modulated inputs and no demodulation.

    Args:
        x: [B, C, H, W].
        style: [B, C], the per-input scale.
        weight: [D, C]; bias: [D]; D is 3, and the Triton form takes no other.

    Returns:
        [B, D, H, W] in float32 (float64 for float64 x): an image keeps more digits than 16-bit activations.
        The Triton form can be differentiated once.

    Raises:
        ValueError: tensors of other shapes or on other devices.
    """
    check_maps(x)
    batch, channels, *_ = x.shape
    colours = weight.shape[0]
    check_tensors(
        x,
        ("style", style, (batch, channels)),
        ("weight", weight, (colours, channels)),
        ("bias", bias, (colours,)),
    )
    return _MODULATED_TO_RGB(fused, x, style, weight, bias)


def modulated_to_rgb_reference(x: Tensor, style: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return _grouped_conv1x1(wide, weight * style[:, None, :]) + bias[:, None, None].to(wide.dtype)


def _modulated_to_rgb_gemm(x: Tensor, style: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    batch, channels, height, width = x.shape
    tokens = wide.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    per_sample = (weight * style[:, None, :]).to(wide.dtype)  # [B, 3, C]
    image = torch.baddbmm(bias.to(wide.dtype), tokens, per_sample.transpose(1, 2))  # [B, HW, 3]
    return image.view(batch, height, width, weight.shape[0]).permute(0, 3, 1, 2).to(wide.dtype)


def _grouped_conv1x1(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, C, H, W] with one weight [D, C] per sample (weight [B, D, C]) -> [B, D, H, W]."""
    batch, channels, height, width = x.shape
    if batch == 0:  # there is no convolution of no groups
        return torch.einsum("bchw,bdc->bdhw", x, weight.to(x.dtype))
    grouped = x.reshape(1, batch * channels, height, width)
    kernels = weight.to(x.dtype).reshape(-1, channels, 1, 1)
    return F.conv2d(grouped, kernels, groups=batch).reshape(batch, -1, height, width)


_MODULATED_MLP = Op(
    "modulated_mlp",
    modulated_mlp_reference,
    (
        Implementation("cpu", _modulated_mlp_compiled, mlp_cpu.why_not, mlp_cpu.why_not_first),
        Implementation("triton", _modulated_mlp_triton, _why_not_triton, _why_not_triton_first),
        Implementation("gemm", _modulated_mlp_gemm, always),
    ),
)
_MODULATED_TO_RGB = Op(
    "modulated_to_rgb",
    modulated_to_rgb_reference,
    (
        Implementation("triton", to_rgb_triton.modulated_to_rgb, to_rgb_triton.why_not),
        Implementation("gemm", _modulated_to_rgb_gemm, always),
    ),
)
