"""Local batch norm and spectral norm against PyTorch's own and closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vfmvae.discriminators.layers import LocalBatchNorm, SpectralConv1d, group_count, iterate_together


@pytest.mark.parametrize("shape", [(3, 6, 10), (16, 6, 10), (12, 6, 4, 5)])
def test_local_batch_norm_is_batch_norm_of_each_group(shape: tuple[int, ...]) -> None:
    norm = LocalBatchNorm(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 2
    groups = x.chunk(group_count(len(x)))
    expected = [F.batch_norm(g, None, None, norm.weight, norm.bias, training=True, eps=1e-5) for g in groups]
    torch.testing.assert_close(norm(x), torch.cat(expected))
    torch.testing.assert_close(norm.eval()(x), torch.cat(expected))


def test_groups_are_contiguous() -> None:
    x = torch.cat([torch.randn(8, 2, 50), torch.randn(8, 2, 50) * 9 + 100])
    norm = LocalBatchNorm(2)
    other = x.clone()
    other[8:] = 0
    assert torch.equal(norm(x)[:8], norm(other)[:8])


def test_batches_that_come_together_are_kept_apart() -> None:
    norm = LocalBatchNorm(3)
    for size in (3, 8, 16):
        one, other = torch.randn(2, size, 3, 5)
        torch.testing.assert_close(norm(torch.cat((one, other)), 2), torch.cat((norm(one), norm(other))))


def test_16_bit_input_has_float32_statistics() -> None:
    x = torch.randn(8, 4, 4096) + 40
    norm = LocalBatchNorm(4)
    out = norm(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, norm(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)


def test_batches_are_cut_evenly_or_refused() -> None:
    assert [group_count(batch) for batch in (1, 5, 8, 10, 16, 24)] == [1, 1, 1, 2, 2, 3]
    for batch in (9, 11, 25):
        with pytest.raises(ValueError, match=f"batch of {batch} images.*equal groups.*multiple of 8"):
            group_count(batch)


@pytest.mark.parametrize(("in_channels", "out_channels", "kernel"), [(12, 12, 1), (12, 8, 9), (12, 1, 1)])
def test_the_applied_weight_has_norm_one(in_channels: int, out_channels: int, kernel: int) -> None:
    conv = SpectralConv1d(in_channels, out_channels, kernel).double()
    for _ in range(300):
        conv.iterate()
    largest = torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2)
    torch.testing.assert_close(conv.normalised_weight(), conv.weight / largest, rtol=1e-6, atol=1e-9)


def test_iterating_together_is_iterating_each() -> None:
    shapes = [(12, 12, 1), (12, 8, 9), (12, 1, 1), (12, 8, 9), (12, 12, 1)]
    together = nn.ModuleList(SpectralConv1d(*shape) for shape in shapes)
    apart = copy.deepcopy(together)
    for _ in range(2):
        iterate_together(together)
        for conv in apart:
            conv.iterate()
    for name, value in together.state_dict().items():
        torch.testing.assert_close(value, apart.state_dict()[name], msg=name)


def test_it_is_a_circular_convolution() -> None:
    conv = SpectralConv1d(6, 5, 9).eval()
    x = torch.randn(3, 6, 20)
    plain = nn.Conv1d(6, 5, 9, padding="same", padding_mode="circular")
    plain.weight.data, plain.bias.data = conv.normalised_weight().data, conv.bias.data
    torch.testing.assert_close(conv(x), plain(x))


def test_a_forward_iterates_as_torch_does_in_training_mode_only() -> None:
    conv = SpectralConv1d(6, 5, 3)
    theirs = nn.utils.spectral_norm(nn.Conv1d(6, 5, 3, padding=1, padding_mode="circular"))
    theirs.weight_orig.data, theirs.bias.data = conv.weight.data.clone(), conv.bias.data.clone()
    theirs.weight_u.copy_(conv.u)
    x = torch.randn(2, 6, 10)
    for _ in range(3):
        ours = conv(x)
        torch.testing.assert_close(ours, theirs(x))
        torch.testing.assert_close(conv.u, theirs.weight_u)
        torch.testing.assert_close(conv.v, theirs.weight_v)
    ours.square().sum().backward()
    conv.eval()
    before = copy.deepcopy(conv.state_dict())
    assert torch.equal(conv(x), conv(x))
    assert all(torch.equal(conv.state_dict()[name], value) for name, value in before.items())


def test_the_gradient_includes_that_of_the_norm() -> None:
    conv = SpectralConv1d(4, 3, 1).double().eval()
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(conv, {"weight": weight}, (torch.ones(1, 4, 5).double(),)),
        (conv.weight,),
    )


def test_a_graph_survives_later_iterations() -> None:
    conv = SpectralConv1d(4, 3, 1)
    x = torch.randn(2, 4, 5)
    first = conv(x)
    expected = torch.autograd.grad(first.square().sum(), conv.weight, retain_graph=True)[0]
    conv.eval()
    second = conv(x)
    conv.train()
    conv(x), conv(x)
    (after,) = torch.autograd.grad(first.square().sum(), conv.weight)
    assert torch.equal(after, expected)
    second.sum().backward()


def test_the_state_dict_resumes_exactly() -> None:
    conv = SpectralConv1d(6, 5, 3)
    x = torch.randn(2, 6, 10)
    conv(x)
    other = SpectralConv1d(6, 5, 3)
    other.load_state_dict(conv.state_dict())
    assert sorted(conv.state_dict()) == ["bias", "u", "v", "weight"]
    for _ in range(2):
        assert torch.equal(conv(x), other(x))


def test_16_bit_input_is_convolved_in_16_bit() -> None:
    conv = SpectralConv1d(6, 5, 3).eval()
    x = torch.randn(2, 6, 10)
    out = conv(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), conv(x), rtol=3e-2, atol=3e-2)
