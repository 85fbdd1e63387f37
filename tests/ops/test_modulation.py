"""norm_modulate and gated_residual: references, checks of arguments, and what the kernels need;
check_modulation.py holds the kernels' numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import Resources, compile_triton_for_hopper, run_python
from tests.ops.agreement import assert_agrees
from vfmvae import ops

CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_modulation.py")


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, shift, scale, weight, branch; shift and scale are columns of one tensor."""
    x, branch = torch.randn(2, 3, 5, 6, dtype=dtype).unbind()
    shift, scale = torch.randn(3, 12, dtype=dtype).chunk(2, dim=1)
    return [x, shift, scale, torch.randn(6, dtype=dtype), branch]


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_modulate_is_the_formula_at_every_token(norm: str, weighted: bool, shifted: bool) -> None:
    x, shift, scale, weight, _ = inputs()
    given = (shift if shifted else None, scale, weight if weighted else None)
    y = ops.norm_modulate(x, *given, norm=norm, eps=0.1, fused=False)
    for sample in range(3):
        for token in range(5):
            row = x[sample, token]
            if norm == "layer":
                row = (row - row.mean()) / (row.var(correction=0) + 0.1).sqrt()
            else:
                row = row / (row.square().mean() + 0.1).sqrt()
            expected = row * (weight if weighted else 1) * (1 + scale[sample])
            torch.testing.assert_close(y[sample, token], expected + (shift[sample] if shifted else 0))


def test_gated_residual_is_the_formula_at_every_token() -> None:
    x, gate, _, _, branch = inputs()
    y = ops.gated_residual(x, gate, branch, fused=False)
    for sample in range(3):
        for token in range(5):
            torch.testing.assert_close(
                y[sample, token], x[sample, token] + gate[sample] * branch[sample, token]
            )


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_agrees_on_the_cpu(norm: str) -> None:
    x, shift, scale, weight, branch = inputs()

    def modulate(*tensors: Tensor, fused: bool) -> Tensor:
        return ops.norm_modulate(*tensors, norm=norm, fused=fused)

    assert_agrees(modulate, [x, shift, scale, weight])
    assert_agrees(ops.gated_residual, [x, shift, branch])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_of_the_tokens_dtype_and_gradients_of_their_own(
    dtype: torch.dtype, autocast: bool
) -> None:
    x, shift, scale, weight, branch = inputs(torch.float32)
    tensors = [x.to(dtype), shift.bfloat16(), scale, weight.bfloat16(), branch.bfloat16()]
    own = [t.clone().requires_grad_() for t in tensors]
    wide = [t.double().requires_grad_() for t in tensors]
    for take, function in (
        ((0, 1, 2, 3), ops.norm_modulate),
        ((0, 1, 4), ops.gated_residual),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = function(*(own[i] for i in take))
        truth = function(*(wide[i] for i in take), fused=False)
        assert y.dtype == dtype
        found = torch.autograd.grad(y, [own[i] for i in take], torch.ones_like(y))
        exact = torch.autograd.grad(truth, [wide[i] for i in take], torch.ones_like(truth))
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert (y - truth).norm() <= limit * truth.norm()
        for i, one, other in zip(take, found, exact, strict=True):
            assert one.dtype == tensors[i].dtype
            assert (one - other).norm() <= 2e-2 * other.norm().clamp_min(1), i


def test_statistics_of_bfloat16_are_float32() -> None:
    x = (100 + torch.randn(1, 2, 4096)).bfloat16()
    y = ops.norm_modulate(x, None, torch.zeros(1, 4096))
    truth = ops.norm_modulate(x.double(), None, torch.zeros(1, 4096).double(), fused=False)
    assert (y - truth).norm() <= 4e-3 * truth.norm()


def test_what_does_not_fit_is_said() -> None:
    x, shift, scale, weight, branch = inputs()
    with pytest.raises(ValueError, match=r"scale is \[3, 5\].*must be \[3, 6\]"):
        ops.norm_modulate(x, shift, scale[:, 1:])
    with pytest.raises(ValueError, match=r"shift is \[2, 6\]"):
        ops.norm_modulate(x, shift[1:], scale)
    with pytest.raises(ValueError, match=r"weight is \[5\]"):
        ops.norm_modulate(x, shift, scale, weight[1:])
    with pytest.raises(ValueError, match="norm is 'batch'"):
        ops.norm_modulate(x, shift, scale, norm="batch")
    with pytest.raises(ValueError, match=r"\[B, N, C\], not torch.float64 \[5, 6\]"):
        ops.norm_modulate(x[0], shift, scale)
    with pytest.raises(ValueError, match="gate is on meta, x on cpu"):
        ops.gated_residual(x, scale.to("meta"), branch)
    with pytest.raises(ValueError, match=r"branch is \[3, 4, 6\]"):
        ops.gated_residual(x, scale, branch[:, 1:])


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(*CHECKS, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*CHECKS)


FLOATS = ("mean_ptr", "rstd_ptr", "of_shift_ptr", "of_scale_ptr", "of_weight_ptr", "of_gate_ptr")


def resources_of(kernel: Any, element: str, warps: int = 4, **constants: Any) -> Resources:
    """Of a kernel of tokens of `element`, whose statistics and sums are float32."""
    names = [n for n in kernel.arg_names if not n.isupper()]
    signature = {n: element if n.endswith("_ptr") else "i32" for n in names}
    signature |= {n: "*fp32" for n in (*FLOATS, "partials_ptr", "weight_ptr") if n in names}
    signature |= {"eps": "fp32"} if "eps" in names else {}
    return compile_triton_for_hopper(kernel, signature, constants, warps)


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("channels", [768, 1152, 64, 4096])
@pytest.mark.parametrize("centred", [True, False])
def test_norm_kernels_compile_for_hopper_without_spills(centred: bool, channels: int, element: str) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import modulation

    flags = {"CENTRED": centred, "WEIGHTED": not centred}
    for kernel, elements, others in (
        (modulation._norm_modulate_fwd_kernel, 2 * modulation.TILE_ELEMENTS, {"SHIFTED": True}),
        (
            modulation._norm_modulate_bwd_kernel,
            modulation.TILE_ELEMENTS,
            {"STAGES": modulation.STAGES, "OF_WEIGHT": not centred}
            | dict.fromkeys(("OF_X", "OF_SHIFT", "OF_SCALE"), True),
        ),
    ):
        height, width, warps = modulation.row_tile(257, channels, elements)
        found = resources_of(kernel, element, warps, HEIGHT=height, WIDTH=width, **flags, **others)
        assert found.spilled == 0 and found.registers <= 168, found
        assert found.shared <= 64 << 10, found
        assert channels == 64 or min(found.wide) > 0, found


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
def test_residual_kernels_compile_for_hopper_without_spills(element: str) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import modulation

    height, width, _, _ = modulation._residual_tiles(128, 257, 1152)
    tile = {"HEIGHT": height, "WIDTH": width}
    found = [resources_of(modulation._gated_residual_fwd_kernel, element, **tile)]
    backward = modulation._gated_residual_bwd_kernel
    found.append(resources_of(backward, element, OF_GATE=True, OF_BRANCH=True, **tile))
    assert all(min(r.wide) > 0 for r in found), found
    found.append(resources_of(modulation._sum_parts_kernel, element, warps=1, WIDTH=width))
    assert all(r.spilled == 0 and r.registers <= 80 and r.shared <= 16 << 10 for r in found), found


def test_parts_cover_a_sample() -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels.modulation import split

    for tokens in (1, 5, 256, 257, 4096):
        for wanted in (0, 1, 4, 1000):
            parts, per_part = split(tokens, wanted, 8)
            assert (parts - 1) * per_part < tokens <= parts * per_part and per_part % 8 == 0


def test_the_kernels_say_what_they_do_not_take() -> None:
    x, shift, scale, _, branch = inputs(torch.float32)
    with pytest.raises(ValueError, match="triton.*(on cpu|not installed)"):
        ops.norm_modulate(x, shift, scale, fused="triton")
    with pytest.raises(ValueError, match="not torch.float64"):
        ops.gated_residual(x, scale, branch.double(), fused="triton")
    with pytest.raises(ValueError, match="4096 channels, not 5000"):
        ops.norm_modulate(torch.ones(1, 1, 5000), None, torch.ones(1, 5000), fused="triton")


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_result_may_have_another_dtype_than_the_tokens(norm: Any) -> None:
    """Float32 tokens read by 16-bit products: rounded once, at the end, and gradients in float32."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = torch.full((2, 8), 0.5, dtype=torch.bfloat16)
    out = ops.norm_modulate(x, None, scale, norm=norm, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.norm_modulate(x, None, scale, norm=norm).bfloat16())
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
