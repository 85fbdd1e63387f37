"""Softmax attention as the project uses it: plain, with a learned null key, with the mean over heads.

Shapes: query, key, value [B, heads, N, d].

All attention goes through here. Of the implementations (`fused` takes their names) the first that applies
runs, where no other is asked for:

    "triton"      ours, kernels/attention.py: knows null keys and means. First choice for these in 16 bits.
    "flash-attn"  flash-attn 3, 4 or 2, whichever suits the card (vfmvae/ops/attention_packages.py)
    "xformers"    its memory-efficient attention
    "sdpa"        PyTorch's, which chooses between cuDNN, flash and others

Those that know no null key get it as one more token, and means over heads are taken after them.
torch.nn.attention.sdpa_kernel(SDPBackend.MATH) leaves "sdpa" alone, since only PyTorch's plain form can be
differentiated twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vfmvae.ops import attention_packages, attention_triton
from vfmvae.ops.arguments import check_tensors
from vfmvae.ops.dispatch import Fused, Implementation, Op, always

CUDNN_RIGHT_FROM = 91501
"""cuDNN before 9.15.1 gives wrong results at lengths that are no multiple of CUDNN_BLOCK (pytorch#169849)."""
CUDNN_BLOCK = 128


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
    head_mean: bool = False,
    *,
    fused: Fused = True,
) -> Tensor:
    """softmax(query key^T / sqrt(d)) value.

    Args:
        query, key, value: [B, heads, N, d], same dtype.
        null_key, null_value: [heads, d], one more key and value that every query may attend to; both or none.
        head_mean: average the heads' results.
        fused: see the module's docstring.

    Returns:
        [B, heads, N, d], or [B, N, d] with `head_mean`, in query.dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    if (null_key is None) != (null_value is None):
        raise ValueError("null_key and null_value come together: one of them is missing")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4 or 0 in (tensor.shape[1], tensor.shape[3]):
            raise ValueError(f"{name} is {list(tensor.shape)}; needed is [B, heads, N, d]")
    batch, heads, _, width = query.shape
    shape = (batch, heads, key.shape[-2], width)
    null = ("null_key", null_key, (heads, width)), ("null_value", null_value, (heads, width))
    check_tensors(query, ("key", key, shape), ("value", value, shape), *null)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    with _without_autocast(query.device.type):
        return _ATTENTION(fused, query, key, value, null_key, null_value, head_mean)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Results are in the tensors' own dtype, whichever implementation runs."""
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def attention_choices(
    device: torch.device, dtype: torch.dtype, of_encoder: torch.dtype
) -> dict[str, tuple[str, dict[str, str]]]:
    """What runs at full size where: in the encoder, the latent fusion and the decoder.

    `of_encoder`: what the encoder computes in, and `dtype` the others. Each with the name of the
    implementation, and those that would come before it with their objections.
    """
    tokens = torch.empty(1, dtype=dtype, device=device).expand(1, 16, 1024, 64)
    null, encoded = tokens[0, :, 0], tokens.to(of_encoder)
    return {
        "encoder": _ATTENTION.explain(encoded, encoded, encoded, None, None, False),
        "fusion": _ATTENTION.explain(tokens, tokens, tokens, None, None, True),
        "decoder": _ATTENTION.explain(tokens, tokens, tokens, null, null, False),
    }


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    head_mean: bool,
) -> Tensor:
    key, value = _with_null(key, null_key), _with_null(value, null_value)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = (query @ key.transpose(-2, -1)).to(wide) * query.shape[-1] ** -0.5  # [B, heads, N, N(+1)]
    out = logits.softmax(dim=-1).to(value.dtype) @ value
    return out.mean(dim=1) if head_mean else out


CPU_KEYS = 16
"""With fewer keys torch's kernel for CPUs gives zeros where a query is not a number (torch 2.11 to 2.14)."""


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.device.type == "cpu" and key.shape[2] < CPU_KEYS:
        return attention_reference(query, key, value, None, None, False)
    with _without_wrong_cudnn(query, key):
        return F.scaled_dot_product_attention(query, key, value)


def _without_wrong_cudnn(query: Tensor, key: Tensor) -> AbstractContextManager[object]:
    if query.device.type != "cuda" or not cudnn_is_wrong(query.shape[2], key.shape[2]):
        return nullcontext()
    others = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    return sdpa_kernel([backend for backend, enabled in others.items() if enabled])


def cudnn_is_wrong(*lengths: int) -> bool:
    """Whether this cuDNN must not be used at one of these lengths."""
    return _cudnn_version() < CUDNN_RIGHT_FROM and any(length % CUDNN_BLOCK for length in lengths)


@torch.compiler.assume_constant_result
def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


def _with_tokens(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`run`, which knows neither null keys nor means, as an implementation."""

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        null_key: Tensor | None,
        null_value: Tensor | None,
        head_mean: bool,
    ) -> Tensor:
        out = run(query, _with_null(key, null_key), _with_null(value, null_value))
        return out.mean(dim=1) if head_mean else out

    return call


def _with_null(tokens: Tensor, null: Tensor | None) -> Tensor:
    if null is None:
        return tokens
    first = null.to(tokens.dtype)[None, :, None, :].expand(tokens.shape[0], -1, 1, -1)
    return torch.cat([first, tokens], dim=2)


def _why_not_triton(query: Tensor, key: Tensor, *_: object) -> str | None:
    if query.shape != key.shape:
        return f"it takes as many keys as queries, not {key.shape[2]} for {query.shape[2]}"
    return _only_plain() or attention_triton.why_not(query)


def _why_not_triton_first(
    query: Tensor, key: Tensor, value: Tensor, null_key: Tensor | None, _: object, head_mean: bool
) -> str | None:
    if query.dtype == torch.float32:
        return "products of float32 are faster by cuBLAS"
    return None if null_key is not None or head_mean else "without null key and mean, libraries are faster"


def _why_not_flash(query: Tensor, *_: object) -> str | None:
    return _only_plain() or attention_packages.why_no_flash_attention(query)


def _why_not_xformers(query: Tensor, *_: object) -> str | None:
    return _only_plain() or attention_packages.why_no_xformers(query)


@torch.compiler.assume_constant_result
def _only_plain() -> str | None:
    """The objection inside of sdpa_kernel(SDPBackend.MATH), or where code was compiled inside of it."""
    cuda = torch.backends.cuda
    if cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled():
        return None
    return "torch.nn.attention.sdpa_kernel allows the plain form only"


_ATTENTION = Op(
    "attention",
    attention_reference,
    (
        Implementation("triton", attention_triton.attention, _why_not_triton, _why_not_triton_first),
        Implementation("flash-attn", _with_tokens(attention_packages.flash_attention), _why_not_flash),
        Implementation("xformers", _with_tokens(attention_packages.xformers_attention), _why_not_xformers),
        Implementation("sdpa", _with_tokens(_sdpa), always),
    ),
    level=logging.INFO,
)
