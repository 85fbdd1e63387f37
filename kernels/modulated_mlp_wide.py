"""The modulated MLP for more than 256 channels: products whose first or last steps ride along.

    hidden = gelu(d * (W1 x) + b1)          _expand_kernel; x is modulated already
    out    = residual + W2 hidden + b2      _contract_kernel

The backward computes hidden numbers again, in the kernel that multiplies the gradient by W2^T:

    dh = (W2^T grad) gelu'(h), hidden       _hidden_grad_kernel, which also sums for d and b1
    grad of x = W1^T (d dh), of W1, of W2   in PyTorch: products of what this kernel wrote

x, residual, out, grad [B, P, C]; hidden [B, P, E]; W1 [E, C] and W2 [C, E] of the same dtype; d [B, E],
b1 [E], b2 [C] in float32. Tiles do not cross samples; tensor descriptors fill with zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.gelu import gelu, gelu_and_slope, gelu_form
from vfmvae.kernels.modulated_mlp import blocks
from vfmvae.kernels.tuned import MULTIPROCESSORS, Tile, cdiv, tile


@triton.jit
def _place(rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Sample, first pixel, first column and index of the row of tiles. Columns go first: they share rows."""
    row = tl.program_id(0) // columns
    return row // rows, (row % rows) * BM, (tl.program_id(0) % columns) * BN, row


@triton.jit
def _product(out, a_desc, w_desc, sample, pixel, column, K: tl.constexpr, BK: tl.constexpr, T: tl.constexpr):
    """out + a w^T, where w is [columns, K], or a w without T, where it is [K, columns]."""
    for k in range(0, K, BK):
        a = a_desc.load([sample, pixel, k]).reshape(out.shape[0], BK)
        if T:
            out = tl.dot(a, tl.trans(w_desc.load([column, k])), out, input_precision="ieee")
        else:
            out = tl.dot(a, w_desc.load([k, column]), out, input_precision="ieee")
    return out


@triton.jit
def _expand_kernel(
    x_desc,  # by [1, BM, BK]
    expand_desc,  # by [BN, BK]
    demodulation_ptr,
    bias_ptr,
    hidden_desc,  # by [1, BM, BN]
    rows,
    columns,
    C: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GELU: tl.constexpr,
):
    sample, pixel, column, _ = _place(rows, columns, BM, BN)
    z = tl.zeros((BM, BN), tl.float32)
    z = _product(z, x_desc, expand_desc, sample, pixel, column, C, BK, True)
    e = column + tl.arange(0, BN)
    scale = tl.load(demodulation_ptr + sample * E + e, mask=e < E, other=0.0)
    bias = tl.load(bias_ptr + e, mask=e < E, other=0.0)
    hidden = gelu(z * scale[None, :] + bias[None, :], GELU)
    hidden_desc.store([sample, pixel, column], hidden.to(hidden_desc.dtype).reshape(1, BM, BN))


@triton.jit
def _contract_kernel(
    residual_desc,  # by [1, BM, BN], like out
    hidden_desc,  # by [1, BM, BK]
    contract_desc,  # by [BN, BK]
    bias_ptr,
    out_desc,
    rows,
    columns,
    C: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    sample, pixel, column, _ = _place(rows, columns, BM, BN)
    c = column + tl.arange(0, BN)
    out = residual_desc.load([sample, pixel, column]).reshape(BM, BN).to(tl.float32)
    out += tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]
    out = _product(out, hidden_desc, contract_desc, sample, pixel, column, E, BK, True)
    out_desc.store([sample, pixel, column], out.to(out_desc.dtype).reshape(1, BM, BN))


@triton.jit
def _hidden_grad_kernel(
    grad_desc,  # by [1, BM, BK], like x
    x_desc,
    expand_desc,  # by [BN, BK]
    demodulation_ptr,
    bias_ptr,
    contract_desc,  # by [BK, BN]
    grad_z_desc,  # by [1, BM, BN / 2], like hidden
    hidden_desc,
    sum_bias_ptr,  # [B * rows, E]
    sum_demodulation_ptr,  # [B * rows, E]
    rows,
    columns,
    C: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GELU: tl.constexpr,
    OF_WEIGHTS: tl.constexpr,
):
    sample, pixel, column, row = _place(rows, columns, BM, BN)
    z = tl.zeros((BM, BN), tl.float32)
    z = _product(z, x_desc, expand_desc, sample, pixel, column, C, BK, True)
    grad_h = tl.zeros((BM, BN), tl.float32)
    grad_h = _product(grad_h, grad_desc, contract_desc, sample, pixel, column, C, BK, False)
    # By halves, for which there are registers enough.
    z_left, z_right = tl.split(z.reshape(BM, 2, BN // 2).permute(0, 2, 1))
    left, right = tl.split(grad_h.reshape(BM, 2, BN // 2).permute(0, 2, 1))
    for half in tl.static_range(2):
        start = column + half * (BN // 2)
        e = start + tl.arange(0, BN // 2)
        some = e < E
        scale = tl.load(demodulation_ptr + sample * E + e, mask=some, other=0.0)
        bias = tl.load(bias_ptr + e, mask=some, other=0.0)
        z_half = z_right if half else z_left
        hidden, slope = gelu_and_slope(z_half * scale[None, :] + bias[None, :], GELU)
        if OF_WEIGHTS:
            hidden_desc.store([sample, pixel, start], hidden.to(hidden_desc.dtype).reshape(1, BM, BN // 2))
        grad_half = (right if half else left) * slope
        sums = row.to(tl.int64) * E + e
        if OF_WEIGHTS:
            tl.store(sum_bias_ptr + sums, tl.sum(grad_half, 0), mask=some)
        tl.store(sum_demodulation_ptr + sums, tl.sum(grad_half * z_half, 0), mask=some)
        grad_half *= scale[None, :]
        grad_z_desc.store([sample, pixel, start], grad_half.to(grad_z_desc.dtype).reshape(1, BM, BN // 2))


def wide_fwd(
    residual: Tensor,
    x: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    contract: Tensor,
    expand_bias: Tensor,
    contract_bias: Tensor,
    out: Tensor,
) -> None:
    """Fills out; shapes as in the module docstring, all dense. Hidden numbers take B P E of memory."""
    batch, pixels, channels = x.shape
    units = len(expand)
    hidden = torch.empty(batch, pixels, units, dtype=x.dtype, device=x.device)
    size, depth, rows, columns = _tiles("expand", x, units)
    shape = {"C": channels, "E": units, "BK": depth}
    with torch.cuda.device_of(x):
        _expand_kernel[(batch * rows * columns,)](
            blocks(x, 1, size.pixels, depth),
            blocks(expand, size.hidden, depth),
            demodulation,
            expand_bias,
            blocks(hidden, 1, size.pixels, size.hidden),
            *(rows, columns),
            **shape,
            **_options(size),
            GELU=gelu_form(x.dtype, x.is_cuda),
        )
        size, depth, rows, columns = _tiles("contract", x, channels)
        _contract_kernel[(batch * rows * columns,)](
            blocks(residual, 1, size.pixels, size.hidden),
            blocks(hidden, 1, size.pixels, depth),
            blocks(contract, size.hidden, depth),
            contract_bias,
            blocks(out, 1, size.pixels, size.hidden),
            *(rows, columns),
            **shape,
            **_options(size),
        )


def hidden_grad(
    grad: Tensor,
    x: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    of_weights: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """d dh [B, P, E] and the gradient of d [B, E] in float32; if `of_weights`, also hidden [B, P, E] and the
    gradient of b1 [E] in float32."""
    batch, pixels, channels = x.shape
    units = len(expand)
    grad_z = torch.empty(batch, pixels, units, dtype=x.dtype, device=x.device)
    hidden = torch.empty_like(grad_z) if of_weights else grad_z  # a kernel wants it though it writes nothing
    size, depth, rows, columns = _tiles("hidden_grad", x, units)
    of_bias, of_demodulation = torch.empty(
        2, batch * rows, units, dtype=torch.float32, device=x.device
    ).unbind()
    with torch.cuda.device_of(x):
        _hidden_grad_kernel[(batch * rows * columns,)](
            blocks(grad, 1, size.pixels, depth),
            blocks(x, 1, size.pixels, depth),
            blocks(expand, size.hidden, depth),
            demodulation,
            expand_bias,
            blocks(contract, depth, size.hidden),
            blocks(grad_z, 1, size.pixels, size.hidden // 2),
            blocks(hidden, 1, size.pixels, size.hidden // 2),
            *(of_bias, of_demodulation, rows, columns),
            C=channels,
            E=units,
            BK=depth,
            GELU=gelu_form(x.dtype, x.is_cuda),
            OF_WEIGHTS=of_weights,
            **_options(size),
        )
    of_demodulation = of_demodulation.view(batch, rows, units).sum(1)
    return grad_z, of_demodulation, (hidden, of_bias.sum(0)) if of_weights else None


def _tiles(kernel: str, x: Tensor, outputs: int) -> tuple[Tile, int, int, int]:
    """Tile, depth of a step, and rows (per sample) and columns of tiles that cover [B, P, outputs]."""
    batch, pixels, channels = x.shape
    size = tile(kernel, channels, pixels, x.dtype)
    rows = cdiv(pixels, size.pixels)
    while size.hidden > 64 and batch * rows * cdiv(outputs, size.hidden) < MULTIPROCESSORS:
        size = size._replace(hidden=size.hidden // 2)
    return size, 64 if x.element_size() == 2 else 16, rows, cdiv(outputs, size.hidden)


def _options(size: Tile) -> dict[str, int]:
    return {"BM": size.pixels, "BN": size.hidden, "num_warps": size.warps, "num_stages": size.stages}
