"""upsample_blur: the reference against a second formulation, the compiled forms against the reference."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from tests.helpers import COMPILED, ROOT, assert_kernel_close, requires_extension
from vfmvae.ops import upsample_blur
from vfmvae.ops.resample import upsample_blur_reference

SHAPES = [  # batch, output channels, height, width
    (2, 8, 6, 5),
    (1, 3, 7, 4),
    (1, 1, 1, 1),
    (2, 5, 1, 8),
    (3, 4, 9, 1),
    (1, 40, 5, 70),  # several column tiles
    (1, 4, 67, 3),  # several bands of rows
    (1, 260, 2, 10),
]


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_reference_is_a_separable_binomial_filter(kernel_size: int) -> None:
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    # Sub-pixel (dy, dx) of channel c is channel 4c + 2dy + dx.
    pixels = x.numpy().reshape(2, 3, 2, 2, 5, 4).transpose(0, 1, 4, 2, 5, 3).reshape(2, 3, 10, 8)
    taps = {1: [1.0], 3: [0.25, 0.5, 0.25], 5: [0.0625, 0.25, 0.375, 0.25, 0.0625]}[kernel_size]
    for axis in (2, 3):
        pixels = scipy.ndimage.correlate1d(pixels, np.array(taps), axis=axis, mode="nearest")
    np.testing.assert_allclose(upsample_blur_reference(x, kernel_size).numpy(), pixels, atol=1e-14)


def test_reference_keeps_a_constant_image() -> None:
    y = upsample_blur(torch.full((1, 8, 3, 3), 0.7), 5, residual=torch.ones(1, 2, 6, 6), fused=False)
    torch.testing.assert_close(y, torch.full((1, 2, 6, 6), 1.7))


@pytest.mark.parametrize("upscale", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), COMPILED)
def test_compiled_forms_and_their_gradients(
    shape: tuple, kernel_size: int, upscale: int, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    batch, channels, height, width = shape
    x = torch.randn(batch, channels * upscale**2, height, width, device=device).to(dtype)
    residual, grad = torch.randn(2, batch, channels, height * upscale, width * upscale, device=device).to(
        dtype
    )

    def run(fused: bool | str, convert) -> list[Tensor]:
        inputs = [convert(t).requires_grad_() for t in (x, residual)]
        out = upsample_blur(inputs[0], kernel_size, upscale, inputs[1], fused=fused)
        return [out.detach(), *torch.autograd.grad(out, inputs, convert(grad))]

    compiled, eager, truth = run(device, torch.clone), run(False, torch.clone), run(False, Tensor.double)
    assert compiled[0].is_contiguous(memory_format=torch.channels_last)
    for what, *results in zip(
        ("output", "grad of x", "grad of residual"), compiled, eager, truth, strict=True
    ):
        assert_kernel_close(*results, what)


@requires_extension
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_backward_is_the_exact_adjoint(kernel_size: int) -> None:
    x, g = torch.randn(1, 8, 3, 5), torch.randn(1, 2, 6, 10)
    backward = torch.ops.vfmvae.upsample_blur_adjoint(g, kernel_size, 2)
    forward = upsample_blur(x, kernel_size, fused="cpu")
    torch.testing.assert_close((x.double() * backward).sum(), (forward.double() * g).sum())


@requires_extension
def test_second_derivatives() -> None:
    x = torch.randn(1, 4, 3, 3, requires_grad=True)

    def penalty(fused: bool | str) -> Tensor:
        y = upsample_blur(x, 3, fused=fused)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    torch.testing.assert_close(penalty("cpu"), penalty(False))


@requires_extension
def test_result_does_not_depend_on_layout_or_threads() -> None:
    x = torch.randn(3, 64, 40, 24)
    expected = upsample_blur(x, 5, fused="cpu")
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(upsample_blur(last, 5, fused="cpu"), expected)
    assert torch.equal(
        upsample_blur(x.transpose(2, 3).contiguous().transpose(2, 3), 5, fused="cpu"), expected
    )
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(upsample_blur(x, 5, fused="cpu"), expected)
    finally:
        torch.set_num_threads(threads)


@requires_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_spread_as_in_the_reference(value: float, dtype: torch.dtype) -> None:
    x = torch.randn(1, 16, 6, 6, dtype=dtype)
    x[0, 5, 3, 2] = value
    x[0, 8, 0, 5] = value
    compiled, reference = upsample_blur(x, 5, fused="cpu"), upsample_blur(x, 5, fused=False)
    assert torch.equal(compiled.isnan(), reference.isnan())
    assert torch.equal(compiled.isinf(), reference.isinf())
    assert not compiled.isfinite().all()


@requires_extension
@pytest.mark.parametrize("fused", ["cpu", False])
@pytest.mark.parametrize(("kernel_size", "upscale"), [(3, 2), (5, 1), (1, 2)])
def test_empty_batch(kernel_size: int, upscale: int, fused: bool | str) -> None:
    x = torch.empty(0, 4, 3, 2, requires_grad=True)
    y = upsample_blur(x, kernel_size, upscale, fused=fused)
    assert y.shape == (0, 4 // upscale**2, 3 * upscale, 2 * upscale)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@requires_extension
def test_registered_operations() -> None:
    x, residual = torch.randn(2, 8, 3, 4, requires_grad=True), torch.randn(2, 2, 6, 8, requires_grad=True)
    forward = torch.ops.vfmvae.upsample_blur.default
    torch.library.opcheck(forward, (x, residual, 3, 2))
    torch.library.opcheck(forward, (x, None, 5, 1))
    torch.library.opcheck(torch.ops.vfmvae.upsample_blur_adjoint.default, (residual, 3, 2))


@requires_extension
def test_torch_compile_sees_one_operation() -> None:
    graphs = []

    def remember(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: upsample_blur(x, 3) + 1, backend=remember, fullgraph=True)
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(compiled(x), upsample_blur(x, 3, fused=False) + 1)
    assert [str(n.target) for n in graphs[0].graph.nodes if "upsample" in str(n.target)] == [
        "vfmvae.upsample_blur.default"
    ]


def test_mixed_dtypes_are_promoted() -> None:
    x, residual = torch.randn(1, 4, 2, 2, dtype=torch.bfloat16), torch.randn(1, 1, 4, 4)
    for fused in (False, True):
        y = upsample_blur(x, 3, residual=residual, fused=fused)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, upsample_blur(x.float(), 3, fused=False) + residual)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_reference_and_its_gradient_compile(kernel_size: int) -> None:
    """torch's replicated padding does not, in a program of more than itself."""
    x = torch.randn(2, 8, 5, 6)
    results = []
    for wrap in (torch.compile, lambda function: function):
        leaf = x.clone().requires_grad_()
        y = wrap(lambda x: upsample_blur(2 * x, kernel_size, fused=False))(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def test_dtypes_without_a_compiled_form_go_to_the_reference_or_say_so() -> None:
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(upsample_blur(x, 3, fused=True), upsample_blur(x, 3, fused=False))
    with pytest.raises(ValueError, match="'cpu' cannot be used here: .*float64"):
        upsample_blur(x, 3, fused="cpu")
    with pytest.raises(ValueError, match="'cuda' cannot be used here: the tensor is on cpu"):
        upsample_blur(x.float(), 3, fused="cuda")


@pytest.mark.parametrize(
    ("shape", "kernel_size", "upscale", "residual", "sentence"),
    [
        ((1, 4, 3, 3), 4, 2, None, "kernel_size 4 is not one of 1, 3, 5"),
        ((1, 4, 3, 3), 3, 3, None, "upscale 3 is not one of 1, 2"),
        ((1, 6, 3, 3), 3, 2, None, "6 channels cannot be shuffled"),
        ((4, 3, 3), 3, 2, None, r"\[4, 3, 3\]"),
        ((1, 4, 0, 3), 3, 2, None, "no pixels"),
        ((1, 4, 3, 3), 3, 2, (1, 1, 6, 5), r"\[1, 1, 6, 5\].*\[1, 1, 6, 6\]"),
    ],
)
def test_arguments_that_do_not_fit(shape, kernel_size, upscale, residual, sentence) -> None:
    other = None if residual is None else torch.zeros(residual)
    with pytest.raises(ValueError, match=sentence):
        upsample_blur(torch.zeros(shape), kernel_size, upscale, other)
    if residual is None:
        with pytest.raises(ValueError, match="int64"):
            upsample_blur(torch.zeros((1, 4, 3, 3), dtype=torch.int64), 3)


@requires_extension
def test_extension_refuses_bad_arguments() -> None:
    from vfmvae import _C

    good = {"x": 0, "residual": 0, "out": 0, "dtype": "float32", "batch": 0, "height": 1, "width": 1}
    good |= {"channels": 1, "kernel_size": 3, "upscale": 2, "adjoint": False, "threads": 1}
    _C.upsample_blur_cpu(**good)  # an empty batch touches nothing
    for name, value, sentence in [
        ("kernel_size", 2, "kernel_size 2 is not one of 1, 3, 5"),
        ("upscale", 4, "upscale 4"),
        ("height", 0, "height is 0, but must be at least 1"),
        ("dtype", "int8", "dtype int8"),
        ("dtype", "float16", "float16"),
        ("threads", 0, "threads is 0"),
        ("width", 2**40, "longer than 2\\^28"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            _C.upsample_blur_cpu(**{**good, name: value})
    with pytest.raises(ValueError, match="residual"):
        _C.upsample_blur_cpu(**{**good, "adjoint": True, "residual": 16})


def test_works_without_the_extension() -> None:
    """As in a checkout that was never built: the extension is hidden from the import system."""
    program = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "vfmvae._C":
            raise AssertionError("imported although absent")
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, package=None: None if name == "vfmvae._C" else found(name, package)
sys.meta_path.insert(0, Hide())
import torch
from vfmvae.ops import upsample_blur
x = torch.randn(1, 4, 2, 2)
assert torch.equal(upsample_blur(x, 3), upsample_blur(x, 3, fused=False))
try:
    upsample_blur(x, 3, fused="cpu")
except ValueError as error:
    assert "pip install -e ." in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
