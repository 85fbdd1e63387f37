from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.metrics import structural_similarity
from torch import Tensor

from tests.helpers import (
    COMPILED,
    assert_kernel_close,
    compile_triton_for_hopper,
    requires_extension,
    run_python,
)
from tests.ops.agreement import assert_agrees
from tests.ops.structural import check_against_float64, index_and_gradients, pair
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


def ssim_by(name: str) -> Callable[..., Tensor]:
    return lambda a, b, data_range: ops.ssim(a, b, data_range, fused=name)


@pytest.mark.parametrize(("name", "dtype"), COMPILED)
@pytest.mark.parametrize(
    "shape", [(2, 3, 40, 50), (1, 1, 11, 11), (1, 3, 11, 75), (3, 2, 33, 12), (1, 3, 147, 131)], ids=str
)
def test_compiled_ssim_and_both_gradients(
    shape: tuple[int, ...], name: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        a, b = (x.contiguous(memory_format=layout) for x in pair(shape, dtype, name))
        check_against_float64(a, b, ssim_by(name))
    check_against_float64(a, b.contiguous(), ssim_by(name))


@requires_extension
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 3, 256, 256), (70_000, 1, 11, 12)], ids=str)
def test_ssim_of_many_images(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    a, b = pair(shape, dtype, "cuda")
    check_against_float64(a, b, ssim_by("cuda"))


@pytest.mark.parametrize(("name", "dtype"), COMPILED)
def test_compiled_ssim_of_equal_and_of_flat_images(name: str, dtype: torch.dtype) -> None:
    image, _ = (x.requires_grad_() for x in pair((2, 3, 40, 50), dtype, name))
    index = ops.ssim(image, image.detach(), fused=name)
    assert (index == 1).all()
    assert torch.autograd.grad(index.sum(), image)[0].abs().max() == 0
    # Flat but for a little noise: variances are differences of numbers a thousand times as large.
    a, b = ((0.9 + 0.003 * torch.randn(2, 3, 40, 50)).to(name).to(dtype) for _ in range(2))
    check_against_float64_in_size(a, b, name)


def check_against_float64_in_size(a: Tensor, b: Tensor, name: str) -> None:
    """As exact as the reference in the root mean square, where both lose digits."""
    grad = torch.ones(len(a), device=a.device)
    ours, eager, truth = (
        index_and_gradients(function, *images, grad)
        for function, images in (
            (ssim_by(name), (a, b)),
            (ssim_by("reference"), (a, b)),
            (ssim_by("reference"), (a.double(), b.double())),
        )
    )
    for result, plain, exact in zip(ours, eager, truth, strict=True):
        error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (result, plain))
        rounding = torch.finfo(result.dtype).eps * exact.abs().max()
        assert error <= 2 * allowed + rounding


@pytest.mark.parametrize(("name", "dtype"), COMPILED)
def test_compiled_ssim_of_strided_images_and_of_two_dtypes(name: str, dtype: torch.dtype) -> None:
    a, b = pair((2, 3, 30, 40), dtype, name)
    wide = torch.zeros(2, 4, 60, 80, device=name, dtype=dtype)
    wide[:, 1:, ::2, 1::2] = a
    view = wide[:, 1:, ::2, 1::2].requires_grad_()
    index = ops.ssim(view, b, fused=name)
    torch.testing.assert_close(index, ops.ssim(a, b, fused=name))
    a.requires_grad_()
    expected = torch.autograd.grad(ops.ssim(a, b, fused=name).sum(), a)[0]
    assert torch.equal(torch.autograd.grad(index.sum(), view)[0], expected)
    mixed = ops.ssim(a, b.float(), fused=name)
    torch.testing.assert_close(mixed, ops.ssim(a.float(), b.float(), fused=False))
    mixed.mean().backward()
    assert a.grad is not None and a.grad.dtype == dtype


@pytest.mark.parametrize(("name", "dtype"), COMPILED)
def test_compiled_ssim_gives_the_gradients_that_are_asked_for(name: str, dtype: torch.dtype) -> None:
    both = [x.requires_grad_() for x in pair((2, 3, 20, 30), dtype, name)]
    expected = torch.autograd.grad(ops.ssim(*both, fused=name).sum(), both)
    for wanted in (0, 1):
        own = [x.detach() for x in both]
        own[wanted].requires_grad_()
        ops.ssim(*own, fused=name).sum().backward()
        assert torch.equal(own[wanted].grad, expected[wanted]) and own[1 - wanted].grad is None
    with torch.no_grad():
        assert not ops.ssim(*both, fused=name).requires_grad
    assert ops.ssim(*(x[:0] for x in both), fused=name).shape == (0,)


@pytest.mark.parametrize(("name", "dtype"), COMPILED)
def test_compiled_ssim_passes_nan_and_infinity_on(name: str, dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf")):
        a, b = pair((2, 2, 40, 30), dtype, name)
        b[0, 1, 3, 4] = bad
        b.requires_grad_()
        index = ops.ssim(a, b, fused=name)
        assert index.isnan().tolist() == [True, False]
        grad = torch.autograd.grad(index.sum(), b)[0]
        assert grad[0, 1, 3, 4].isnan() and grad[1].isfinite().all()


@pytest.mark.parametrize(("name", "dtype"), COMPILED)
def test_compiled_ssim_is_known_to_torch(name: str, dtype: torch.dtype) -> None:
    a, b = pair((2, 2, 14, 17), dtype, name)
    known = torch.ops.vfmvae
    for needs in ((True, True), (False, True), (True, False)):
        own = [x.clone().requires_grad_(need) for x, need in zip((a, b), needs, strict=True)]
        torch.library.opcheck(known.ssim.default, (*own, 2.0, *needs))
    maps = known.ssim(a, b, 2.0, True, True)[1]
    grad = torch.randn(2, device=name)
    torch.library.opcheck(known.ssim_gradient.default, (grad, a, b, maps, 2))
    compiled = torch.compile(lambda a, b: ops.ssim(a, b, fused=name), backend="aot_eager", fullgraph=True)
    own = [x.clone().requires_grad_() for x in (a, b)]
    gradients = [torch.autograd.grad(f(*own).sin().sum(), own) for f in (compiled, ops.ssim)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@requires_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 64, 5, 7), (1, 2, 1, 3), (3, 3, 9, 2), (1, 65, 40, 33), (2, 512, 9, 9), (1, 7, 70, 80)],
    ids=str,
)
def test_lpips_distance_of_the_cpu(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    a, b = (
        torch.randn(shape).clamp_min(-0.5).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    a[0, :, 0, 0] = 0.0
    a, b, grad = a.to(dtype), b.to(dtype), shape[2] * shape[3] * torch.randn(shape[0])
    for weights in (torch.rand(shape[1]), None):
        for tensors in ((a, b), (a.contiguous(), b)):
            ours, eager, truth = (
                distance_and_gradients(images, weights, grad, fused)
                for images, fused in (
                    (tensors, "cpu"),
                    (tensors, False),
                    ([x.double() for x in tensors], False),
                )
            )
            for what, *results in zip(
                ("distance", "grad of a", "grad of b"), ours, eager, truth, strict=True
            ):
                assert_kernel_close(*results, what)
            assert (ours[1][0, :, 0, 0] == 0).all()
    same, *gradients = distance_and_gradients((b, b), torch.rand(shape[1]), grad, "cpu")
    assert (same == 0).all() and all((g == 0).all() for g in gradients)


def distance_and_gradients(
    maps: Sequence[Tensor], weights: Tensor | None, grad: Tensor, fused: bool | str
) -> list[Tensor]:
    own = [x.detach().requires_grad_() for x in maps]
    distance = ops.lpips_distance(*own, weights, fused=fused)
    return [distance.detach(), *torch.autograd.grad(distance, own, grad.to(distance.dtype))]


@requires_extension
def test_lpips_distance_of_the_cpu_is_known_to_torch() -> None:
    a, b, weights, grad = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), torch.rand(5), torch.randn(2)
    known = torch.ops.vfmvae
    torch.library.opcheck(known.lpips_distance_cpu.default, (a.requires_grad_(), b.requires_grad_(), weights))
    torch.library.opcheck(known.lpips_distance_cpu_gradient.default, (grad, a.detach(), b.detach(), weights))
    with pytest.raises(ValueError, match="maps of one dtype"):
        ops.lpips_distance(a, b.bfloat16(), fused="cpu")
    a = torch.randn(2, 4, 2, 2)
    for bad in (float("nan"), float("inf")):
        b = torch.randn(2, 4, 2, 2)
        b[0, 1, 1, 0] = bad
        distance, *grads = distance_and_gradients((a, b), None, torch.ones(2), "cpu")
        assert distance.isnan().tolist() == [True, False]
        assert all(not g[0, :, 1, 0].isfinite().any() and g[1].isfinite().all() for g in grads)
