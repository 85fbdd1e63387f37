"""The fading blur against its closed form and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from vfmvae.discriminators.blur import blur_sigma, gaussian_blur


def test_sigma_falls_linearly_to_zero_and_stays_there() -> None:
    assert [blur_sigma(seen, 10.0, 200) for seen in (0, 50, 150, 200, 10**9)] == [10.0, 7.5, 2.5, 0.0, 0.0]


def test_no_fade_and_no_sigma_are_no_blur() -> None:
    assert blur_sigma(0, 10.0, 0) == 0.0
    assert blur_sigma(0, 0.0, 200) == 0.0
    for wrong in ((-1.0, 10), (1.0, -10)):
        with pytest.raises(ValueError, match="must not be negative"):
            blur_sigma(0, *wrong)


@pytest.mark.parametrize(("size", "sigma"), [((20, 33), 1.0), ((16, 16), 2.5), ((5, 9), 4.0), ((1, 8), 1.0)])
def test_it_is_the_gaussian_filter_of_scipy(size: tuple[int, int], sigma: float) -> None:
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = gaussian_filter(
        images.numpy(),
        sigma=(0, 0, sigma, sigma),
        mode="nearest",
        radius=(0, 0, int(3 * sigma), int(3 * sigma)),
    )
    np.testing.assert_allclose(gaussian_blur(images, sigma).numpy(), expected, atol=1e-12)


def test_below_a_third_of_a_pixel_images_are_returned_as_they_are() -> None:
    images = torch.randn(1, 3, 8, 8)
    assert gaussian_blur(images, 0.0) is images
    assert gaussian_blur(images, 0.33) is images
    assert not torch.equal(gaussian_blur(images, 0.34), images)


def test_constant_images_stay_and_so_does_the_sum_of_the_gradient() -> None:
    images = torch.full((1, 3, 12, 7), 0.25, requires_grad=True)
    blurred = gaussian_blur(images, 3.0)
    torch.testing.assert_close(blurred, images)
    weight = torch.randn(1, 3, 12, 7)
    (gradient,) = torch.autograd.grad((blurred * weight).sum(), images)
    # Every output pixel's weights sum to 1, so what comes back is what went in, spread.
    torch.testing.assert_close(gradient.sum(), weight.sum(), rtol=1e-4, atol=1e-4)
    assert gradient.std() < weight.std()


def test_gradient_is_that_of_finite_differences() -> None:
    images = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gaussian_blur(x, 0.8), images)


def test_sixteen_bits_are_widened_and_given_back() -> None:
    images = torch.rand(1, 3, 32, 32).bfloat16()
    blurred = gaussian_blur(images, 2.0)
    assert blurred.dtype == torch.bfloat16
    torch.testing.assert_close(blurred, gaussian_blur(images.float(), 2.0).bfloat16(), rtol=0.0, atol=0.0)
