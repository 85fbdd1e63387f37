"""The modulated MLP for up to 256 channels in one kernel: hidden numbers stay in registers.

    out = residual + W2 gelu(d * (W1 x) + b1) + b2,    where x is modulated already

A program holds a tile of pixels of one sample and goes through the hidden numbers in chunks: first product,
demodulation, bias and GELU, second product into the accumulator. x, residual, out [B, P, C] (P pixels);
first = W1 and second = the transpose of W2, both [E, C], all of one dtype; d [B, E], b1 [E] and b2 [C] in
float32. modulated_mlp_backward.py holds the gradients.

Tiles come and go through tensor descriptors (TMA), which fill with zeros what lies outside a sample. Their
rows must be multiples of 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vfmvae.kernels.gelu import gelu, gelu_form
from vfmvae.kernels.tuned import cdiv, tile


@triton.jit
def _mlp_fwd_kernel(
    residual_desc,  # [B, P, C] by [1, BM, BC], like x and out
    x_desc,
    demodulation_ptr,
    first_desc,  # [E, C] by [BN, BC], like second
    first_bias_ptr,
    second_desc,
    second_bias_ptr,
    out_desc,
    tiles,
    C: tl.constexpr,
    E: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GELU: tl.constexpr,
):
    sample = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) % tiles) * BM
    c = tl.arange(0, BC)
    # The accumulator starts from the residual: adding it at the end would need both in registers at once.
    out = residual_desc.load([sample, pixel, 0]).reshape(BM, BC).to(tl.float32)
    out += tl.load(second_bias_ptr + c, mask=c < C, other=0.0)[None, :]
    x = x_desc.load([sample, pixel, 0]).reshape(BM, BC)
    for chunk in range(0, E, BN):
        e = chunk + tl.arange(0, BN)
        first = first_desc.load([chunk, 0])
        second = second_desc.load([chunk, 0])
        scale = tl.load(demodulation_ptr + sample * E + e, mask=e < E, other=0.0)
        bias = tl.load(first_bias_ptr + e, mask=e < E, other=0.0)
        hidden = tl.dot(x, tl.trans(first), input_precision="ieee") * scale[None, :] + bias[None, :]
        out = tl.dot(gelu(hidden, GELU).to(x.dtype), second, out, input_precision="ieee")
    out_desc.store([sample, pixel, 0], out.to(x.dtype).reshape(1, BM, BC))


def mlp_fwd(
    residual: Tensor,
    x: Tensor,
    demodulation: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor,
    second_bias: Tensor,
    out: Tensor,
) -> None:
    """Fills out; shapes as in the module docstring, all dense."""
    batch, pixels, channels = x.shape
    hidden = len(first)
    size = tile("forward", channels, pixels, x.dtype)
    width = padded(channels)
    tiles = cdiv(pixels, size.pixels)
    with torch.cuda.device_of(x):
        _mlp_fwd_kernel[(batch * tiles,)](
            blocks(residual, 1, size.pixels, width),
            blocks(x, 1, size.pixels, width),
            demodulation,
            blocks(first, size.hidden, width),
            first_bias,
            blocks(second, size.hidden, width),
            second_bias,
            blocks(out, 1, size.pixels, width),
            tiles,
            C=channels,
            E=hidden,
            BC=width,
            BM=size.pixels,
            BN=size.hidden,
            GELU=gelu_form(x.dtype, x.is_cuda),
            num_warps=size.warps,
            num_stages=size.stages,
        )


def padded(channels: int) -> int:
    """Width of a tile: a power of two, and no less than what a product of matrices takes."""
    return max(16, 1 << (channels - 1).bit_length())


def blocks(tensor: Tensor, *shape: int) -> TensorDescriptor:
    """Of a dense tensor, whatever strides torch gave its dimensions of size 1, at a multiple of 16 bytes.

    Triton checks a new descriptor for as long as the rest of the launch takes; here once per form of tensor.
    """
    form = (tensor.shape, tensor.dtype, shape)
    fields = _KNOWN.get(form)
    if fields is None:
        strides = [1]
        for size in reversed(tensor.shape[1:]):
            strides.insert(0, strides[0] * size)
        fields = dict(vars(TensorDescriptor(tensor, list(tensor.shape), strides, list(shape))))
        del fields["base"]
        _KNOWN[form] = fields
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=tensor)
    return descriptor


_KNOWN: dict[tuple[torch.Size, torch.dtype, tuple[int, ...]], dict[str, object]] = {}
"""All of a descriptor but its tensor."""
