"""fusion_projection and normed_geglu: references, the CPU's form, and what the kernels need; check_fusion.py
holds the numbers of the fused forms.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import compile_triton_for_hopper, run_python
from tests.ops.agreement import assert_agrees
from vfmvae import ops

CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_fusion.py")


def layers(width: int, qkv: int, skip: int) -> list[Tensor]:
    affine = [1 + 0.1 * torch.randn(width), torch.randn(width)]
    return [
        *affine,
        torch.randn(qkv, width),
        torch.randn(qkv),
        *affine,
        torch.randn(skip, width),
        torch.randn(skip),
    ]


def project(x: Tensor, *parts: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    return ops.fusion_projection(x, ops.NormedLinear(*parts[:4]), ops.NormedLinear(*parts[4:]), fused=fused)


def test_projection_is_the_formula_at_every_token() -> None:
    x, parts = torch.randn(1, 2, 6).double(), [p.double() for p in layers(6, 9, 4)]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    qkv, skip = project(x, *parts, fused=False)
    for result, (weight, bias, matrix, offset) in ((qkv, parts[:4]), (skip, parts[4:])):
        for token in range(2):
            expected = matrix @ (normed[0, token] * weight + bias) + offset
            torch.testing.assert_close(result[0, token], expected)


@pytest.mark.parametrize("shape", [(2, 16, 12), (1, 3, 7)])
def test_projection_agrees(shape: tuple[int, ...]) -> None:
    assert_agrees(project, [torch.randn(shape), *layers(shape[2], 3 * shape[2], 5)])


def test_gated_is_the_formula() -> None:
    x, parts = torch.randn(2, 3, 6).double(), [p.double() for p in layers(6, 8, 8)]
    gate, value = project(x, *parts, fused=False)
    both = ops.NormedLinear(*parts[:4]), ops.NormedLinear(*parts[4:])
    torch.testing.assert_close(ops.normed_geglu(x, *both), ops.geglu(gate, value, fused=False))
    shared = both[0], both[1]._replace(norm_weight=parts[0], norm_bias=parts[1])
    apart = both[0], both[1]._replace(norm_weight=parts[0].clone(), norm_bias=parts[1].clone())
    assert torch.equal(ops.normed_geglu(x, *shared), ops.normed_geglu(x, *apart))


def test_gradients_of_the_parts_come_as_one_tensor() -> None:
    tensors = [torch.randn(2, 5, 6, requires_grad=True), *layers(6, 8, 4)]
    first, second = project(*tensors, fused="gemm")
    assert first.grad_fn is not None and first.grad_fn is second.grad_fn


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(*CHECKS, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*CHECKS)


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("channels", [1024, 768, 512, 64, 32, 8192])
def test_kernels_compile_for_hopper_without_spills(channels: int, element: str) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import norm

    height, width, warps = norm.tile(1024, channels)
    for kernel in (norm._normalise_rows_fwd_kernel, norm._normalise_rows_bwd_kernel):
        names = [n for n in kernel.arg_names if not n.isupper()]
        signature = {n: element if n.endswith("_ptr") else "i32" for n in names}
        signature |= {n: t for n, t in (("rstd_ptr", "*fp32"), ("eps", "fp32")) if n in names}
        resources = compile_triton_for_hopper(kernel, signature, {"HEIGHT": height, "WIDTH": width}, warps)
        assert resources.spilled == 0 and resources.registers <= 168, resources
        assert resources.shared <= 4 << 10, resources


def test_what_it_refuses_is_said() -> None:
    x, parts = torch.randn(2, 5, 6), layers(6, 8, 4)
    both = ops.NormedLinear(*parts[:4]), ops.NormedLinear(*parts[4:])
    with pytest.raises(ValueError, match="(on cpu|not installed)"):
        ops.fusion_projection(x, *both, fused="triton")
    with pytest.raises(ValueError, match="not torch.float64"):
        ops.fusion_projection(x.double(), *both, fused="triton")
    with pytest.raises(ValueError, match="8192 channels, not 9000"):
        wide = ops.NormedLinear(*layers(9000, 2, 1)[:4])
        ops.fusion_projection(torch.randn(1, 9000), wide, wide, fused="triton")
    with pytest.raises(ValueError, match=r"norm_bias is \[5\]"):
        ops.fusion_projection(x, both[0]._replace(norm_bias=torch.ones(5)), both[1])
    with pytest.raises(ValueError, match=r"gate's weight is \[8, 6\], the value's \[4, 6\]"):
        ops.normed_geglu(x, *both)
