"""Encoded bytes -> an RGB image, or plain JPEG bytes and their size for decoders that take nothing else."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vfmvae.atomic import reason
from vfmvae.data.samples import NOT_THE_SAMPLE, SampleError
from vfmvae.data.transforms import as_rgb, orientation

PNG = b"\x89PNG"
# Beyond 89 megapixels Pillow warns, and reads all the same; beyond 179 it refuses. A filter for the process,
# since setting one around every call is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Plain(NamedTuple):
    """An image that every decoder shows alike: a JPEG in colour or grey and upright, or pixels as PPM."""

    data: bytes
    width: int
    height: int


def decode(data: bytes, key: str) -> Image.Image:
    """An upright RGB image of 8 bits, the first of an animated file; SampleError where there is none.

    See `as_rgb` for grey, palette, CMYK, 16-bit and transparent ones.
    """
    if not data:
        raise SampleError(key, "the file is empty")
    try:
        if data.startswith(PNG):
            with Image.open(io.BytesIO(data)) as opened:
                opened.verify()  # its checksums, which decoding does not look at
        with Image.open(io.BytesIO(data)) as opened:
            return as_rgb(opened)
    except Exception as error:  # of damaged files Pillow raises nearly every kind
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in NOT_THE_SAMPLE:
            raise
        raise SampleError(key, _short(error)) from None


def as_plain(data: bytes, key: str) -> Plain:
    """The bytes as they are where they are a whole plain JPEG; everything else is decoded and stored as PPM.

    Only the header is read of a JPEG. One that does not end as it should may be cut short, which decoders
    fill with grey in silence: it is decoded here, where it is noticed. SampleError as by `decode`.
    """
    if data.startswith(b"\xff\xd8") and data.rstrip(b"\0").endswith(b"\xff\xd9"):
        try:
            with Image.open(io.BytesIO(data)) as opened:
                if opened.format == "JPEG" and opened.mode in ("RGB", "L") and orientation(opened) == 1:
                    return Plain(data, *opened.size)
        except Exception:
            pass  # said by `decode`
    image = decode(data, key)
    header = f"P6 {image.width} {image.height} 255\n".encode()
    return Plain(header + image.tobytes(), *image.size)


def _short(error: Exception) -> str:
    """The error of Pillow without the memory address of a file that exists in memory only."""
    text = str(error) or type(error).__name__
    return "not an image that can be read" if "cannot identify image file" in text else text


def read_image(file: Path) -> Image.Image:
    """A file as an upright RGB image; SampleError names it where it is missing, damaged or no image."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise SampleError(str(file), reason(error)) from None
    return decode(data, str(file))
