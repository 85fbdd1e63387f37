"""local_batch_norm: the reference, its two forms, and what the kernels need; check_batch_norm.py holds the
kernels' numbers.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import compile_triton_for_hopper, run_python
from vfmvae import ops
from vfmvae.ops.batch_norm import _by_hand, _by_torch, _grouped, _plain_backward

CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_batch_norm.py")


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(*CHECKS, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*CHECKS)


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize(("groups", "channels", "numbers"), [(1, 384, 8 * 196), (1, 128, 8 * 64 * 64)])
def test_kernels_compile_for_hopper_without_spills(
    groups: int, channels: int, numbers: int, side_by_side: bool, element: str
) -> None:
    triton = pytest.importorskip("triton")
    from vfmvae.kernels import batch_norm

    cut = batch_norm.split(groups, numbers, channels, side_by_side)
    for kernel in (
        batch_norm._statistics_kernel,
        batch_norm._normalise_kernel,
        batch_norm._gradient_sums_kernel,
        batch_norm._gradient_kernel,
    ):
        constants = {"BC": cut.channels, "BN": cut.numbers, "PARTS": triton.next_power_of_2(cut.parts)}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        names = [n for n in kernel.arg_names if n not in constants]
        signature = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names}
        signature |= {n: "fp32" for n in ("eps", "slope") if n in names}
        signature |= {n: element for n in ("x_ptr", "grad_ptr", "out_ptr", "grad_x_ptr") if n in names}
        kind = "_channel" if side_by_side else "_position"
        constants |= {n: 1 for n in names if n.startswith("s") and n.endswith(kind)}
        signature = {n: t for n, t in signature.items() if n not in constants}
        resources = compile_triton_for_hopper(kernel, signature, constants)
        assert resources.spilled == 0 and resources.registers <= 160, resources
        assert resources.shared <= 16 << 10, resources


@pytest.mark.parametrize("groups", [1, 2])
def test_both_forms_of_the_reference_are_the_same(groups: int) -> None:
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    x = _grouped(torch.randn(4, 3, 5, dtype=torch.float64), groups)
    torch.testing.assert_close(_by_torch(x, weight, bias, 1e-5), _by_hand(x, weight, bias, 1e-5))


def test_the_leaky_relu_is_behind_the_affine() -> None:
    x, weight, bias = torch.randn(4, 3, 5), *torch.randn(2, 3)
    y = ops.local_batch_norm(x, 2, weight, bias)
    torch.testing.assert_close(
        ops.local_batch_norm(x, 2, weight, bias, slope=0.2), F.leaky_relu(y, 0.2), rtol=0, atol=0
    )
    expected = torch.cat([F.batch_norm(part, None, None, weight, bias, training=True) for part in x.chunk(2)])
    torch.testing.assert_close(y, expected)


def test_the_backward_that_is_differentiated_again() -> None:
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(4, 3, 5), *torch.randn(2, 3)))
    grad = torch.randn(4, 3, 5)
    y = ops.local_batch_norm(x, 2, weight, bias, slope=0.2, fused=False)
    of_x, of_bias, of_weight = _plain_backward(grad, x, weight, bias, 2, 1e-5, 0.2)
    for found, expected in zip(
        (of_x, of_weight, of_bias), torch.autograd.grad(y, (x, weight, bias), grad), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_it_refuses_is_said() -> None:
    x, weight = torch.ones(4, 3, 5), torch.ones(3)
    with pytest.raises(ValueError, match="4 images cannot be cut into 3 equal groups"):
        ops.local_batch_norm(x, 3, weight, weight)
    with pytest.raises(ValueError, match=r"bias is \[2\]"):
        ops.local_batch_norm(x, 2, weight, torch.ones(2))
    with pytest.raises(ValueError, match=r"\[B, C, ...\]"):
        ops.local_batch_norm(weight, 1, weight, weight)
    with pytest.raises(ValueError, match="not torch.float64"):
        ops.local_batch_norm(x.double(), 2, weight, weight, fused="triton")
    with pytest.raises(ValueError, match="(on cpu|not installed)"):
        ops.local_batch_norm(x, 2, weight, weight, fused="triton")
