"""GEGLU and SwiGLU in one pass: out = act(gate) * value, and the backward, which recomputes what it needs.

Inputs are matrices [rows, columns] whose columns are dense and whose rows may be strided, so both halves of
one linear layer's output are read in place. float16, bfloat16 or float32; arithmetic in float32. ACTIVATION
is "gelu" (its tanh form) or "silu".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.common import gelu_tanh_gate, gelu_tanh_slope, matrix_tile, sigmoid_gate, silu_slope


@triton.jit
def _gated_fwd_kernel(
    gate_ptr,
    value_ptr,
    out_ptr,
    rows,
    columns,
    gate_stride,
    value_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row * value_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        share, _ = sigmoid_gate(gate)
    else:
        share, _ = gelu_tanh_gate(gate)
    out = gate * share * value
    tl.store(out_ptr + row * columns + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_bwd_kernel(
    grad_ptr,
    gate_ptr,
    value_ptr,
    grad_gate_ptr,
    grad_value_ptr,
    rows,
    columns,
    gate_stride,
    value_stride,
    grad_stride,  # of grad_gate and grad_value
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    grad = tl.load(grad_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row * value_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        share, rest = sigmoid_gate(gate)
        slope = silu_slope(gate, share, rest)
    else:
        share, rest = gelu_tanh_gate(gate)
        slope = gelu_tanh_slope(gate, share, rest)
    grad_gate = grad * value * slope
    grad_value = grad * gate * share
    element = grad_gate_ptr.dtype.element_ty
    tl.store(grad_gate_ptr + row * grad_stride + column, grad_gate.to(element), mask=inside)
    tl.store(grad_value_ptr + row * grad_stride + column, grad_value.to(element), mask=inside)


def gated_fwd(gate: Tensor, value: Tensor, out: Tensor, activation: str) -> None:
    """Fills out [..., C] (dense) from gate, value [..., C] of the same dtype."""
    if out.numel() == 0:
        return
    gate, value = _as_rows(gate), _as_rows(value)
    height, width, grid = matrix_tile(*gate.shape)
    with torch.cuda.device_of(out):
        _gated_fwd_kernel[grid](
            *(gate, value, out, *gate.shape, gate.stride(0), value.stride(0)),
            HEIGHT=height,
            WIDTH=width,
            ACTIVATION=activation,
        )


def gated_bwd(
    grad: Tensor, gate: Tensor, value: Tensor, grad_gate: Tensor, grad_value: Tensor, activation: str
) -> None:
    """Fills grad_gate, grad_value [..., C] (dense, or halves of one dense tensor) from the gradient of the
    output [..., C].
    """
    if grad.numel() == 0:
        return
    grad, gate, value = grad.contiguous(), _as_rows(gate), _as_rows(value)
    height, width, grid = matrix_tile(*gate.shape)
    with torch.cuda.device_of(grad):
        _gated_bwd_kernel[grid](
            grad,
            gate,
            value,
            grad_gate,
            grad_value,
            *gate.shape,
            gate.stride(0),
            value.stride(0),
            grad_gate.stride(-2) if grad_gate.ndim > 1 else grad_gate.numel(),
            HEIGHT=height,
            WIDTH=width,
            ACTIVATION=activation,
        )


def _as_rows(x: Tensor) -> Tensor:
    """[..., C] as [rows, C] with dense columns; copies only where no view can do it."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()
