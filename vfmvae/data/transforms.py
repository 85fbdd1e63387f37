"""Photographs as files hold them -> square uint8 crops.

Cropping and resampling happen on PIL images, before any tensor exists. The published VFM-VAE augmentation is
a random square of 0.5 to 1 times the short side, a Lanczos resize and a mirror image half of the time
(arXiv 2510.18457). Held-out and encoded images are cut as ADM does it. The way from uint8 to the model's
[-1, 1] is `vfmvae.images.to_unit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from vfmvae.serialization import check_fields

ORIENTATION = 0x0112  # of EXIF; 1 is upright
_Turn = Image.Transpose
TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright."""
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
COLOUR_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")


@dataclass(frozen=True)
class CropConfig:
    """What training sees of an image; the defaults are the published ones. Validation has no part in it."""

    side: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest side of the square, as shares of the image's short side. The embedded photographs
    have their own reading of it (vfmvae.data.photographs)."""
    flip: float = 0.5
    """How often the square is mirrored, left to right."""

    def __post_init__(self) -> None:
        check_fields(self, "crops")
        smallest, largest = self.side
        if not 0 < smallest <= largest <= 1:
            raise ValueError(
                f"crops.side is {self.side}; needed are a smallest and a largest share, above 0 and up to 1"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"crops.flip is {self.flip}; it is a probability, from 0 to 1")


PUBLISHED_CROPS = CropConfig()
CENTRE_CROP = "centre crop of ADM: box halvings, then bicubic"
"""What `centre_crop` does, as it is noted beside results."""
LONGEST = 8  # sides of an image, in short sides, that a centre crop looks at


def as_rgb(image: Image.Image) -> Image.Image:
    """Any photograph as 8-bit RGB, upright.

    The EXIF orientation is applied. Grey values are repeated, palettes are looked up, CMYK goes through
    Pillow's conversion, 16-bit grey is scaled to 8 bits (rounded; of colour Pillow keeps the upper 8),
    transparent pixels lie over white. Raises ValueError for modes whose range is not known (float, LAB,
    integers beyond 16 bits), for 16-bit values that would be black, and what Pillow raises for damage.
    """
    upper_bits = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()
    if upper_bits and image.mode not in SIXTEEN_BIT_MODES:
        _check_not_black(image)
    turn = TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "RGB":
        return image
    if image.mode in SIXTEEN_BIT_MODES:
        return _sixteen_bit_as_rgb(image)
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode not in COLOUR_MODES:
        raise ValueError(
            f"images of mode {image.mode!r} have no agreed range; convert them to 8-bit RGB first"
        )
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """That of its EXIF, 1 where it has none or cannot be read: the picture may be sound all the same."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # of damaged EXIF Pillow raises nearly every kind
        return 1


def _check_not_black(image: Image.Image) -> None:
    """Of a drawing in black, only the opacity differs."""
    bands = dict(zip(image.getbands(), np.array(image.getextrema()).reshape(-1, 2).tolist(), strict=True))
    lowest, _ = bands.pop("A", (255, 255))
    if lowest == 255 and all(most == 0 for _, most in bands.values()):
        raise ValueError("no value above 255 of 65535: it is black, or holds 8 bits, to be stored as 8 bits")


def _sixteen_bit_as_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"values {values.min()} to {values.max()} are beyond 16 bits; convert it to 8-bit RGB first"
        )
    if 0 < values.max() <= 255:
        raise ValueError(f"values up to {values.max()} of 65535 would be black: store these 8 bits as 8 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


class Window(NamedTuple):
    """A square of an image in pixels, not necessarily whole ones, and whether its crop is mirrored."""

    left: float
    top: float
    side: float
    mirrored: bool


def centre_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """The centre of an RGB image as ADM cuts it: uint8 [resolution, resolution, 3].

    Halved by box filters while the short side is at least twice the resolution, then resized to it with a
    bicubic filter, then cut (Dhariwal and Nichol, arXiv 2105.05233). What generation is measured on.
    """
    longest = LONGEST * min(image.size)
    if max(image.size) > longest:  # a strip would be resized in whole, to millions of pixels
        width, height = min(image.width, longest), min(image.height, longest)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def random_window(
    width: int, height: int, rng: np.random.Generator, crops: CropConfig = PUBLISHED_CROPS
) -> Window:
    """A random square inside of an image of this size.

    The side is uniform in its range, the place uniform among those inside the image.
    """
    side = min(width, height) * rng.uniform(*crops.side)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    return Window(left, top, side, bool(rng.random() < crops.flip))


def cut(image: Image.Image, window: Window, resolution: int) -> np.ndarray:
    """A square of an RGB image, Lanczos-resized and perhaps mirrored: uint8 [resolution, resolution, 3]."""
    left, top, side, mirrored = window
    box = (left, top, min(left + side, image.width), min(top + side, image.height))
    crop = np.asarray(image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))
    return crop[:, ::-1] if mirrored else crop


def random_crop(
    image: Image.Image, resolution: int, rng: np.random.Generator, crops: CropConfig = PUBLISHED_CROPS
) -> np.ndarray:
    """A random square of an RGB image, perhaps mirrored: uint8 [resolution, resolution, 3]."""
    return cut(image, random_window(image.width, image.height, rng, crops), resolution)
