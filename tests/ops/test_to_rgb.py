"""modulated_to_rgb by Triton: what its kernels need; check_to_rgb.py holds the kernels' numbers."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import SHARED_LIMIT, compile_triton_for_hopper, run_python
from vfmvae import ops

CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_to_rgb.py")


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(*CHECKS, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*CHECKS)


@pytest.mark.parametrize(("channels", "side"), [(512, 64), (256, 128), (128, 256), (512, 8)])
def test_kernels_compile_for_hopper_without_spills(channels: int, side: int) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import to_rgb

    for kernel, elements in (
        (to_rgb._to_rgb_fwd_kernel, to_rgb.FWD_ELEMENTS),
        (to_rgb._to_rgb_bwd_kernel, to_rgb.BWD_ELEMENTS),
    ):
        height, width = to_rgb.block(side * side, channels, elements)
        names = [n for n in kernel.arg_names if not n.isupper()]
        signature = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names}
        signature |= {n: "*bf16" for n in ("x_ptr", "grad_x_ptr") if n in names}
        constants = {"C": channels, "BP": height, "BC": width}
        resources = compile_triton_for_hopper(kernel, signature, constants)
        assert resources.spilled == 0 and resources.registers <= 168, resources
        assert resources.shared <= SHARED_LIMIT, resources


def test_what_it_refuses_is_said() -> None:
    x, style, bias = torch.ones(1, 8, 2, 2), torch.ones(1, 8), torch.ones(4)
    with pytest.raises(ValueError, match="three colours, not 4"):
        ops.modulated_to_rgb(x, style, torch.ones(4, 8), bias, fused="triton")
    with pytest.raises(ValueError, match="not torch.float64"):
        ops.modulated_to_rgb(x.double(), style, torch.ones(3, 8), bias[:3], fused="triton")
    with pytest.raises(ValueError, match="(on cpu|not installed)"):
        ops.modulated_to_rgb(x, style, torch.ones(3, 8), bias[:3], fused="triton")
