"""CKNNA against published values and against its definition with whole matrices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vfmvae.metrics import similarity
from vfmvae.metrics.similarity import cknna, clamp_and_normalise


@pytest.mark.parametrize("block", [512 * 100, similarity.BLOCK], ids=["six blocks", "one block"])
def test_the_values_are_the_published_ones(
    parity_dir: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "BLOCK", block)
    features = load_file(parity_dir / "alignment_metrics" / "features.safetensors")
    values = json.loads((parity_dir / "alignment_metrics" / "values.json").read_text())
    a, b = features["features_a"], features["features_b"]
    for k in (5, 10, 50):
        assert cknna(a, b, k) == pytest.approx(values[f"cknna_k{k}"], abs=1e-6)
        assert cknna(a, b, k, unbiased=False) == pytest.approx(values[f"cknna_biased_k{k}"], abs=1e-6)
        assert cknna(a, b, k, dtype=torch.float32) == pytest.approx(values[f"cknna_k{k}"], abs=1e-4)


def by_definition(a: Tensor, b: Tensor, k: int, unbiased: bool) -> float:
    """Whole matrices, the formulas of the specification word by word."""
    m = len(a)
    gram = [a.double() @ a.double().t(), b.double() @ b.double().t()]
    masks = []
    for matrix in gram:
        mask = torch.zeros(m, m, dtype=torch.float64)
        for i in range(m):
            others = [j for j in range(m) if j != i or not unbiased]
            mask[i, sorted(others, key=lambda j: (-matrix[i, j].item(), j))[:k]] = 1
        masks.append(mask)

    def hsic(p: Tensor, q: Tensor) -> Tensor:
        if not unbiased:
            h = torch.eye(m, dtype=torch.float64) - 1 / m
            return (p @ h @ q @ h).trace()
        p, q = p - p.diagonal().diag(), q - q.diagonal().diag()
        inner = (p * q.t()).sum() + p.sum() * q.sum() / ((m - 1) * (m - 2)) - 2 * (p @ q).sum() / (m - 2)
        return inner / (m * (m - 3))

    both = masks[0] * masks[1]
    own = [hsic(mask * matrix, mask * matrix) for mask, matrix in zip(masks, gram, strict=True)]
    return (hsic(both * gram[0], both * gram[1]) / ((own[0] * own[1]).sqrt() + 1e-6)).item()


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("k", [2, 5, 29])
def test_it_is_the_definition_also_where_similarities_are_equal(
    unbiased: bool, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "BLOCK", 30 * 7)  # the last block is smaller
    a = torch.randint(-2, 3, (30, 3)).float()  # whole numbers: equal similarities are exactly equal
    a[10:20] = a[:10]
    b = a @ torch.randint(-1, 2, (3, 5)).float() + torch.randint(-1, 2, (30, 5))
    assert cknna(a, b, k, unbiased) == pytest.approx(by_definition(a, b, k, unbiased), abs=1e-12)


def test_the_same_features_are_aligned_and_unrelated_ones_are_not() -> None:
    a, b = torch.randn(400, 16), torch.randn(400, 16)
    assert cknna(a, a) == pytest.approx(1, abs=1e-4)
    assert abs(cknna(a, b)) < 0.05


def test_features_without_a_common_neighbour_have_no_alignment() -> None:
    a = torch.eye(8).repeat_interleave(2, dim=0)[:8]  # neighbours in pairs
    b = torch.roll(a, 1, dims=0)
    assert cknna(a, b, 2) == pytest.approx(by_definition(a, b, 2, True), abs=1e-12)


def test_no_whole_matrix_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = similarity.nearest
    monkeypatch.setattr(similarity, "BLOCK", 20_000)
    monkeypatch.setattr(
        similarity, "nearest", lambda s, *rest: (seen.append(s.numel()), original(s, *rest))[1]
    )
    cknna(torch.randn(1000, 4), torch.randn(1000, 4))
    assert len(seen) == 2 * 50 and max(seen) <= 20_000


def test_outliers_are_clamped_at_the_exact_rank() -> None:
    features = torch.arange(1.0, 101.0)[torch.randperm(100)].view(20, 5) * torch.tensor([-1, 1, 1, 1, 1])
    clamped = features.clamp(-96, 96)  # rank 95 from 0 of 1..100
    expected = clamped / clamped.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(clamp_and_normalise(features), expected)
    whole = features / features.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(clamp_and_normalise(features, 1.0), whole)


def test_mistakes_are_named() -> None:
    a = torch.randn(12, 3)
    with pytest.raises(ValueError, match="features_a has 12 rows and features_b 11"):
        cknna(a, a[:11])
    with pytest.raises(ValueError, match="k is 1; of 12 images it must be from 2 to 11"):
        cknna(a, a, 1)
    with pytest.raises(ValueError, match="k is 12; of 12 images it must be from 2 to 11"):
        cknna(a, a, 12)
    with pytest.raises(ValueError, match=r"features_b is torch.float32 of shape \(12, 3, 1\)"):
        cknna(a, a[..., None])
    with pytest.raises(ValueError, match="features have 3 rows"):
        cknna(a[:3], a[:3], 2)
    with pytest.raises(ValueError, match="features_a has values that are not finite"):
        cknna(a * torch.tensor([1, float("nan"), 1]), a)
    with pytest.raises(ValueError, match="quantile is 0"):
        clamp_and_normalise(a, 0)
