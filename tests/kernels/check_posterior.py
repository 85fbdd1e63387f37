"""The kernels of kernels/posterior.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_posterior.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_posterior.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_kernel_close
from vfmvae import ops
from vfmvae.ops.noise import seeded_normal

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Channels that four do not divide, whole tiles, several and a part of one.
SHAPES = [(3, 7, 5, 9), (2, 16, 8, 8), (2, 32, 9, 7)]
# One element, fewer than a counter gives.
FEW = [(1, 1, 1, 1), (2, 3, 1, 1), (1, 1, 2, 3)]
FULL = [(32, 32, 16, 16), (8, 16, 64, 64)]


def seed(number: int = 77, first: int = 0) -> Tensor:
    return torch.tensor([number, first], device=DEVICE)


def moments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Mean and log variance as they come: halves of one tensor in channels-last memory."""
    both = torch.randn(shape[0], 2 * shape[1], *shape[2:], device=DEVICE)
    both[:, shape[1] :] *= 2
    return list(both.to(dtype).contiguous(memory_format=torch.channels_last).chunk(2, dim=1))


def results_of(
    shape: tuple[int, ...], dtype: torch.dtype, seeded: bool
) -> Iterator[tuple[str, list[Tensor]]]:
    """Of the kernel, of plain PyTorch and the truth: z, the divergence and both gradients."""
    given = moments(shape, dtype)
    noise = seed() if seeded else torch.randn(shape, device=DEVICE).to(dtype)
    grads = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape[0], device=DEVICE)

    def run(fused: bool | str, to: torch.dtype) -> list[Tensor]:
        own = [t.to(to).detach().requires_grad_() for t in given]
        results = ops.gaussian_posterior(*own, noise if seeded else noise.to(to), fused=fused)
        incoming = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
        return [r.detach() for r in (*results, *torch.autograd.grad(results, own, incoming))]

    forms = run("triton", dtype), run(False, dtype), run(False, torch.float64)
    names = ("z", "kl", "gradient of mean", "gradient of logvar")
    return ((name, list(results)) for name, *results in zip(names, *forms, strict=True))


def compare(shape: tuple[int, ...], dtype: torch.dtype, seeded: bool) -> None:
    for what, results in results_of(shape, dtype, seeded):
        terms = shape[1] * shape[2] * shape[3] if what == "kl" else 0
        assert_kernel_close(*results, what, terms=terms)


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_few_elements(shape: tuple[int, ...], poisoned_empty: None) -> None:
    """Where PyTorch's own largest error is a matter of luck."""
    for seeded in (False, True):
        for _, (kernel, _, truth) in results_of(shape, torch.float32, seeded):
            torch.testing.assert_close(kernel.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    for seeded in (False, True):
        compare(shape, dtype, seeded)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_larger_maps(shape: tuple[int, ...], poisoned_empty: None) -> None:
    for dtype in DTYPES:
        compare(shape, dtype, seeded=True)


def drawn(number: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The kernel's noise."""
    zeros = torch.zeros(shape, device=DEVICE)
    return ops.gaussian_posterior(zeros, zeros, number, fused="triton")[0]


# Both halves of the seed and of the place, and what the signed 64 bits hold.
@pytest.mark.parametrize("number", [0, -1, 1 << 40, 0x123456789ABCDEF])
@pytest.mark.parametrize("first", [0, 3, (1 << 32) - 1, 1 << 45])
def test_the_noise_is_that_of_the_reference(number: int, first: int) -> None:
    shape = (2, 5, 3, 3)
    truth = seeded_normal(seed(number, first), shape, torch.float64)
    torch.testing.assert_close(drawn(seed(number, first), shape).double(), truth, rtol=1e-6, atol=1e-6)


def test_the_noise_of_many_elements() -> None:
    shape = (4, 64, 64, 64) if ON_GPU else (1, 16, 32, 32)
    noise, truth = drawn(seed(), shape).double(), seeded_normal(seed(), shape, torch.float64)
    assert (noise - truth).abs().max() < 2e-6
    assert (noise - truth).norm() < 2e-7 * truth.norm()


def test_an_image_has_its_noise_in_every_batch() -> None:
    whole = drawn(seed(5, 10), (5, 3, 4, 4))
    parts = [drawn(seed(5, 10), (2, 3, 4, 4)), drawn(seed(5, 12), (3, 3, 4, 4))]
    assert torch.equal(torch.cat(parts), whole)
    mean, logvar = (t.requires_grad_() for t in moments((2, 3, 4, 4)))
    z, _ = ops.gaussian_posterior(mean, logvar, seed(5, 10), fused="triton")
    (gradient,) = torch.autograd.grad(z.sum(), logvar)  # the backward draws again
    torch.testing.assert_close(gradient, 0.5 * (0.5 * logvar).exp() * whole[:2], rtol=1e-5, atol=1e-6)


def test_limits_of_the_log_variance() -> None:
    mean = torch.zeros(1, 1, 1, 4, device=DEVICE, requires_grad=True)
    logvar = torch.tensor([-31.0, -29.9, 19.9, 21.0], device=DEVICE).view(1, 1, 1, 4).requires_grad_()
    noise = torch.ones(1, 1, 1, 4, device=DEVICE)
    found = []
    for fused in ("triton", False):
        z, kl = ops.gaussian_posterior(mean, logvar, noise, fused=fused)
        found.append(
            (z, kl, *torch.autograd.grad((z.sum(), kl.sum()), (mean, logvar), (z.sum() * 0 + 1,) * 2))
        )
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    assert (found[0][3] == 0).flatten().tolist() == [True, False, False, True]


def test_layouts_do_not_matter() -> None:
    shape = (2, 6, 5, 4)
    mean, logvar = moments(shape)
    noise, grad = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    results = []
    for form in (torch.channels_last, torch.contiguous_format):
        own = [t.detach().contiguous(memory_format=form).requires_grad_() for t in (mean, logvar)]
        z, kl = ops.gaussian_posterior(*own, noise.contiguous(memory_format=form), fused="triton")
        given = (grad.contiguous(memory_format=form), torch.ones((), device=DEVICE).expand(2))
        results.append((z, kl, *torch.autograd.grad((z, kl), own, given)))
        assert z.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_stay_where_they_are(value: float) -> None:
    for name in ("mean", "logvar", "noise"):
        mean, logvar = moments((2, 3, 2, 2))
        noise = torch.randn(2, 3, 2, 2, device=DEVICE)
        {"mean": mean, "logvar": logvar, "noise": noise}[name][1, 2, 0, 1] = value
        found = ops.gaussian_posterior(mean, logvar, noise, fused="triton")
        expected = ops.gaussian_posterior(mean, logvar, noise, fused=False)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
        clamped = name == "logvar" and value == value
        where = (~found[0].isfinite()).nonzero().tolist()
        assert where == ([] if clamped else [[1, 2, 0, 1]])


def test_the_same_bits_every_time() -> None:
    given = moments((3, 16, 16, 16))
    first, second = (ops.gaussian_posterior(*given, seed(), fused="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_registered_operation() -> None:
    for noise in (seed(), torch.randn(2, 3, 4, 5, device=DEVICE)):
        mean, logvar = (t.detach().clone().requires_grad_() for t in moments((2, 3, 4, 5)))
        torch.library.opcheck(torch.ops.vfmvae.gaussian_posterior.default, (mean, logvar, noise))
        grads = torch.randn(2, 3, 4, 5, device=DEVICE), torch.randn(2, device=DEVICE)
        backward = (*grads, mean.detach(), logvar.detach(), noise)
        torch.library.opcheck(torch.ops.vfmvae.gaussian_posterior_backward.default, backward)
