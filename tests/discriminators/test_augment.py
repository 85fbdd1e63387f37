"""Differentiable augmentation: every part against a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vfmvae.discriminators.augment import (
    AUGMENT_UNIFORMS,
    augment,
    change_colour,
    erase_square,
    translate,
)

# Brightness + 0, saturation 1, contrast 1.
SAME_COLOUR = [0.5, 0.5, 0.5]


def images(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def draws(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_neutral_draws_keep_the_colours() -> None:
    x = images(2, 3, 8, 8)
    torch.testing.assert_close(change_colour(x, draws(SAME_COLOUR, SAME_COLOUR)), x)


@pytest.mark.parametrize("u", [0.0, 0.25, 0.999])
def test_brightness_is_added(u: float) -> None:
    x = images(1, 3, 8, 8)
    torch.testing.assert_close(change_colour(x, draws([u, 0.5, 0.5])), x + (u - 0.5))


@pytest.mark.parametrize("u", [0.0, 0.25, 0.999])
def test_saturation_scales_the_distance_from_grey(u: float) -> None:
    x = images(1, 3, 8, 8)
    changed = change_colour(x, draws([0.5, u, 0.5]))
    torch.testing.assert_close(changed.mean(dim=1), x.mean(dim=1))
    torch.testing.assert_close(changed[:, 0] - changed[:, 1], 2 * u * (x[:, 0] - x[:, 1]))


@pytest.mark.parametrize("u", [0.0, 0.25, 0.999])
def test_contrast_scales_the_distance_from_the_mean_of_the_image(u: float) -> None:
    x = images(1, 3, 8, 8)
    changed = change_colour(x, draws([0.5, 0.5, u]))
    torch.testing.assert_close(changed.mean(), x.mean())
    torch.testing.assert_close(changed - changed.mean(), (u + 0.5) * (x - x.mean()))


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """A picture cut out of one with a wide black border."""
    height, width = image.shape[-2:]
    wide = torch.nn.functional.pad(image, (width, width, height, height))
    return wide[..., height - down : 2 * height - down, width - right : 2 * width - right]


def test_translation_by_every_amount() -> None:
    x = images(5, 3, 16, 24)  # shifts of up to 2 and 3 pixels
    u = draws([0.0, 0.0], [0.2, 0.999], [0.5, 0.5], [0.61, 0.15], [0.999999, 0.3])
    expected = [(-2, -3), (-1, 3), (0, 0), (1, -2), (2, -1)]
    for result, image, (down, right) in zip(translate(x, u), x, expected, strict=True):
        assert torch.equal(result, shifted(image, down, right))


def test_shifts_are_equally_likely() -> None:
    count = 500
    marked = torch.zeros(count, 3, 16, 16)
    marked[:, :, 8, 8] = 1
    u = ((torch.arange(count) + 0.5) / count)[:, None].expand(-1, 2)
    rows = translate(marked, u)[:, 0].nonzero()[:, 1]
    assert rows.bincount().tolist() == [0] * 6 + [count // 5] * 5


def test_the_gradient_of_a_translation_goes_back_where_the_pixel_came_from() -> None:
    x = images(3, 3, 8, 8).requires_grad_()
    u = draws([0.0, 0.999], [0.5, 0.5], [0.999, 0.0])
    weight = images(3, 3, 8, 8)
    (translate(x, u) * weight).sum().backward()
    assert x.grad is not None
    for gradient, factor, (down, right) in zip(x.grad, weight, [(-1, 1), (0, 0), (1, -1)], strict=True):
        assert torch.equal(gradient, shifted(factor, -down, -right))


def erased(u: list[float], height: int = 20, width: int = 30) -> tuple[list[int], list[int]]:
    """Rows and columns of the square of zeros in a white image; asserts that there is nothing else."""
    result = erase_square(torch.ones(1, 3, height, width), draws(u))[0]
    rows, columns = ((result[0] == 0).any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
    expected = torch.ones(3, height, width)
    expected[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
    assert torch.equal(result, expected)
    return rows, columns


def test_the_square_is_a_fifth_of_the_side_and_is_cut_off_at_the_border() -> None:
    assert erased([0.5, 0.5]) == ([8, 9, 10, 11], [12, 13, 14, 15, 16, 17])
    assert erased([0.0, 0.999]) == ([0, 1], [27, 28, 29])
    # A side of 5 has its centre on a pixel, the last one at most.
    assert erased([0.999, 0.0], 25, 25) == ([22, 23, 24], [0, 1, 2])


def test_augment_is_its_parts_in_order() -> None:
    x, u = images(4, 3, 16, 16), torch.rand(4, AUGMENT_UNIFORMS)
    expected = erase_square(translate(change_colour(x, u[:, :3]), u[:, 3:5]), u[:, 5:])
    assert torch.equal(augment(x, u), expected)
    assert torch.equal(augment(x, u), expected), "the same draws, the same images"
    # An image's result is its own, whatever else is in the batch.
    torch.testing.assert_close(augment(x[2:3], u[2:3]), expected[2:3], rtol=0, atol=1e-12)


def test_gradients_of_first_and_second_order() -> None:
    x = images(2, 3, 8, 8).requires_grad_()
    u = torch.rand(2, AUGMENT_UNIFORMS, dtype=torch.float64)
    assert torch.autograd.gradcheck(augment, (x, u))
    # Linear in the image; squaring gives the second derivative something to find.
    assert torch.autograd.gradgradcheck(
        lambda y: augment(y, u).square(), (x[:, :, :4, :4].detach().requires_grad_(),)
    )


def test_no_value_is_read_back() -> None:
    with torch.device("meta"):  # tensors without values: reading one raises
        result = augment(torch.rand(2, 3, 16, 16), torch.rand(2, AUGMENT_UNIFORMS))
        assert result.shape == (2, 3, 16, 16)


def test_a_wrong_number_of_draws_is_named() -> None:
    with pytest.raises(ValueError, match=r"uniforms are \[2, 6\]; augmenting 3 images takes \[3, 7\]"):
        augment(torch.zeros(3, 3, 8, 8), torch.zeros(2, 6))
