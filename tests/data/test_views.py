"""Views show what their geometry says, and colours change within their limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vfmvae.data import views
from vfmvae.data.views import Views, draw_views, grid_points, jitter, to_grey


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def map_of_places(batch: int, side: int) -> Tensor:
    """Images whose red is the x coordinate of the pixel and whose green is y."""
    points = grid_points(side, torch.device("cpu")).view(1, side, side, 2).permute(0, 3, 1, 2)
    return torch.cat([points, torch.zeros(1, 1, side, side)], dim=1).expand(batch, -1, -1, -1)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "jitter", lambda images, _: images)


@pytest.mark.usefixtures("plain")
def test_a_view_shows_the_points_it_names() -> None:
    drawn = draw_views(map_of_places(64, 96), 32, generator())
    points = grid_points(32, torch.device("cpu")).expand(64, -1, -1)
    shown = drawn.images[:, :2].flatten(2).transpose(1, 2)
    edge = 1 - 1 / 96  # beyond the outermost pixel centres the border is repeated
    assert torch.allclose(shown, drawn.to_place(points).clamp(-edge, edge), atol=1e-5)
    assert torch.allclose(drawn.from_place(drawn.to_place(points)), points, atol=1e-5)


@pytest.mark.usefixtures("plain")
def test_squares_are_inside_and_half_are_mirrored() -> None:
    drawn = draw_views(map_of_places(2000, 8), 4, generator())
    assert drawn.half.min() >= 0.5 and drawn.half.max() <= 1
    assert (drawn.centre.abs() + drawn.half).max() <= 1 + 1e-6
    assert drawn.mirror[:, 0].mean().abs() < 0.1 and (drawn.mirror[:, 1] == 1).all()


def test_two_views_of_a_place_agree_where_both_look() -> None:
    first = Views(
        torch.empty(0), torch.tensor([[0.2, -0.1]]), torch.tensor([[0.5]]), torch.tensor([[-1.0, 1.0]])
    )
    second = Views(
        torch.empty(0), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0]]), torch.tensor([[1.0, 1.0]])
    )
    corner = torch.tensor([[[1.0, 1.0]]])  # mirrored: the left edge of the square
    assert torch.allclose(second.from_place(first.to_place(corner)), torch.tensor([[[-0.3, 0.4]]]))


def test_jitter_stays_in_range_and_follows_its_generator() -> None:
    images = torch.rand(400, 3, 8, 8) * 2 - 1
    one, same, other = (jitter(images, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.abs().max() <= 1 and one.isfinite().all()
    spread = (one - one.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3))
    assert 0.2 < (spread < 1e-6).float().mean() < 0.4, "about a third is grey"


def test_blur_keeps_flat_areas_and_lowers_contrast() -> None:
    flat = torch.full((2, 3, 8, 8), 0.25)
    assert torch.allclose(views._binomial_blur(flat), flat)
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 3, 16, 16)
    assert views._binomial_blur(stripes)[..., 4:-4, 4:-4].abs().max() < 1e-6


def test_grey_is_luma() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert to_grey(red).item() == pytest.approx(0.299)
    assert torch.allclose(to_grey(torch.full((1, 3, 2, 2), -0.5)), torch.tensor(-0.5))
