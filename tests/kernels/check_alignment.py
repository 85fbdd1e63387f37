"""The kernels of kernels/alignment.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_alignment.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_alignment.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_kernel_close, bfloat16_products_in_the_interpreter
from vfmvae import ops

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# [B, N, D]: one position, a part of a tile, whole tiles, several of odd size, rows of more than one chunk.
SHAPES = [(1, 1, 8), (2, 5, 64), (1, 128, 32), (2, 150, 72), (1, 300, 24), (3, 9, 1152)]
FULL = [(4, 256, 1024), (2, 1024, 1152), (1, 4096, 1024), (3, 577, 1024)]


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    with contextlib.nullcontext() if ON_GPU else bfloat16_products_in_the_interpreter():
        yield


def features(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Prediction and target, alike, with rows of all lengths that resemble each other within a sample."""
    p = torch.randn(shape) + torch.randn(shape[0], 1, shape[2])
    t = p + torch.randn(shape)
    p, t = ((x * torch.randn(*shape[:2], 1).exp()).to(DEVICE, dtype) for x in (p, t))
    return p, t


def distances(p: Tensor, t: Tensor) -> Tensor:
    """|d| of every pair, in float64."""
    b, a = (F.normalize(x.double(), dim=-1) for x in (p, t))
    return (b @ b.mT - a @ a.mT).abs()


def margin_between(values: Tensor, share: float = 0.4) -> float:
    """A number near this quantile, in the widest gap: of a pair on the margin rounding decides whether it
    counts, and then gradients of one form need not be those of another."""
    ordered = values.flatten().sort().values
    middle = int(share * len(ordered))
    near = ordered[max(0, middle - 2000) : middle + 2000]
    if len(near) < 2:
        return 0.01
    at = int(near.diff().argmax())
    return float((near[at] + near[at + 1]) / 2)


def signs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of 1 and -1 times a power of two: distances are multiples of 1 / D, however many there are."""
    p = torch.randn(shape) + 0.3 * torch.randn(shape[0], 1, shape[2])
    t = p + torch.randn(shape)
    p, t = ((x.sign() * 2.0 ** torch.randint(-3, 4, (*shape[:2], 1))).to(DEVICE, dtype) for x in (p, t))
    return p, t


def compare(pair: tuple[Tensor, Tensor], margins: tuple[float, float]) -> None:
    p, t = pair
    shape, scale = p.shape, torch.tensor(1.7, device=DEVICE)

    def run(fused: bool | str, to: torch.dtype) -> list[Tensor]:
        own = p.detach().to(to, copy=True).requires_grad_()
        loss = ops.vf_alignment_loss(own, t.to(to), *margins, 3.0, 0.5, fused=fused)
        return [loss.detach(), torch.autograd.grad(loss, own, scale.to(loss.dtype))[0]]

    kernel, eager, truth = run("triton", p.dtype), run(False, p.dtype), run(False, torch.float64)
    if ON_GPU and p.dtype != torch.float32:
        # Matrix units cut sums off at every step, in float32 too: a bias that eager, in float32, has not.
        torch.testing.assert_close(kernel[0].double(), truth[0], rtol=1e-5, atol=1e-9)
    else:
        assert_kernel_close(kernel[0], eager[0], truth[0], "loss", terms=shape[0] * shape[1] ** 2)
    # Each row of the gradient is as long as its own row of the prediction is short.
    rows = p.double().norm(dim=-1, keepdim=True)
    weighed = [(x[1].double() * rows).to(x[1].dtype) for x in (kernel, eager, truth)]
    assert_kernel_close(*weighed, "gradient", terms=shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    pair = features(shape, dtype)
    compare(pair, (margin_between(distances(*pair)), 0.2))


# Of the last shapes more distances lie near any margin than rounding can tell apart.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", FULL if ON_GPU else [(2, 140, 64)], ids=str)
def test_full_size(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    width = shape[2]
    margins = (int(width**0.5) + 0.5) / width, 1 - (width // 2 + 0.5) / width
    compare(signs(shape, dtype), margins)


@pytest.mark.parametrize("strip", [1, 4])
def test_strips_do_not_change_the_result(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips end within a sample and reach over several; mirrored tiles lie in one or in two."""
    from vfmvae.kernels import alignment

    p, t = features((3, 260, 8), torch.bfloat16)
    p.requires_grad_()
    results = []
    for tiles in (alignment.STRIP, 3 * strip):  # a row of this shape has three tiles
        monkeypatch.setattr(alignment, "STRIP", tiles)
        loss = ops.vf_alignment_loss(p, t, 0.1, 0.9, fused="triton")
        results.append((loss, torch.autograd.grad(loss, p)[0]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=0)


def test_the_loss_alone_is_the_same() -> None:
    p, t = features((2, 300, 16), torch.bfloat16)
    alone = ops.vf_alignment_loss(p, t, 0.1, 0.9, fused="triton")
    with_gradient = ops.vf_alignment_loss(p.requires_grad_(), t, 0.1, 0.9, fused="triton")
    assert not alone.requires_grad and with_gradient.requires_grad
    torch.testing.assert_close(alone, with_gradient.detach(), rtol=1e-6, atol=0)


def test_the_same_bits_every_time_and_a_backward_that_may_be_called_again() -> None:
    p, t = features((2, 200, 64), torch.bfloat16)
    p.requires_grad_()
    losses = [ops.vf_alignment_loss(p, t, 0.05, 0.5, fused="triton") for _ in range(2)]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, p, retain_graph=True)[0] for loss in (*losses, losses[0])]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    (doubled,) = torch.autograd.grad(2 * losses[0], p)
    assert torch.equal(doubled, 2 * gradients[0])


def test_rows_of_zeros_and_below_the_least_length() -> None:
    p, t = features((1, 20, 16), torch.float32)
    p[0, 3], p[0, 4], t[0, 5] = 0.0, p[0, 4] * (1e-14 / p[0, 4].norm()), 0.0
    found = []
    for fused, dtype in (("triton", torch.float32), (False, torch.float64)):
        own = p.to(dtype, copy=True).requires_grad_()
        loss = ops.vf_alignment_loss(own, t.to(dtype), 0.013, 0.5, fused=fused)
        found.append((loss.double(), torch.autograd.grad(loss, own)[0].double()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-9)
    assert found[0][1][0, 4].norm() > 1e6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of_target", [False, True])
def test_values_that_are_not_finite_reach_the_loss(value: float, of_target: bool) -> None:
    p, t = features((2, 140, 16), torch.bfloat16)
    (t if of_target else p)[1, 131, 2] = value
    own = p.requires_grad_()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert ops.vf_alignment_loss(own, t, 0.1, 0.5, fused="triton").isnan()
    loss = ops.vf_alignment_loss(own, t, 0.1, 0.5, fused="triton")
    (gradient,) = torch.autograd.grad(loss, own)
    assert gradient[0].isfinite().all() and not gradient[1].isfinite().any()


def test_inputs_of_different_dtypes_strides_and_addresses() -> None:
    p, t = features((2, 20, 32), torch.float32)
    expected = ops.vf_alignment_loss(p, t.bfloat16(), 0.1, 0.5, fused=False)
    found = ops.vf_alignment_loss(p, t.bfloat16(), 0.1, 0.5, fused="triton")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    wide = torch.randn(2, 32, 41, device=DEVICE)[:, :, 1:21].mT.requires_grad_()
    results = []
    for fused in ("triton", False):
        loss = ops.vf_alignment_loss(wide, t, 0.1, 0.5, fused=fused)
        results.append((loss, torch.autograd.grad(loss, wide)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)
    odd = torch.randn(1 + p.numel(), device=DEVICE)[1:].view(p.shape)
    one, other = (ops.vf_alignment_loss(odd, t, 0.1, 0.5, fused=fused) for fused in ("triton", False))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_registered_operation() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        p, t = features((2, 9, 16), dtype)
        arguments = (p.requires_grad_(), t, 0.1, 0.5, 1.0, 1.0)
        for of_gradient in (True, False):
            tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(
                torch.ops.vfmvae.vf_alignment_triton.default,
                (*arguments, of_gradient) if of_gradient else (p.detach(), *arguments[1:], False),
                test_utils=(*tests, "test_autograd_registration"),
            )
