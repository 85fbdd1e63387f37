"""DALI's batches are Pillow's: the same samples and windows, on a CPU the same pictures but for rounding."""

from __future__ import annotations

import io
import multiprocessing
import struct
import warnings
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from vfmvae.data import ImageLoader, Images, Photographs, Request, choose_backend, load_batches, open_data
from vfmvae.data.transforms import CropConfig

pytest.importorskip("nvidia.dali")
CPU = torch.device("cpu")
LEVELS = 2.0  # of 255, on average: what is asked for; a quarter of it is allowed below


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Photographs of several sizes, in several kinds of JPEG, and as PNG."""
    pictures = [
        Image.fromarray(picture()) for picture in (data.astronaut, data.coffee, data.chelsea, data.rocket)
    ]
    options: list[dict[str, object]] = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}]
    for number, picture in enumerate(pictures):
        for kind, option in enumerate(options):
            picture.save(tmp_path / f"{number}{kind}.jpg", quality=90, **option)
        picture.convert("L").save(tmp_path / f"{number}_grey.jpg", quality=90)
        picture.convert("CMYK").save(tmp_path / f"{number}_cmyk.jpg", quality=90)
        picture.resize((90, 70)).save(tmp_path / f"{number}_small.png")
    return tmp_path


@pytest.mark.parametrize(
    "crops", [CropConfig(), CropConfig(side=(1.0, 1.0), flip=1.0)], ids=["published", "whole"]
)
@pytest.mark.parametrize("resolution", [64, 256])
def test_the_same_crop_is_the_same_picture(photographs: Path, resolution: int, crops: CropConfig) -> None:
    source = open_data(str(photographs), "train", resolution, seed=1)
    pair = (ImageLoader(source, 4, backend=backend, crops=crops) for backend in ("torch", "dali"))
    for pillow, ours in islice(zip(*pair, strict=True), len(source) // 4):
        assert ours["key"] == pillow["key"] and ours["number"] == pillow["number"]
        assert torch.equal(ours["label"], pillow["label"])
        image = ours["image"]
        assert image.dtype == torch.uint8 and image.shape == (4, 3, resolution, resolution)
        assert image.is_contiguous(memory_format=torch.channels_last)
        differences = (image.int() - pillow["image"].int()).abs().float().mean(dim=(1, 2, 3))
        assert differences.max() < LEVELS / 4, dict(zip(ours["key"], differences.tolist(), strict=True))


def test_an_orientation_that_pillow_cannot_read_turns_nothing(tmp_path: Path) -> None:
    """Of a type that does not exist; DALI by itself would read a quarter turn."""
    tag = struct.pack("<HHHIHHI", 1, 0x0112, 99, 1, 6, 0, 0)
    for number in range(4):
        square = Image.fromarray(data.coffee()[:300, number : 300 + number])
        square.save(tmp_path / f"{number}.jpg", exif=b"Exif\0\0II*\0" + struct.pack("<I", 8) + tag)
    source = open_data(str(tmp_path), "train", 64)
    pillow, ours = (next(iter(ImageLoader(source, 3, backend=backend))) for backend in ("torch", "dali"))
    differences = (ours["image"].int() - pillow["image"].int()).abs().float().mean(dim=(1, 2, 3))
    assert differences.max() < LEVELS / 4


def test_workers_and_resuming_change_nothing(photographs: Path) -> None:
    source = open_data(str(photographs), "train", 48)
    alone = list(islice(ImageLoader(source, 3, backend="dali"), 6))
    loader = ImageLoader(source, 3, backend="dali", workers=2)
    loader.load_state_dict({"seen_images": 9})
    for expected, found in zip(alone[3:], loader, strict=False):
        assert found["key"] == expected["key"] and torch.equal(found["image"], expected["image"])


def test_every_batch_is_cut_as_it_was_asked_down_to_the_last(photographs: Path) -> None:
    source = open_data(str(photographs), "train", 32)
    asked = [Request(7), Request(7, CropConfig(side=(1.0, 1.0))), Request(0)]
    found = list(load_batches(source, 2, asked, 0, CPU, "dali"))
    assert len(found) == 3 and found[0]["key"] == found[1]["key"] != found[2]["key"]
    for (number, crops), batch in zip(asked, found, strict=True):
        expected = source.batch(number, 2, crops)["image"]
        assert (batch["image"].int() - expected.int()).abs().float().mean() < LEVELS / 4
    assert list(load_batches(source, 2, [], 0, CPU, "dali")) == []


def batches(source: Images, backend: str, count: int) -> list[tuple[list[str], list[str], torch.Tensor]]:
    loader = ImageLoader(source, 2, backend=backend)  # type: ignore[arg-type]
    return [
        (batch["key"], [fault.key for fault in batch["faults"]], batch["image"])
        for batch in islice(loader, count)
    ]


def test_broken_files_are_reported_and_replaced_as_by_pillow(photographs: Path) -> None:
    source = open_data(str(photographs), "train", 64)
    assert isinstance(source, Images)
    broken = [source.samples.key(number) for number in (0, 5, 9)]
    for key, contents in zip(broken, (b"", b"\xff\xd8 no photograph \xff\xd9", None), strict=True):
        file = photographs / key
        file.write_bytes(file.read_bytes()[:3000] if contents is None else contents)
    count = len(source) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = batches(source, "dali", count), batches(source, "torch", count)
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    assert sorted({key for _, faults, _ in found for key in faults}) == sorted(broken)
    assert not {key for keys, _, _ in found for key in keys} & set(broken)
    for (_, _, ours), (_, _, pillow) in zip(found, expected, strict=True):
        assert (ours.int() - pillow.int()).abs().float().mean() < LEVELS / 4


def test_a_batch_that_dali_refuses_is_read_by_pillow(tmp_path: Path) -> None:
    for number in range(12):
        Image.fromarray(data.coffee()[: 300 + number]).save(tmp_path / f"{number:02}.jpg")
    source = open_data(str(tmp_path), "train", 64)
    assert isinstance(source, Images)
    # Zeros between the first two segments: libjpeg steps over them, nvImageCodec's parser does not.
    file = tmp_path / source.batch(1, 2)["key"][0]
    contents = file.read_bytes()
    file.write_bytes(contents[:20] + bytes(10) + contents[20:])
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(io.BytesIO(contents))))
    with pytest.warns(UserWarning, match="DALI could not decode a batch that Pillow can: [^\n]+$"):
        found = batches(source, "dali", 4)
    expected = batches(source, "torch", 4)
    assert torch.equal(found[1][2], expected[1][2]), "by Pillow"
    for ours, pillow in zip(found, expected, strict=True):
        assert ours[0] == pillow[0] and (ours[2].int() - pillow[2].int()).abs().float().mean() < LEVELS / 4


def test_the_choice_says_why(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = (open_data(str(photographs), split, 32) for split in ("train", "validation"))
    assert choose_backend(train, "auto", CPU) == "dali" and choose_backend(train, "torch", CPU) == "torch"
    assert (
        choose_backend(held_out, "auto", CPU)
        == choose_backend(Photographs("train", 32), "auto", CPU)
        == "torch"
    )
    with pytest.raises(ValueError, match="dali cannot be used: embedded photographs and drawn images"):
        choose_backend(Photographs("train", 32), "dali", CPU)
    with pytest.raises(ValueError, match="ADM"):
        choose_backend(held_out, "dali", CPU)
    with pytest.raises(ValueError, match="device meta"):
        choose_backend(train, "dali", torch.device("meta"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend(train, "auto", CPU) == "torch"
    with pytest.raises(ValueError, match=r'not installed: pip install "vfmvae\[dali\]"'):
        choose_backend(train, "dali", CPU)


def test_closing_early_ends_the_workers(photographs: Path) -> None:
    before = multiprocessing.active_children()
    source = open_data(str(photographs), "train", 32)
    with closing(load_batches(source, 2, map(Request, range(99)), 2, CPU, "dali")) as loaded:
        next(loaded)
        assert len(multiprocessing.active_children()) == 2 + len(before)
    assert multiprocessing.active_children() == before
