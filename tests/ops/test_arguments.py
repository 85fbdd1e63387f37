"""Tensors on two devices: an error in words, where compiled code would read memory that is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vfmvae import ops

B, C, E, SIDE = 2, 8, 32, 5
CONV = {"weight": (C, 1, 3, 3), "bias": (C,), "noise": (SIDE, SIDE)}
NORM = {"weight": (C,), "bias": (C,), "style": (B, C)}
OF_CONV = {"conv_weight": (C, 1, 3, 3), "conv_bias": (C,), "noise": (SIDE, SIDE)}
OF_MLP = {
    "style": (B, C),
    "expand_weight": (E, C),
    "expand_bias": (E,),
    "contract_weight": (C, E),
    "contract_bias": (C,),
    "gamma": (C,),
}
OPERATIONS: list[tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], dict[str, int]]] = [
    (ops.depthwise_conv2d, CONV, {}),
    (ops.pointwise_conv2d, {"weight": (7, C), "bias": (7,)}, {}),
    (ops.group_norm, NORM, {"groups": 2}),
    (ops.depthwise_group_norm, OF_CONV | NORM, {"groups": 2}),
    (ops.modulated_mlp, {"residual": (B, C, SIDE, SIDE)} | OF_MLP, {}),
    (ops.modulated_to_rgb, {"style": (B, C), "weight": (3, C), "bias": (3,)}, {}),
    (ops.modulated_convnext, OF_CONV | {"norm_weight": (C,), "norm_bias": (C,)} | OF_MLP, {"groups": 2}),
    (ops.upsample_blur, {"residual": (B, C // 4, 2 * SIDE, 2 * SIDE)}, {"kernel_size": 3}),
]
CASES = [
    pytest.param(*operation, name, id=f"{operation[0].__name__}-{name}")
    for operation in OPERATIONS
    for name in operation[1]
]


@pytest.mark.parametrize(("function", "shapes", "others", "name"), CASES)
def test_a_tensor_on_another_device_is_named(
    function: Callable[..., Tensor], shapes: dict[str, tuple[int, ...]], others: dict[str, int], name: str
) -> None:
    x, tensors = torch.randn(B, C, SIDE, SIDE), {n: torch.randn(s) for n, s in shapes.items()}
    assert function(x=x, **tensors, **others).isfinite().all()
    for fused in (True, False):
        elsewhere = tensors | {name: tensors[name].to("meta")}
        with pytest.raises(ValueError, match=f"{name} is on meta, x on cpu"):
            function(x=x, **elsewhere, **others, fused=fused)


MAPS = [*OPERATIONS, (ops.channel_rms_norm, {"gamma": (C,)}, {})]


@pytest.mark.parametrize(("function", "shapes", "others"), MAPS, ids=lambda of: getattr(of, "__name__", ""))
def test_what_is_no_map_of_numbers_is_named(
    function: Callable[..., Tensor], shapes: dict[str, tuple[int, ...]], others: dict[str, int]
) -> None:
    x, tensors = torch.randn(B, C, SIDE, SIDE), {n: torch.randn(s) for n, s in shapes.items()}
    for fused in (True, False):
        for wrong in (x[0], x.long()):
            with pytest.raises(ValueError, match=r"x must be a floating point \[B, C, H, W\], not"):
                function(x=wrong, **tensors, **others, fused=fused)


def test_the_gamma_of_a_norm_has_the_channels_of_its_map() -> None:
    for shape in ((1,), (C + 1,)):
        with pytest.raises(ValueError, match=rf"gamma is \[{shape[0]}\]; for x .* it must be \[8\]"):
            ops.channel_rms_norm(torch.randn(B, C, SIDE, SIDE), torch.ones(shape))


@pytest.mark.parametrize(("function", "shapes", "others"), MAPS, ids=lambda of: getattr(of, "__name__", ""))
def test_torch_func_looks_into_the_reference(
    function: Callable[..., Tensor], shapes: dict[str, tuple[int, ...]], others: dict[str, int]
) -> None:
    x = torch.randn(B, C, SIDE, SIDE, dtype=torch.float64)
    tensors = {n: torch.rand(s).double() + 0.5 for n, s in shapes.items()}

    def loss(x: Tensor) -> Tensor:
        return function(x=x, **tensors, **others).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    _, along = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, expected.sum())
