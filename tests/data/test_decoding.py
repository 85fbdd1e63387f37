"""What stored bytes show: kinds of files, and how broken ones are told."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

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


def sixteen_bit_png(kind: int, values: np.ndarray) -> bytes:
    """Pillow writes none in colour. `values`: [H, W, channels] of PNG's colour type `kind`."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_colour_of_sixteen_bits(kind: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels))
    values[..., 3 if channels == 4 else 1] = 65535  # opaque, or one of the colours
    shown = np.asarray(decode(sixteen_bit_png(kind, values), "a"))
    colours = values[..., :3] if channels > 2 else values[..., :1].repeat(3, axis=2)
    assert np.array_equal(shown, colours >> 8)
    values[..., : 3 if channels > 2 else 1] &= 255
    with pytest.raises(SampleError, match="no value above 255 of 65535"):
        decode(sixteen_bit_png(kind, values), "a")
    if channels != 3:  # a drawing in black on nothing, which lies over white
        values[0, :, -1] = 0
        shown = np.asarray(decode(sixteen_bit_png(kind, values), "a"))
        assert (shown[0] == 255).all() and (shown[1:] == 0).all()


def test_damaged_exif_costs_no_sound_photograph() -> None:
    """Its maker is stored as a fraction, which Pillow cannot write."""
    tags = struct.pack("<HHHIIHHIHHI", 2, 271, 5, 1, 38, 274, 3, 1, 6, 0, 0) + struct.pack("<II", 72, 1)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags
    assert decode(stored(noise(), exif=exif), "a").size == as_plain(stored(noise(), exif=exif), "a")[1:]
    assert decode(stored(noise(), exif=exif), "a").size == (30, 40)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "bmp", "ppm"])
def test_damage_anywhere_is_the_files_and_not_the_programs(kind: str) -> None:
    """Pillow raises nearly every kind of error, AttributeError and TypeError among them."""
    rng = np.random.default_rng(0)
    image = noise().quantize(200) if kind == "tiff" else noise()
    exif = Image.Exif()
    exif[0x0112], exif[271], exif[282] = 6, "maker", 72.0
    data = np.frombuffer(stored(image, kind, **({} if kind in ("bmp", "ppm") else {"exif": exif})), np.uint8)
    for _ in range(300):
        damaged = data.copy()
        places = rng.integers(0, min(len(data), 400), rng.integers(1, 6))
        damaged[places] = rng.integers(0, 256, len(places))
        for read in (decode, as_plain):
            try:
                read(damaged.tobytes(), "a")
            except SampleError as error:
                assert error.fault.key == "a"


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
