from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.metrics import structural_similarity

from tests.helpers import compile_triton_for_hopper, run_python
from tests.ops.agreement import assert_agrees
from vfmvae import ops


@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_ssim_equals_scikit_image(size: tuple[int, int]) -> None:
    image = astronaut()[: size[0], : size[1]].astype(np.float64) / 127.5 - 1
    noisy = np.clip(image + 0.2 * np.random.default_rng(0).standard_normal(image.shape), -1, 1)
    expected, full = structural_similarity(
        image, noisy, data_range=2, channel_axis=2, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    a, b = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (image, noisy))
    inside = full[5:-5, 5:-5].mean()  # where the 11 x 11 window fits; scikit-image crops the same frame
    assert ops.ssim(a, b).item() == pytest.approx(inside, abs=1e-10)
    assert ops.ssim(a, b).item() == pytest.approx(expected, abs=1e-10)
    assert ops.ssim(a, a).item() == pytest.approx(1.0)


def test_small_and_unequal_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ops.ssim(torch.zeros(1, 3, 8, 64), torch.zeros(1, 3, 8, 64))
    with pytest.raises(ValueError, match="differ in shape"):
        ops.ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))


def test_lpips_distance_is_the_formula_position_by_position() -> None:
    a, b, weights = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 5, 3, 4).double(), torch.rand(5).double()
    expected = np.zeros(2)
    for n, y, x in np.ndindex(2, 3, 4):
        p, q = a[n, :, y, x].numpy(), b[n, :, y, x].numpy()
        p, q = p / (np.sqrt((p**2).sum()) + 1e-10), q / (np.sqrt((q**2).sum()) + 1e-10)
        expected[n] += (weights.numpy() * (p - q) ** 2).sum() / 12
    distance = ops.lpips_distance(a, b, weights)
    assert distance.dtype == torch.float64
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-13)


def test_lpips_distance_of_known_angles() -> None:
    a = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1)
    others = torch.tensor([[5.0, 0.0], [0.0, 0.1], [-2.0, 0.0]]).view(3, 2, 1, 1)
    # 2 - 2 cos(angle), whatever the lengths; and 1 from a vector that is nothing.
    assert ops.lpips_distance(a.expand(3, -1, -1, -1), others).tolist() == pytest.approx([0.0, 2.0, 4.0])
    assert ops.lpips_distance(a, torch.zeros(1, 2, 1, 1)).item() == pytest.approx(1.0)
    # The offset is added to the length, not under the root: at a length of 1e-10 the vector counts half.
    small = torch.tensor([1e-10, 0.0]).view(1, 2, 1, 1)
    assert ops.lpips_distance(small, torch.zeros(1, 2, 1, 1)).item() == pytest.approx(0.25)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 3, 5, 7), (2, 64, 4, 4)])
def test_lpips_distance_and_its_gradients_in_float32(shape: tuple[int, ...]) -> None:
    a, b, weights = torch.randn(shape), torch.randn(shape), torch.rand(shape[1])
    assert_agrees(ops.lpips_distance, [a, b, weights], limit=2e-5)


def test_dead_positions_have_no_gradient_and_no_nan() -> None:
    a, b = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    a[..., 0, 0] = 0.0
    b[..., 0, 0] = 0.0
    b[..., 1, 1] = 0.0
    a.requires_grad_()
    b.requires_grad_()
    ops.lpips_distance(a, b).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert a.grad[..., 0, 0].abs().max() == 0.0 and b.grad[..., 1, 1].abs().max() == 0.0
    assert torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()
    assert a.grad[..., 0, 1].abs().max() > 0.0


def test_lpips_distance_of_sixteen_bits_is_computed_in_float32() -> None:
    a, b = (torch.randn(2, 512, 3, 3) * 300 for _ in range(2))  # squares beyond float16
    for dtype in (torch.float16, torch.bfloat16):
        distance = ops.lpips_distance(a.to(dtype), b.to(dtype))
        assert distance.dtype == torch.float32
        exact = ops.lpips_distance(a.to(dtype).double(), b.to(dtype).double())
        torch.testing.assert_close(distance.double(), exact, rtol=1e-5, atol=0.0)


def test_lpips_distance_passes_nan_on() -> None:
    a, b = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    a[0, 1, 1, 0] = float("nan")
    assert ops.lpips_distance(a, b).isnan().tolist() == [True, False]
    a[0, 1, 1, 0] = float("inf")
    assert ops.lpips_distance(a, b).isnan().tolist() == [True, False]


def test_lpips_distance_names_what_does_not_fit() -> None:
    a = torch.zeros(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 3\) and \(1, 4, 3, 3\)"):
        ops.lpips_distance(a, a[:1])
    with pytest.raises(ValueError, match=r"weights \(3,\) do not fit maps of 4 channels"):
        ops.lpips_distance(a, a, torch.ones(3))
    with pytest.raises(ValueError, match=r"must be \[B, C, H, W\]"):
        ops.lpips_distance(a[0], a[0])


def test_lpips_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_lpips.py"),
        env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lpips_kernels_on_the_gpu() -> None:
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_lpips.py")


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("channels", [64, 128, 256, 512, 1024, 4096])
def test_lpips_kernels_compile_for_hopper_without_spills(channels: int, element: str) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import lpips

    rows, width, _ = lpips.lpips_tile(torch.empty(1, 65536, channels, device="meta"))
    constants = {"WEIGHTED": True, "ROWS": rows, "WIDTH": width}
    float32 = {"weights_ptr": "*fp32", "partials_ptr": "*fp32", "grad_ptr": "*fp32", "scale": "fp32"}
    for kernel in (lpips._lpips_fwd_kernel, lpips._lpips_bwd_kernel):
        others = {name: element if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
        signature = {name: float32.get(name, kind) for name, kind in others.items() if name not in constants}
        resources = compile_triton_for_hopper(kernel, signature, constants)
        assert resources.spilled == 0, resources
        assert resources.shared <= 8192, resources
        assert resources.registers <= 128, resources


def test_lpips_implementations_say_why_they_are_not_taken() -> None:
    a = torch.randn(2, 8, 3, 3)
    weights = torch.rand(8, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient of weights"):
        ops.lpips_distance(a, a, weights, fused="triton")
    with pytest.raises(ValueError, match="not torch.float64"):
        ops.lpips_distance(a, a.double(), fused="triton")
    with pytest.raises(ValueError, match=r"\[2, 8, 0, 3\] have no channels or no positions"):
        ops.lpips_distance(a[:, :, :0], a[:, :, :0], fused="triton")
    with pytest.raises(ValueError, match="at most 4096 channels, not 4097"):
        ops.lpips_distance(*torch.zeros(2, 1, 4097, 1, 1), fused="triton")
    with pytest.raises(ValueError, match="triton.*(on cpu|not installed)"):
        ops.lpips_distance(a, a, fused="triton")
