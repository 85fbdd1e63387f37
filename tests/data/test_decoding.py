"""What stored bytes show: kinds of files, and how broken ones are told."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from vfmvae.data.decoding import as_plain, decode
from vfmvae.data.samples import Fault, SampleError


def noise(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth picture: JPEG changes it little."""
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def stored(image: Image.Image, kind: str = "jpeg", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_plain_photographs_are_handed_on_as_they_are(mode: str, options: dict[str, object]) -> None:
    data = stored(noise().convert(mode), quality=90, **options)
    assert as_plain(data, "a") == (data, 40, 30)
    assert as_plain(data + bytes(7), "a").data == data + bytes(7), "zeros after the end do no harm"


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(noise(), exif=exif, quality=95)


def animated() -> bytes:
    frames = [noise(), Image.new("RGB", (40, 30))]
    return stored(frames[0], "webp", save_all=True, append_images=frames[1:], lossless=True)


SPECIAL = {
    "CMYK": (stored(noise().convert("CMYK"), quality=95), 12.0),
    "palette": (stored(noise().quantize(200), "png"), 12.0),
    "16 bits": (
        stored(Image.fromarray(np.asarray(noise().convert("L")).astype(np.uint16) * 257), "png"),
        0.5,
    ),
    "transparent": (stored(noise().convert("RGBA"), "png"), 0.0),
    "animated": (animated(), 0.0),
    "bytes after the end": (stored(noise(), quality=95) + b"appended", 3.0),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_other_kinds_become_pixels_that_every_decoder_reads(kind: str) -> None:
    data, difference = SPECIAL[kind]
    plain = as_plain(data, kind)
    assert plain.data.startswith(b"P6 40 30 255\n")
    with Image.open(io.BytesIO(plain.data)) as opened:
        shown = np.asarray(opened)
    assert np.array_equal(shown, np.asarray(decode(data, kind)))
    expected = noise().convert("L").convert("RGB") if kind == "16 bits" else noise()
    assert np.abs(shown.astype(float) - np.asarray(expected)).mean() <= difference


def test_a_turned_photograph_is_upright() -> None:
    plain = as_plain(turned(), "turned")
    assert plain[1:] == (30, 40)
    shown = np.asarray(decode(turned(), "turned")).astype(float)
    assert np.abs(shown - np.rot90(np.asarray(noise()), k=-1)).mean() < 3


whole = stored(noise(200, 150), quality=95)


def hollow_png() -> bytes:
    """As long as it should be, and its second half zeros."""
    data = stored(noise(200, 150), "png")
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def eight_bits_in_sixteen() -> bytes:
    return stored(Image.fromarray(np.asarray(noise().convert("L")).astype(np.uint16)), "png")


BROKEN = {
    "hollow png": (hollow_png(), "."),
    "8 bits in 16": (eight_bits_in_sixteen(), "of 65535 would be black"),
    "empty": (b"", "the file is empty"),
    "half": (whole[: len(whole) // 2], "truncated"),
    "without its end": (whole[:-20], "truncated"),
    "header only": (whole[:300], "."),
    "html": (b"<html>not found</html>", "not an image that can be read"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(20), "."),
    "markers only": (b"\xff\xd8\xff\xd9", "not an image that can be read"),
    "float": (stored(Image.new("F", (2, 2)), "tiff"), "mode 'F'"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("read", [decode, as_plain])
def test_broken_files_are_named_with_a_reason(kind: str, read: object) -> None:
    data, reason = BROKEN[kind]
    with pytest.raises(
        SampleError, match=rf"^cannot read image some/key: [^\n]*{reason}[^\n]*; repair"
    ) as raised:
        read(data, "some/key")  # type: ignore[operator]
    assert raised.value.fault.key == "some/key"
    assert pickle.loads(pickle.dumps(raised.value)).fault == raised.value.fault
    assert "0x" not in raised.value.fault.reason


def test_a_fault_is_its_key_and_reason() -> None:
    assert SampleError("a", "b").fault == Fault("a", "b")
