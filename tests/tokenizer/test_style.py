from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vfmvae.tokenizer.style import EqualizedLinear, StyleMapping, StyleSplit, share_of_part


def test_equalised_layers_start_at_unit_scale() -> None:
    layer = EqualizedLinear(400, 300, multiplier=0.01, bias=1.0)
    assert layer.weight.std().item() == pytest.approx(100, rel=0.02)
    torch.testing.assert_close(layer(torch.zeros(1, 400)), torch.ones(1, 300))
    x = torch.randn(2, 400)
    torch.testing.assert_close(layer(x), x @ (layer.weight * 0.01 / 20).t() + 1)


def test_style_is_the_formula() -> None:
    mapping, z = StyleMapping(6, 4).eval(), torch.randn(2, 6, 3, 5)
    s = z.mean(dim=(2, 3))
    s = s / (s.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
    h = F.leaky_relu(s @ mapping.fc0.weight.t() * (0.01 / 6**0.5) + 0.01 * mapping.fc0.bias, 0.2)
    expected = h @ mapping.fc1.weight.t() * (0.01 / 6**0.5) + 0.01 * mapping.fc1.bias
    torch.testing.assert_close(mapping(z), expected)


def test_average_follows_training_and_truncation_leads_to_it() -> None:
    mapping, z = StyleMapping(6, 4), torch.randn(8, 6, 2, 2)
    style = mapping.train()(z)
    torch.testing.assert_close(mapping.average, 0.005 * style.mean(dim=0))
    mapping.eval()
    before = mapping.average.clone()
    torch.testing.assert_close(mapping(z, truncation=0.0), before.expand(8, 4))
    torch.testing.assert_close(mapping(z, truncation=0.5), (before + style) / 2)
    assert torch.equal(mapping.average, before)


def test_parts_of_a_batch_move_the_average_as_the_whole_does() -> None:
    mapping = StyleMapping(6, 4).double().train()
    mapping.average.copy_(torch.randn(4))
    before, z = mapping.average.clone(), torch.randn(12, 6, 2, 2, dtype=torch.float64)
    for parts in (1, 2, 3, 12):
        mapping.average.copy_(before)
        for number, part in enumerate(z.chunk(parts)):
            with mapping.averaging(share_of_part(number, parts)):
                mapping(part)
        expected = 0.995 * before + 0.005 * mapping.eval()(z).mean(dim=0)
        mapping.train()
        torch.testing.assert_close(mapping.average, expected, rtol=1e-14, atol=1e-15)


def test_a_forward_may_leave_the_average_alone() -> None:
    mapping, z = StyleMapping(6, 4).train(), torch.randn(8, 6, 2, 2)
    with mapping.averaging(0.0):
        mapping(z)
    assert not mapping.average.any()
    mapping(z)
    assert mapping.average.any(), "afterwards it moves as before"


def test_pooled_cells_are_concatenated() -> None:
    mapping = StyleMapping(3, 4, pooled=2)
    assert mapping.fc0.weight.shape == (12, 12)
    assert mapping(torch.randn(2, 3, 4, 4)).shape == (2, 4)


def test_split_is_a_product_plus_an_offset() -> None:
    split, style = StyleSplit(5, 3), torch.randn(2, 5)
    m = split.linear(style)
    torch.testing.assert_close(split(style), m[:, :3] * m[:, 3:6] + m[:, 6:])
    torch.testing.assert_close(split.linear.bias, torch.ones(9))
