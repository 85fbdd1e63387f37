"""How alike two models see the same images: agreement of their nearest neighbours.

Features are [N, D], one row per image and in the same order for both models; by convention the mean over
patch tokens, without the class token. Similarity is the dot product of rows, as they are given:
`clamp_and_normalise` is what the published protocol does to them first (arXiv 2405.07987).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**23
"""Similarities of each model that are held at a time."""
EPSILON = 1e-6  # in the denominator, as published


def clamp_and_normalise(features: Tensor, quantile: float = 0.95) -> Tensor:
    """Features [N, D] without outliers, rows of unit length; the dtype is kept.

    Values are clamped to +-q, where q has rank int(quantile * N * D), counted from 0, among all absolute
    values in ascending order: no interpolation, and no sample of them.
    """
    _check(features, "features")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}; it must be above 0 and at most 1")
    magnitudes = features.abs().flatten()
    rank = min(int(quantile * magnitudes.numel()), magnitudes.numel() - 1)
    limit = magnitudes.kthvalue(rank + 1).values  # torch counts from 1
    return F.normalize(features.clamp(-limit, limit), dim=1)


def cknna(
    features_a: Tensor,
    features_b: Tensor,
    k: int = 10,
    unbiased: bool = True,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Centred kernel nearest-neighbour alignment of two models (arXiv 2405.07987); 1 for the same features.

    Only pairs of neighbours enter, so beyond the features the memory is O(N k) and one block of rows: no
    N x N matrix is ever whole. Equal similarities break towards the lower index.

    Args:
        features_a: [N, D1].
        features_b: [N, D2], the same images in the same order, on the same device.
        k: neighbours per image, from 2 to N - 1 (N if not unbiased).
        unbiased: the estimator of HSIC without the diagonal; else an image counts as its own neighbour, and
            HSIC is trace(K H L H).
        dtype: of the similarities. Sums are float64 in any case.

    Raises:
        ValueError: shapes, devices or k that do not fit, and features that are not finite.
    """
    _check(features_a, "features_a")
    _check(features_b, "features_b")
    count = len(features_a)
    if len(features_b) != count:
        raise ValueError(f"features_a has {count} rows and features_b {len(features_b)}; one per image each")
    if features_a.device != features_b.device:
        raise ValueError(f"features_a is on {features_a.device} and features_b on {features_b.device}")
    most = count - 1 if unbiased else count
    if unbiased and count < 4:
        raise ValueError(f"features have {count} rows; the unbiased estimator needs at least 4")
    if not 2 <= k <= most:
        raise ValueError(f"k is {k}; of {count} images it must be from 2 to {most}")
    a, b = features_a.to(dtype), features_b.to(dtype)
    of_a, of_b, of_both = _neighbour_pairs(a, b, k, own=not unbiased)
    hsic = _unbiased_hsic if unbiased else _biased_hsic
    agreement = hsic(of_both, count)
    spread = math.sqrt(max(hsic(of_a, count) * hsic(of_b, count), 0.0))
    return agreement / (spread + EPSILON)


class _Pairs(NamedTuple):
    """Two sparse N x N matrices with their values at the same places, row by row."""

    row: Tensor  # int64 [pairs]
    column: Tensor  # int64 [pairs]
    first: Tensor  # float64 [pairs]
    second: Tensor  # float64 [pairs]


def _neighbour_pairs(a: Tensor, b: Tensor, k: int, own: bool) -> tuple[_Pairs, _Pairs, _Pairs]:
    """Where a has neighbours (its similarities twice), where b has, and where both have (one of each)."""
    found: tuple[list[_Pairs], ...] = ([], [], [])
    rows = max(1, BLOCK // len(a))
    for start in range(0, len(a), rows):
        similar_a, similar_b = a[start : start + rows] @ a.t(), b[start : start + rows] @ b.t()
        near_a, near_b = (nearest(similar, k, start, own) for similar in (similar_a, similar_b))
        for pairs, mask, first, second in (
            (found[0], near_a, similar_a, similar_a),
            (found[1], near_b, similar_b, similar_b),
            (found[2], near_a & near_b, similar_a, similar_b),
        ):
            row, column = mask.nonzero(as_tuple=True)
            pairs.append(_Pairs(row + start, column, first[mask].double(), second[mask].double()))
    of_a, of_b, of_both = (_Pairs(*map(torch.cat, zip(*blocks, strict=True))) for blocks in found)
    return of_a, of_b, of_both


def nearest(similarities: Tensor, k: int, start: int, own: bool) -> Tensor:
    """The k most similar of each row, bool [rows, N]; row r is image start + r.

    An image is not its own neighbour unless `own`. Of equal ones those with lower indices are taken.
    """
    if not own:
        similarities = similarities.clone()
        similarities.diagonal(start).fill_(-math.inf)
    least = similarities.topk(k, dim=1).values[:, -1:]
    above, equal = similarities > least, similarities == least
    missing = k - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= missing))


def _unbiased_hsic(pairs: _Pairs, count: int) -> float:
    """[sum(P * Q^T) + sum(P) sum(Q) / ((m-1)(m-2)) - 2 sum(P Q) / (m-2)] / (m (m-3)), diagonals zero."""
    trace, total_p, total_q = _trace(pairs, count), pairs.first.sum().item(), pairs.second.sum().item()
    product, _ = _product_sums(pairs, count)
    centred = trace + total_p * total_q / ((count - 1) * (count - 2)) - 2 * product / (count - 2)
    return centred / (count * (count - 3))


def _biased_hsic(pairs: _Pairs, count: int) -> float:
    """trace(P H Q H) with H = I - 1/m, multiplied out."""
    trace, total_p, total_q = _trace(pairs, count), pairs.first.sum().item(), pairs.second.sum().item()
    return trace - sum(_product_sums(pairs, count)) / count + total_p * total_q / count**2


def _trace(pairs: _Pairs, count: int) -> float:
    """trace(P Q): what lies at (i, j) and at (j, i)."""
    if not len(pairs.row):
        return 0.0
    keys, turned = pairs.row * count + pairs.column, pairs.column * count + pairs.row  # keys ascend
    place = torch.searchsorted(keys, turned).clamp(max=len(keys) - 1)
    mutual = keys[place] == turned
    return (pairs.first * pairs.second[place])[mutual].sum().item()


def _product_sums(pairs: _Pairs, count: int) -> tuple[float, float]:
    """sum(P Q) and sum(Q P) from sums of columns and rows."""

    def summed(index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(count).index_add_(0, index, values)

    of_pq = summed(pairs.column, pairs.first) @ summed(pairs.row, pairs.second)
    of_qp = summed(pairs.column, pairs.second) @ summed(pairs.row, pairs.first)
    return of_pq.item(), of_qp.item()


def _check(features: Tensor, name: str) -> None:
    if features.ndim != 2 or not features.is_floating_point() or not features.numel():
        raise ValueError(
            f"{name} is {features.dtype} of shape {tuple(features.shape)}; needed is floating point [N, D]"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} has values that are not finite; leave those images out")
