"""The whole decoder as one graph: of torch.compile without a break, and of CUDA."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICES
from vfmvae.tokenizer import DecoderConfig
from vfmvae.tokenizer.decoder import Decoder

LEAST_GRADIENT = 1e-5
Result = tuple[list[Tensor], dict[str, Tensor]]


def built(device: str) -> tuple[Decoder, Tensor, Tensor]:
    """A decoder with all that one has, of few channels, and its inputs."""
    torch.manual_seed(0)
    config = DecoderConfig(
        channel_base=1024,
        channel_max=32,
        num_res_blocks=1,
        latent_widths=(8, 8, 8, 8),
        style_width=16,
        attention_blocks=(0,),
        attention_depths=(1,),
    )
    decoder = Decoder(config, 8, 16)
    for name, parameter in decoder.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(0.5)
        elif not parameter.any():  # or what lies before it would have no gradient
            parameter.data.normal_(std=0.2)
    z_map, style = torch.randn(2, 8, 8, 8), torch.randn(2, 16)  # the first block's input is 2 x 2
    return decoder.to(device), z_map.to(device), style.to(device)


def backward(
    decoder: Decoder, z_map: Tensor, style: Tensor, function: Callable[..., list[Tensor]] | None = None
) -> Result:
    images = (decoder if function is None else function)(z_map, style)
    sum(image.float().square().mean() for image in images).backward()
    return [image.detach() for image in images], {n: p.grad for n, p in decoder.named_parameters()}


def assert_same(found: Result, expected: Result, limit: float) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit)
    for name, gradient in expected[1].items():
        assert gradient.norm() > LEAST_GRADIENT, f"{name}: a gradient of nothing but rounding shows nothing"
        error = (found[1][name] - gradient).norm() / gradient.norm()
        assert error < limit, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("device", DEVICES)
def test_it_compiles_without_a_break(device: str) -> None:
    decoder, z_map, style = built(device)
    twin = copy.deepcopy(decoder)
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    assert_same(backward(twin, z_map, style, compiled), backward(decoder, z_map, style), 1e-4)


@pytest.mark.gpu
def test_forward_and_backward_are_captured_in_a_cuda_graph() -> None:
    decoder, z_map, style = built("cuda")
    z_map = z_map.bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels and sets libraries up
        for _ in range(2):
            decoder.zero_grad(set_to_none=True)
            backward(decoder, z_map, style)
    torch.cuda.current_stream().wait_stream(side)
    decoder.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = backward(decoder, z_map, style)
    z_map.copy_(torch.randn_like(z_map))
    style.copy_(torch.randn_like(style))
    graph.replay()
    found = [image.clone() for image in recorded[0]], {n: g.clone() for n, g in recorded[1].items()}
    decoder.zero_grad(set_to_none=True)
    assert_same(found, backward(decoder, z_map, style), 1e-2)
