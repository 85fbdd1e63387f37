from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vfmvae import ops


def test_loss_is_the_formula_over_all_pairs() -> None:
    b, a = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    distance = cosine = 0.0
    for n in range(2):
        for i in range(3):
            cosine += max(0.0, 1 - 0.2 - F.cosine_similarity(a[n, i], b[n, i], dim=0).item()) / 6
            for j in range(3):
                own = F.cosine_similarity(b[n, i], b[n, j], dim=0)
                other = F.cosine_similarity(a[n, i], a[n, j], dim=0)
                distance += max(0.0, (own - other).abs().item() - 0.1) / 18
    loss = ops.vf_alignment_loss(b, a, 0.1, 0.2, 2.0, 0.5)
    assert loss.item() == pytest.approx(2.0 * distance + 0.5 * cosine, abs=1e-12)


def test_loss_is_zero_for_scaled_copies_and_does_not_see_length() -> None:
    a = torch.randn(2, 4, 6).double()
    assert ops.vf_alignment_loss(3 * a, a).item() == pytest.approx(0.0, abs=1e-12)


def test_half_precision_is_computed_in_float32() -> None:
    a = torch.randn(1, 4, 6)
    assert ops.vf_alignment_loss(a.bfloat16(), a).dtype == torch.float32


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        ops.vf_alignment_loss(torch.randn(1, 4, 6), torch.randn(1, 4, 5))
