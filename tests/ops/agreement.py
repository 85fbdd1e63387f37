"""Every implementation of an operation against its reference in float64: results and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]


def assert_agrees(
    function: Callable[..., Result], inputs: Sequence[Tensor], fused: bool | str = True, limit: float = 1e-5
) -> None:
    """`function(*inputs, fused=...)`: `fused` in float32 against False in float64, gradients likewise.

    `limit` is the largest relative error ||a - b|| / ||b|| of each result and each gradient.
    """
    results, gradients = _run(function, inputs, fused, torch.float32)
    truths, true_gradients = _run(function, inputs, False, torch.float64)
    for i, (result, truth) in enumerate(zip(results, truths, strict=True)):
        assert result.shape == truth.shape, f"result {i}: {result.shape} instead of {truth.shape}"
        _assert_close(result, truth, limit, f"result {i}")
    for i, (gradient, truth) in enumerate(zip(gradients, true_gradients, strict=True)):
        _assert_close(gradient, truth, limit, f"gradient of input {i}")


def _run(
    function: Callable[..., Result], inputs: Sequence[Tensor], fused: bool | str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    own = [x.detach().to(dtype).requires_grad_() for x in inputs]
    result = function(*own, fused=fused)
    results = result if isinstance(result, tuple) else (result,)
    weights = torch.Generator().manual_seed(1)
    total = sum(
        (r * torch.randn(r.shape, generator=weights, dtype=torch.float64).to(r.dtype)).sum() for r in results
    )
    return results, torch.autograd.grad(total, own)


def _assert_close(x: Tensor, truth: Tensor, limit: float, what: str) -> None:
    size = truth.double().norm()
    # Inputs are of size 1, and so is the rounding of a gradient that is zero (of a softmax over one key).
    error = (x.double() - truth.double()).norm() / (size if size > 1e-12 else 1.0)
    assert error <= limit, f"{what}: relative error {error:.2e} above {limit:.0e}"
