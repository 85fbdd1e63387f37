from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.agreement import assert_agrees
from vfmvae import ops


def qkv(batch: int, heads: int, length: int, width: int) -> list[Tensor]:
    return [torch.randn(batch, heads, length, width) for _ in range(3)]


def test_attention_is_a_weighted_mean() -> None:
    query, key, value = (t.double() for t in qkv(1, 2, 4, 3))
    null_key, null_value = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    expected = torch.empty_like(query)
    for head in range(2):
        keys = [null_key[head], *key[0, head]]
        values = [null_value[head], *value[0, head]]
        for i in range(4):
            weights = torch.stack([(query[0, head, i] @ k / 3**0.5).exp() for k in keys])
            expected[0, head, i] = sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))
    out = ops.attention(query, key, value, null_key, null_value, fused=False)
    torch.testing.assert_close(out, expected)
    mean = ops.attention(query, key, value, null_key, null_value, head_mean=True, fused=False)
    torch.testing.assert_close(mean, expected.mean(dim=1))


@pytest.mark.parametrize("shape", [(2, 4, 9, 8), (1, 3, 1, 5), (2, 1, 65, 16)])
@pytest.mark.parametrize("head_mean", [False, True])
def test_attention_agrees(shape: tuple[int, ...], head_mean: bool) -> None:
    def plain(query: Tensor, key: Tensor, value: Tensor, fused: bool) -> Tensor:
        return ops.attention(query, key, value, head_mean=head_mean, fused=fused)

    def with_null(query: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
        return ops.attention(query, key, value, k, v, head_mean, fused=fused)

    heads, width = shape[1], shape[3]
    assert_agrees(plain, qkv(*shape))
    assert_agrees(with_null, [*qkv(*shape), torch.randn(heads, width), torch.randn(heads, width)])


def test_a_lone_null_key_is_refused() -> None:
    with pytest.raises(ValueError, match="null_key and null_value come together"):
        ops.attention(*qkv(1, 1, 2, 2), null_key=torch.randn(1, 2))


@pytest.mark.parametrize("keys", [1, 8, 15, 16, 17])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_what_is_not_a_number_is_not_lost(which: str, keys: int) -> None:
    """Torch's kernel for CPUs makes zeros of a query of NaN where there are fewer than 16 keys."""
    given = {name: torch.randn(1, 2, keys, 16) for name in ("query", "key", "value")}
    given[which][0, 0, 0, 1] = torch.nan
    found, expected = ops.attention(**given), ops.attention(**given, fused=False)
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()
    torch.testing.assert_close(found, expected, equal_nan=True)
