"""Files of every kind become the RGB pixels they show, and crops come from where they should."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vfmvae.data.transforms import CropConfig, as_rgb, centre_crop, random_crop


def ramp(width: int, height: int) -> Image.Image:
    """Red grows by 1 per pixel to the right, green by 1 per pixel downwards."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8))


def pixel(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(int(value) for value in np.asarray(image)[0, 0])


def test_rgb_is_left_as_it_is() -> None:
    assert np.array_equal(as_rgb(ramp(5, 4)), ramp(5, 4))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth of black over white
        ("LA", (0, 0), (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_modes(mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert pixel(as_rgb(Image.new(mode, (2, 2), colour))) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (65535, 255), (257 * 100, 100), (257 * 100 + 129, 101)]
)
def test_sixteen_bit_png_keeps_its_grey(value: int, expected: int) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), value, np.uint16)).save(file, "png")
    assert pixel(as_rgb(Image.open(file))) == (expected,) * 3


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = io.BytesIO()
    image.save(file, "png", transparency=1)
    rgb = np.asarray(as_rgb(Image.open(file)))
    assert rgb[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_exif_orientation_is_applied() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    ramp(6, 4).save(file, "png", exif=exif)
    assert np.array_equal(as_rgb(Image.open(file)), np.rot90(np.asarray(ramp(6, 4)), k=-1))


@pytest.mark.parametrize("image", [Image.new("F", (2, 2)), Image.new("LAB", (2, 2))])
def test_unknown_ranges_are_refused(image: Image.Image) -> None:
    with pytest.raises(ValueError, match=f"mode '{image.mode}'"):
        as_rgb(image)


def test_integers_beyond_sixteen_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="70000"):
        as_rgb(Image.fromarray(np.full((2, 2), 70000, np.int32)))


def test_centre_crop_takes_the_middle() -> None:
    crop = centre_crop(ramp(40, 20), 20)
    assert crop.shape == (20, 20, 3) and crop.dtype == np.uint8
    assert np.array_equal(crop, np.asarray(ramp(40, 20))[:, 10:30])


def test_large_images_are_averaged_before_they_are_resized() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    averages = pixels.reshape(16, 4, 20, 4, 3).mean(axis=(1, 3))[:, 2:18]
    crop = centre_crop(Image.fromarray(pixels), 16).astype(float)
    assert np.abs(crop - averages).max() <= 2, "two box halvings, whose passes are rounded"


def test_a_strip_is_cut_before_it_is_resized() -> None:
    strip = ramp(250, 1).resize((20_000, 1))  # would be 5 million pixels wide, 4 GB
    crop = centre_crop(strip, 256)
    assert crop.shape == (256, 256, 3) and np.ptp(crop[..., 0]) <= 2


def test_random_crops_follow_the_published_augmentation() -> None:
    """On a ramp, the slope tells the side, the middle tells the place, and the sign tells the mirroring."""
    width, height, resolution = 240, 120, 30
    image, rng = ramp(width, height), np.random.default_rng(0)
    crops = np.stack([random_crop(image, resolution, rng) for _ in range(600)]).astype(float)
    inner = crops[:, 5:-5, 5:-5]  # away from Lanczos at the border
    across = (inner[:, :, -1, 0] - inner[:, :, 0, 0]).mean(axis=1) / 19 * resolution
    down = (inner[:, -1, :, 1] - inner[:, 0, :, 1]).mean(axis=1) / 19 * resolution
    sides, mirrored = np.abs(across), across < 0
    assert np.abs(sides - down).max() < 2.5  # square, never upside down
    assert 58.5 < sides.min() < 63 and 117 < sides.max() < 121.5
    assert abs(sides.mean() - 90) < 3 and abs(mirrored.mean() - 0.5) < 0.07
    left = inner[:, :, :, 0].mean(axis=(1, 2)) + 0.5 - sides / 2
    room = width - sides
    assert left.min() > -2 and (left - room).max() < 2
    assert abs((left / room).mean() - 0.5) < 0.05 and (left / room).std() == pytest.approx(12**-0.5, abs=0.03)


def test_the_crop_of_a_generator_is_reproducible() -> None:
    one, same, other = (random_crop(ramp(50, 70), 16, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_the_default_crop_is_that_of_the_published_draws() -> None:
    image = ramp(50, 70)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        side = 50 * rng.uniform(0.5, 1.0)
        left, top = rng.uniform(0, 50 - side), rng.uniform(0, 70 - side)
        box = (left, top, min(left + side, 50), min(top + side, 70))
        expected = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS, box=box))
        expected = expected[:, ::-1] if rng.random() < 0.5 else expected
        assert np.array_equal(random_crop(image, 16, np.random.default_rng(seed)), expected)


def test_crops_keep_to_their_limits() -> None:
    image, rng = ramp(240, 120), np.random.default_rng(0)
    crops = CropConfig(side=(0.25, 0.4), flip=0.9)
    cut = np.stack([random_crop(image, 30, rng, crops) for _ in range(300)]).astype(float)
    across = (cut[:, 5:-5, -6, 0] - cut[:, 5:-5, 5, 0]).mean(axis=1) / 19 * 30
    assert 29 < np.abs(across).min() < 32 and 46 < np.abs(across).max() < 49
    assert abs((across < 0).mean() - 0.9) < 0.06
    (whole,) = {random_crop(ramp(40, 40), 20, rng, CropConfig(side=(1, 1), flip=0)).tobytes() for _ in "abc"}
    assert whole == np.asarray(ramp(40, 40).resize((20, 20), Image.Resampling.LANCZOS)).tobytes()


@pytest.mark.parametrize(("width", "height"), [(40, 20), (100, 83), (211, 160), (15, 60), (333, 81)])
def test_centre_crop_is_that_of_adm(width: int, height: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    resolution, small = 20, image
    for factor in (2, 4, 8):
        if min(width, height) >= resolution * factor:
            small = small.resize((small.width // 2, small.height // 2), Image.Resampling.BOX)
    scale = resolution / min(small.size)
    resized = small.resize(
        (round(small.width * scale), round(small.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - resolution) // 2, (resized.height - resolution) // 2
    expected = np.asarray(resized)[top : top + resolution, left : left + resolution]
    assert np.array_equal(centre_crop(image, resolution), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": (0.0, 1.0)}, r"crops.side is \(0.0, 1.0\); needed are a smallest and a largest share"),
        ({"side": (0.5, 1.1)}, "crops.side is"),
        ({"side": (0.9, 0.8)}, "crops.side is"),
        ({"side": (0.9,)}, r"crops.side is \[0.9\]; needed is a list of 2"),
        ({"flip": -0.1}, "crops.flip is -0.1; it is a probability, from 0 to 1"),
        ({"flip": 1.5}, "crops.flip is 1.5"),
    ],
)
def test_limits_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropConfig(**change)  # type: ignore[arg-type]
