"""The kernels of kernels/lpips.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_perceptual.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_lpips.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_kernel_close
from vfmvae.ops import lpips_distance

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (2, 64, 5, 7),
    (1, 1, 1, 1),
    (3, 3, 9, 2),
    (1, 65, 4, 3),
    (2, 512, 2, 3),
    (1, 300, 1, 17),
    (2, 24, 6, 1),
)
FULL_SHAPES = ((8, 64, 256, 256), (8, 128, 128, 128), (8, 256, 64, 64), (8, 512, 32, 32), (8, 512, 16, 16))
FULL_SHAPES += ((1, 64, 127, 65), (2, 1024, 1024, 1), (1, 4096, 5, 5))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def maps(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """a and b as a network leaves them: channels-last, some positions dead."""
    found = [channels_last(torch.randn(shape, device=DEVICE).clamp_min(-0.5)).to(dtype) for _ in range(2)]
    found[0][0, :, 0, 0] = 0.0
    found[1][-1, :, -1, -1] = 0.0
    return found


def run(
    inputs: list[Tensor], weights: Tensor | None, grad: Tensor, fused: bool | str, dtype=None
) -> list[Tensor]:
    own = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    weights = weights if weights is None else weights.to(dtype or weights.dtype)
    distance = lpips_distance(*own, weights, fused=fused)
    return [distance.detach(), *torch.autograd.grad(distance, own, grad.to(distance.dtype))]


def check(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool) -> None:
    inputs = maps(shape, dtype)
    grad = shape[2] * shape[3] * torch.randn(shape[0], device=DEVICE)  # or float16 could not hold what passes
    weights = torch.rand(shape[1], device=DEVICE) if weighted else None
    kernel = run(inputs, weights, grad, "triton")
    eager = run(inputs, weights, grad, False)
    truth = run([x.double() for x in inputs], weights, grad, False)
    for what, *results in zip(("distance", "grad of a", "grad of b"), kernel, eager, truth, strict=True):
        assert_kernel_close(*results, what)
    assert (kernel[1][0, :, 0, 0] == 0).all() and (kernel[2][-1, :, -1, -1] == 0).all()
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in kernel[1:])
    again = run(inputs, weights, grad, "triton")
    assert all(torch.equal(one, other) for one, other in zip(kernel, again, strict=True)), "not deterministic"


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_both_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, weighted: bool, poisoned_empty: None
) -> None:
    check(shape, dtype, weighted)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter would take minutes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FULL_SHAPES, ids=str)
def test_the_layers_of_a_network(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    check(shape, dtype, weighted=True)


def test_equal_maps_have_no_distance_at_all() -> None:
    a, _ = maps((2, 40, 3, 5), torch.float32)
    distance, of_a, of_b = run([a, a], torch.rand(40, device=DEVICE), torch.ones(2, device=DEVICE), "triton")
    assert (distance == 0).all() and (of_a == 0).all() and (of_b == 0).all()


def test_maps_in_other_memory_and_of_two_dtypes() -> None:
    a, b = maps((2, 6, 4, 3), torch.float32)
    weights = torch.rand(6, device=DEVICE)
    expected = lpips_distance(a, b, weights, fused=False)
    tokens = torch.randn(2, 9, 8, device=DEVICE)
    wide = torch.zeros(2, 4, 3, 10, device=DEVICE)
    wide[..., 2:8] = a.permute(0, 2, 3, 1)
    for same in (
        a.contiguous(),
        wide[..., 2:8].permute(0, 3, 1, 2),
        a.clone().repeat(1, 1, 2, 2)[:, :, :4, :3],
    ):
        torch.testing.assert_close(lpips_distance(same, b, weights, fused="triton"), expected)
        torch.testing.assert_close(lpips_distance(b, same, weights, fused="triton"), expected)
    views = [t.transpose(1, 2).unsqueeze(-1) for t in (tokens, tokens.flip(1))]  # as FeatureDistance's are
    torch.testing.assert_close(lpips_distance(*views, fused="triton"), lpips_distance(*views, fused=False))
    mixed = lpips_distance(a.bfloat16(), b, weights, fused="triton")
    torch.testing.assert_close(mixed, lpips_distance(a.bfloat16(), b, weights, fused=False))


def test_one_gradient_alone_and_an_expanded_gradient_of_the_distances() -> None:
    a, b = maps((3, 8, 4, 4), torch.float32)
    for wanted in (0, 1):
        pairs = []
        for fused in ("triton", False):
            own = [a.clone(), b.clone()]
            own[wanted].requires_grad_()
            lpips_distance(*own, fused=fused).mean().backward()
            assert own[1 - wanted].grad is None
            pairs.append(own[wanted].grad)
        torch.testing.assert_close(*pairs)


def test_not_a_number_and_infinity_reach_the_distance_and_the_gradient() -> None:
    for bad in (float("nan"), float("inf")):
        for place in (0, 1):
            inputs = maps((2, 4, 2, 2), torch.float32)
            inputs[place][0, 1, 1, 0] = bad
            distance, *grads = run(inputs, None, torch.ones(2, device=DEVICE), "triton")
            assert distance.isnan().tolist() == [True, False]
            for grad in grads:
                assert not grad[0, :, 1, 0].isfinite().any() and grad[1].isfinite().all()


def test_no_samples() -> None:
    a, b = (torch.zeros(0, 4, 2, 2, device=DEVICE, requires_grad=True) for _ in range(2))
    distance = lpips_distance(a, b, fused="triton")
    assert distance.shape == (0,)
    assert torch.autograd.grad(distance.sum(), a)[0].shape == a.shape


def test_registered_operations() -> None:
    a, b = maps((2, 5, 3, 4), torch.float32)
    weights = torch.rand(5, device=DEVICE)
    known = torch.ops.vfmvae
    own = [t.requires_grad_() for t in (a, b)]
    for given in (weights, None):
        torch.library.opcheck(known.lpips_distance_triton.default, (*own, given))
    grad = torch.randn(2, device=DEVICE)
    torch.library.opcheck(
        known.lpips_distance_triton_gradient.default, (grad, a.detach(), b.detach(), weights)
    )
