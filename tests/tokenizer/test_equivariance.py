"""Equivariance regularisation: which branch, which sizes, and that image and latent turn the same way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vfmvae.tokenizer.equivariance import (
    EQUIVARIANCE_UNIFORMS,
    Equivariance,
    EquivarianceConfig,
    check_equivariance,
    draw_equivariance,
    shrink_images,
    transform_images,
    transform_latents,
)

PUBLISHED = EquivarianceConfig()


def grid_of_draws(config: EquivarianceConfig, points: int) -> list[Equivariance]:
    """Draws for every combination of `points` evenly spaced numbers in [0, 1)."""
    axis = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    combinations = torch.cartesian_prod(*[axis] * EQUIVARIANCE_UNIFORMS).tolist()
    return [draw_equivariance(config, uniforms) for uniforms in combinations]


def test_shares_of_the_branches() -> None:
    draws = grid_of_draws(PUBLISHED, 12)
    latent = [d for d in draws if d.image_scale == 1.0]
    shrunk = [d for d in draws if d.image_scale != 1.0]
    assert len(shrunk) / len(draws) == 0.5 * 0.25
    for scale in PUBLISHED.image_scales:
        assert shrunk.count(Equivariance(image_scale=scale)) / len(shrunk) == pytest.approx(1 / 3)
    for scale in PUBLISHED.latent_scales:
        for rotation in PUBLISHED.rotations:
            share = latent.count(Equivariance(scale, rotation)) / len(draws)
            untouched = 0.5 * 0.75 if (scale, rotation) == (1.0, 0) else 0.0
            assert share == pytest.approx(0.5 / 16 + untouched)


def test_the_edges_of_the_probabilities() -> None:
    almost_one = 1 - 2**-53
    assert draw_equivariance(PUBLISHED, [0.0] * 4) == Equivariance(latent_scale=0.25, rotation=0)
    assert draw_equivariance(PUBLISHED, [0.49, 0.9, almost_one, almost_one]) == Equivariance(1.0, 270)
    assert draw_equivariance(PUBLISHED, [0.5, 0.24, almost_one, 0.0]) == Equivariance(image_scale=0.75)
    assert draw_equivariance(PUBLISHED, [0.5, 0.25, 0.0, 0.0]) == Equivariance()


def test_probability_zero_is_off_and_one_is_always() -> None:
    off = EquivarianceConfig(latent_probability=0.0, image_probability=0.0)
    assert set(grid_of_draws(off, 4)) == {Equivariance()}
    always = EquivarianceConfig(latent_probability=1.0, rotations=(90,), latent_scales=(0.5,))
    assert set(grid_of_draws(always, 4)) == {Equivariance(0.5, 90)}
    shrink = EquivarianceConfig(latent_probability=0.0, image_probability=1.0)
    assert {d.image_scale for d in grid_of_draws(shrink, 4)} == set(shrink.image_scales)


def test_nothing_drawn_changes_nothing() -> None:
    images, latents = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    assert shrink_images(images, Equivariance()) is images
    assert transform_images(images, Equivariance()) is images
    assert transform_latents(latents, Equivariance()) is latents


@pytest.mark.parametrize("scale", PUBLISHED.latent_scales)
@pytest.mark.parametrize("rotation", PUBLISHED.rotations)
def test_constant_maps_stay_constant_in_the_new_size(scale: float, rotation: int) -> None:
    draw = Equivariance(scale, rotation)
    images = transform_images(torch.full((2, 3, 64, 64), -0.75), draw)
    latents = transform_latents(torch.full((2, 5, 8, 8), 2.5), draw)
    assert images.shape == (2, 3, round(64 * scale), round(64 * scale))
    assert latents.shape == (2, 5, round(8 * scale), round(8 * scale))
    torch.testing.assert_close(images, torch.full_like(images, -0.75))
    torch.testing.assert_close(latents, torch.full_like(latents, 2.5))


@pytest.mark.parametrize("rotation", PUBLISHED.rotations)
def test_images_and_latents_turn_alike(rotation: int) -> None:
    # Latents that are 4 x 4 averages of the image: any disagreement of the turns would show.
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    draw = Equivariance(rotation=rotation)
    turned, latents = transform_images(images, draw), transform_latents(F.avg_pool2d(images, 4), draw)
    torch.testing.assert_close(F.avg_pool2d(turned, 4), latents)
    torch.testing.assert_close(turned, torch.rot90(images, rotation // 90, (2, 3)), rtol=0, atol=0)
    if rotation:
        assert turned.is_contiguous(memory_format=torch.channels_last)


def test_the_turn_is_counterclockwise() -> None:
    corner = torch.zeros(1, 1, 3, 3)
    corner[..., 0, 2] = 1  # top right
    assert transform_latents(corner, Equivariance(rotation=90))[0, 0, 0, 0] == 1  # top left


def test_half_the_size_by_hand() -> None:
    row = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    plane = row.expand(1, 3, 8, 8).contiguous()
    draw = Equivariance(latent_scale=0.5)
    # Without antialiasing a new point lies between two old ones; with it, it weighs four by 1, 3, 3, 1.
    latents, images = transform_latents(plane, draw), transform_images(plane, draw)
    torch.testing.assert_close(latents[0, 0, 0], torch.tensor([0.0, 0.5, 0.0, 0.0]))
    first = 1 / 7  # 3, 3, 1: the border cuts the fourth
    torch.testing.assert_close(images[0, 0, 0], torch.tensor([first, 3 / 8, 0.0, 0.0]))
    torch.testing.assert_close(shrink_images(plane, Equivariance(image_scale=0.5)), images)


def test_the_encoder_sees_the_shrunk_image_and_the_target_is_that_image() -> None:
    draw = Equivariance(image_scale=0.25)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    inputs = shrink_images(images, draw)
    assert inputs.shape == (1, 3, 8, 8) and inputs.abs().max() <= 1
    assert transform_images(inputs, draw) is inputs
    latents = torch.randn(1, 4, 2, 2)
    assert transform_latents(latents, draw) is latents


def test_gradients_reach_the_latents() -> None:
    latents = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    draw = Equivariance(0.75, 270)
    assert torch.autograd.gradcheck(lambda z: transform_latents(z, draw), latents)


def test_dtype_is_kept() -> None:
    draw = Equivariance(0.5, 90)
    assert transform_latents(torch.randn(1, 2, 4, 4, dtype=torch.bfloat16), draw).dtype == torch.bfloat16
    assert transform_images(torch.rand(1, 3, 8, 8, dtype=torch.float64), draw).dtype == torch.float64


def test_integer_images_and_broken_sizes_are_refused() -> None:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for transform in (shrink_images, transform_images):
        with pytest.raises(ValueError, match="float images in .-1, 1., not torch.uint8"):
            transform(pixels, Equivariance())
    with pytest.raises(ValueError, match=r"6 x 8 times scale 0.25 is 1.5 x 2"):
        transform_latents(torch.zeros(1, 2, 6, 8), Equivariance(0.25))


def test_sizes_that_the_tokenizer_takes() -> None:
    check_equivariance(PUBLISHED, 256, 64)
    at_64 = EquivarianceConfig(latent_scales=(1.0,), image_probability=0.0)
    check_equivariance(at_64, 64, 64)
    check_equivariance(EquivarianceConfig(latent_scales=(1 / 3, 1.0), image_scales=(2 / 3,)), 192, 64)


def test_sizes_that_the_tokenizer_does_not_take_are_named() -> None:
    with pytest.raises(ValueError, match="latent_scales holds 0.25.* 64 px images 16 px.* scales are 1;"):
        check_equivariance(PUBLISHED, 64, 64)
    shrinks = EquivarianceConfig(latent_scales=(0.5, 1.0), image_scales=(0.5, 0.75))
    with pytest.raises(ValueError, match="image_scales holds 0.75.* 128 px images 96 px.* are 0.5, 1; .*"):
        check_equivariance(shrinks, 128, 64)
    with pytest.raises(ValueError, match="set equivariance.image_probability to 0"):
        check_equivariance(shrinks, 128, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_probability": 1.5}, "latent_probability is 1.5"),
        ({"image_probability": -0.1}, "image_probability is -0.1"),
        ({"latent_scales": ()}, r"latent_scales is \(\)"),
        ({"image_scales": (0.5, 2.0)}, r"image_scales is \(0.5, 2.0\)"),
        ({"rotations": (0, 45)}, r"rotations is \(0, 45\)"),
        ({"rotations": ()}, r"rotations is \(\)"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"equivariance.{message}"):
        EquivarianceConfig(**change)  # type: ignore[arg-type]
