from __future__ import annotations

import math

import pytest
import torch

from tests.diffusion import published_form as published
from vfmvae.diffusion.embeddings import (
    LabelEmbedder,
    TimestepEmbedder,
    linear,
    rotary_tables,
    sincos_positions,
)


@pytest.mark.parametrize(("width", "side"), [(8, 1), (32, 3), (96, 16)])
def test_positions_equal_the_published_table(width: int, side: int) -> None:
    table = sincos_positions(width, side)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), published.positions(width, side), atol=6e-8, rtol=0)


def test_the_column_has_the_first_half() -> None:
    table = sincos_positions(8, 3)
    assert torch.equal(table[1, 4:], table[0, 4:]) and not torch.equal(table[1, :4], table[0, :4])
    assert torch.equal(table[3, :4], table[0, :4]) and not torch.equal(table[3, 4:], table[0, 4:])
    assert table[1, 0] == pytest.approx(math.sin(1)) and table[1, 2] == pytest.approx(math.cos(1))


def test_rotations_keep_lengths_and_see_only_distances() -> None:
    """What RoPE is for: the product of a query and a key depends on how far apart they are."""
    cos, sin = (table.double() for table in rotary_tables(16, 5))
    query, key = torch.randn(2, 16, dtype=torch.float64)

    def turned(x: torch.Tensor, row: int, column: int) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(0, (-1, 2)))
        token = row * 5 + column
        return torch.view_as_real(pairs * torch.complex(cos[token, ::2], sin[token, ::2])).flatten()

    assert turned(query, 3, 4).norm().item() == pytest.approx(query.norm().item(), rel=1e-6)
    products = [
        (turned(query, row + 2, column + 1) @ turned(key, row, column)).item()
        for row in range(3)
        for column in range(4)
    ]
    assert products == pytest.approx([products[0]] * len(products), abs=1e-5)
    assert abs(products[0] - (turned(query, 1, 2) @ turned(key, 0, 0)).item()) > 1e-3


def test_rotary_tables_have_the_row_first_and_leave_first_tokens() -> None:
    cos, sin = rotary_tables(8, 3, first=2)
    assert cos.shape == sin.shape == (11, 8)
    assert cos[:2].eq(1).all() and sin[:2].eq(0).all()
    angles = published.rotations(8, 3).repeat_interleave(2, dim=1).float()
    torch.testing.assert_close(cos[2:], angles.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[2:], angles.sin(), atol=1e-6, rtol=0)
    assert sin[2 + 3, :4].ne(0).all() and sin[2 + 3, 4:].eq(0).all()  # row 1, column 0


def test_widths_that_cannot_be_split_are_named() -> None:
    with pytest.raises(ValueError, match="width 30 is not divisible by 4"):
        sincos_positions(30, 2)
    with pytest.raises(ValueError, match="heads of width 6 cannot turn"):
        rotary_tables(6, 2)


@torch.no_grad()
def test_times_equal_the_published_embedding() -> None:
    embedder = TimestepEmbedder(12).double()
    t = torch.tensor([0.0, 1e-3, 0.5, 1.0], dtype=torch.float64)
    state = {f"t_embedder.{name}": tensor for name, tensor in embedder.state_dict().items()}
    torch.testing.assert_close(embedder(t, torch.float64), published._times(state, t), atol=1e-12, rtol=0)


@torch.no_grad()
def test_times_in_bfloat16_are_rounded_after_the_waves() -> None:
    embedder = TimestepEmbedder(64)
    t = torch.linspace(0, 1, 9)
    exact, rough = embedder(t, torch.float32), embedder(t, torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.02 * exact.norm()


def test_there_is_one_label_more() -> None:
    embedder = LabelEmbedder(3, 4)
    rows = embedder(torch.tensor([0, 3]), torch.bfloat16)
    assert embedder.embedding_table.weight.shape == (4, 4) and rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float(), embedder.embedding_table.weight[[0, 3]], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_takes_the_dtype_of_its_input(bias: bool) -> None:
    layer = torch.nn.Linear(3, 2, bias=bias)
    x = torch.randn(4, 3, dtype=torch.float64)
    out = linear(x, layer)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, layer.double()(x))
