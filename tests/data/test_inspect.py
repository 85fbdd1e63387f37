"""`vfmvae data inspect`: its numbers against what was written, its sheet against the images."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import vfmvae.data.__main__ as command
from tests.commands import files_unchanged, run, save_image
from vfmvae.data import inspection
from vfmvae.data.contact_sheet import CAPTION, COLUMNS, GAP, MOST_TILES, TILE, Tile, contact_sheet
from vfmvae.data.samples import NO_LABEL, Fault, SampleError


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image) -> bytes:
    """Stored on its side, as cameras do it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(image.transpose(Image.Transpose.ROTATE_90), "jpeg", exif=exif)


GREY = stored(picture(30, 40).convert("L"), "png")
FILES = {
    "train/cat/a grey.png": GREY,
    "train/cat/cmyk.jpg": stored(picture(300, 260).convert("CMYK"), "jpeg"),
    "train/cat/empty.jpg": b"",
    "train/cat/turned.jpg": turned(picture(200, 600)),
    "train/dog/again.png": GREY,
    "train/dog/cut.jpg": stored(picture(90, 90), "jpeg")[:-300],
    "train/dog/rgb.webp": stored(picture(500, 400), "webp"),
    "train/fox/[red].png": b"<html>not found</html>",
    "val/cat/palette.png": stored(picture(256, 255).quantize(8), "png"),
    "val/cat/sixteen.png": stored(Image.fromarray(np.full((300, 700), 999, np.uint16)), "png"),
}
WIDTHS = (30, 30, 200, 256, 300, 500, 700)
HEIGHTS = (40, 40, 255, 260, 300, 400, 600)
SHORT = (30, 30, 200, 255, 260, 300, 400)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Contact sheets go to the current folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, list[str]]:
    """The printed lines of each title, without it; those without one under ""."""
    assert run(command, "inspect", *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines: dict[str, list[str]] = {}
    for line in captured.out.splitlines():
        title, colon, rest = line.partition(": ")
        lines.setdefault(title if colon else "", []).append(rest if colon else line)
    return lines


def quantiles(name: str, sizes: tuple[int, ...]) -> str:
    """Of seven sizes, ordered: 5 % is the first, 95 % the last."""
    return f"{name}: min {sizes[0]}, 5 % {sizes[0]}, median {sizes[3]}, 95 % {sizes[6]}, max {sizes[6]}"


def test_every_number_is_that_of_the_files(
    photos: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with files_unchanged(photos):
        lines = inspected(capsys, photos)
    total = sum(map(len, FILES.values()))
    assert lines["images"] == [
        "train: 8",
        "validation: 2",
        "decoded: 7",
        "broken: 3",
        "copies of other images: 1",
        "short side below 256 px: 4",
        f"stored: {total / 1000:.1f} kB ({total:,} bytes)",
    ]
    assert lines["formats"] == ["PNG: 4", "JPEG: 2", "WEBP: 1"]
    assert Counter(lines["modes"]) == Counter(["L: 2", "RGB: 2", "CMYK: 1", "I;16: 1", "P: 1"])
    assert lines["pixels"] == [
        quantiles("width", WIDTHS),
        quantiles("height", HEIGHTS),
        quantiles("short side", SHORT),
    ]
    assert lines["3 classes"] == ["cat: 5", "dog: 2", "fox: 0"]
    assert lines["copies"] == ["train/dog/again.png: train/cat/a grey.png"]
    assert lines["broken"][0] == "train/cat/empty.jpg: the file is empty"
    assert lines["broken"][1].startswith("train/dog/cut.jpg: ") and "truncated" in lines["broken"][1]
    assert lines["broken"][2:] == ["train/fox/[red].png: not an image that can be read"]
    assert [file.name for file in elsewhere.iterdir()] == ["contact_sheet.png"]


def test_a_part_and_the_first_images(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspected(capsys, photos, "--part", "validation")
    assert lines["images"][:3] == ["validation: 2", "decoded: 2", "broken: 0"]
    assert lines["3 classes"] == ["cat: 2", "dog: 0", "fox: 0"] and "broken" not in lines
    lines = inspected(capsys, photos, "--part", "train", "--images", "3", "--threads", "2")
    assert lines["images"][:4] == ["train: 8", "looked at: the first 3 of 8", "decoded: 2", "broken: 1"]
    assert lines["formats"] == ["JPEG: 1", "PNG: 1"]
    everything = inspected(capsys, photos, "--images", "99")
    assert everything == inspected(capsys, photos, "--threads", "1")


def test_a_single_image_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_image(tmp_path / "one" / "photo.png", 300, 200)
    lines = inspected(capsys, tmp_path / "one")
    assert lines["images"][:3] == ["train: 0", "validation: 0", "decoded: 1"]
    assert not any("classes" in title for title in lines)


def test_many_classes_show_both_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in range(13):
        for number in range(label + 1):
            save_image(tmp_path / "d" / f"c{label:02}" / f"{number}.png", 4, 4, seed=100 * label + number)
    shown = inspected(capsys, tmp_path / "d")["13 classes"]
    most, fewest = (range(12, 7, -1), range(4, -1, -1))
    assert shown == [
        *(f"c{label:02}: {label + 1}" for label in most),
        "(3 classes between)",
        *(f"c{label:02}: {label + 1}" for label in fewest),
    ]


def test_all_that_is_broken_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "new" / "broken.jsonl"
    for number in range(25):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"{number:02}.jpg").write_bytes(b"")
    for _ in range(2):  # again: what is listed already is not listed twice
        lines = inspected(capsys, tmp_path / "d", "--quarantine", listed)
        faults = [f"{number:02}.jpg: the file is empty" for number in range(20)]
        assert lines["broken"] == [*faults, "(5 more): --quarantine FILE lists all"]
        assert lines["no image can be read"] == ["there is no contact sheet"]
        assert lines[str(listed)] == ["lists 25 that are broken"]
        assert "pixels" not in lines and "copies" not in lines
        assert [json.loads(line) for line in listed.read_text().splitlines()] == [
            {"key": f"{number:02}.jpg", "reason": "the file is empty"} for number in range(25)
        ]
    assert not Path("contact_sheet.png").exists()


class Memory:
    """Samples in memory, which count how often each is read."""

    def __init__(self, images: list[bytes], labels: list[int], faults: list[Fault] | None = None) -> None:
        self.classes = ("a", "b")
        self.images, self.labels, self._faults = images, labels, faults or []
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.images)

    def key(self, number: int) -> str:
        return f"shard/{number}"

    def label(self, number: int) -> int:
        return self.labels[number]

    def read(self, number: int) -> bytes:
        self.reads[number] += 1
        return self.images[number]

    def faults(self) -> list[Fault]:
        return self._faults


def test_damage_at_opening_and_missing_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage = [Fault("7.tar", "cut short"), Fault("8.tar", "no tar file")]
    samples = Memory([GREY, b"", GREY], [1, NO_LABEL, NO_LABEL], damage)
    with mock.patch.object(command, "open_samples", lambda path, part: samples):
        lines = inspected(capsys, "shards", "--quarantine", tmp_path / "broken.jsonl")
    assert "damage found at opening: 2" in lines["images"]
    assert "without label, left out of training: 1" in lines["images"], "a broken one is told as broken"
    assert lines["2 classes"] == ["b: 1", "a: 0"]
    assert lines["broken"] == ["7.tar: cut short", "8.tar: no tar file", "shard/1: the file is empty"]
    keys = [json.loads(line)["key"] for line in (tmp_path / "broken.jsonl").read_text().splitlines()]
    assert keys == ["7.tar", "8.tar", "shard/1"]


@pytest.mark.parametrize("threads", [1, 3])
def test_one_read_and_one_decode_and_not_far_ahead(threads: int) -> None:
    samples = Memory([GREY] * 40, [0] * 40)
    ahead: list[int] = []

    def on_seen(fault: Fault | None) -> None:
        assert fault is None
        ahead.append(sum(samples.reads.values()) - len(ahead))

    with mock.patch.object(inspection, "decode", wraps=inspection.decode) as decode:
        found = inspection.inspect(samples, 40, threads, on_seen)
    assert decode.call_count == 40 and samples.reads == Counter(range(40))
    assert len(ahead) == 40 and max(ahead) <= inspection.AHEAD * threads
    assert found.copies() == [inspection.Copy(number, 0) for number in range(1, 40)]


def test_a_fault_of_the_machine_ends_it() -> None:
    samples = Memory([GREY] * 4, [0] * 4)
    with (
        mock.patch.object(samples, "read", side_effect=OSError(24, "Too many open files")),
        pytest.raises(OSError, match="Too many open files"),
    ):
        inspection.inspect(samples, 4, 2, lambda fault: None)


def place(number: int, captions: bool) -> tuple[int, int]:
    row, column = divmod(number, COLUMNS)
    return GAP + column * (TILE + GAP), GAP + row * (TILE + GAP + (CAPTION if captions else 0))


def tile(sheet: np.ndarray, number: int, captions: bool = False) -> np.ndarray:
    left, top = place(number, captions)
    return sheet[top : top + TILE, left : left + TILE]


@pytest.mark.parametrize("threads", ["1", "5"])
def test_the_sheet_shows_the_first_whole_image_of_each_part(
    tmp_path: Path, threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = [save_image(tmp_path / "d" / f"{n:03}.png", 180, TILE, seed=n) for n in range(100)]
    broken = {0, 50, 23, 24}  # 23 and 24 are a part
    for number in broken:
        (tmp_path / "d" / f"{number:03}.png").write_bytes(b"broken")
    inspected(capsys, tmp_path / "d", "--output", tmp_path / "new" / "sheet.PNG", "--threads", threads)
    parts = [[n for n in range(100) if n * MOST_TILES // 100 == part] for part in range(MOST_TILES)]
    assert [23, 24] in parts
    expected = [min(set(part) - broken) for part in parts if set(part) - broken]
    assert len(expected) == MOST_TILES - 1 and expected[0] == 1
    with Image.open(tmp_path / "new" / "sheet.PNG") as opened:
        sheet = np.asarray(opened)
    assert sheet.shape == (6 * (TILE + GAP) + GAP, 8 * (TILE + GAP) + GAP, 3)
    for at, number in enumerate(expected):
        assert np.array_equal(tile(sheet, at), pixels[number][:, 26:154])
    assert (tile(sheet, MOST_TILES - 1) == 255).all()


def test_images_of_every_kind_on_the_sheet_and_their_classes(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(photos)
    upright = picture(TILE, 2 * TILE - 56)
    kinds = {
        "ant/turned.jpg": (turned(upright), np.asarray(upright)[36:164], 4.0),
        "bee/grey.png": (stored(upright.convert("L"), "png"), None, 0.0),
        "cow/cmyk.tif": (stored(upright.convert("CMYK"), "tiff"), np.asarray(upright)[36:164], 1.0),
    }
    grey = np.asarray(upright.convert("L"))[36:164, :, None].repeat(3, axis=2)
    for name, (data, _, _) in kinds.items():
        (photos / name).parent.mkdir(parents=True)
        (photos / name).write_bytes(data)
    inspected(capsys, photos)
    with Image.open("contact_sheet.png") as opened:
        sheet = np.asarray(opened).astype(int)
    assert sheet.shape == (TILE + 2 * GAP + CAPTION, 3 * (TILE + GAP) + GAP, 3)
    for number, (_, expected, difference) in enumerate(kinds.values()):
        shown = grey if expected is None else expected
        assert np.abs(tile(sheet, number, captions=True) - shown).mean() <= difference
        left, top = place(number, captions=True)
        assert (sheet[top + TILE : top + TILE + CAPTION, left : left + TILE] < 128).any(), "a caption"


@pytest.mark.parametrize("caption", ["a name that is much longer than\na tile is wide", "W" * 500, "ü 猫"])
def test_captions_stay_below_their_tile(caption: str) -> None:
    grey = np.full((TILE, TILE, 3), 100, np.uint8)
    sheet = np.asarray(contact_sheet([Tile(grey, caption), Tile(grey, "")]))
    below = sheet[GAP + TILE :]
    assert (below[:, GAP : GAP + TILE] < 128).any()
    assert (below[:, GAP + TILE :] == 255).all() and (below[-GAP // 2 :] == 255).all()
    assert (tile(sheet, 0, captions=True) == 100).all() and (tile(sheet, 1, captions=True) == 100).all()


def test_a_terminal_gets_tables_with_names_as_they_are(photos: Path) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, color_system=None)
    with mock.patch.object(command, "Console", lambda: console):
        assert run(command, "inspect", photos) == 0
    assert "│ train/fox/[red].png │ not an image that can be read" in file.getvalue()
    assert re.search(r"│ short side +│ +30 │ +30 │ +255 │ +400 │ +400 │", file.getvalue())


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["inspect", "missing"], 1, "image folder missing does not exist"),
        (["inspect", "empty"], 1, "no images for all in empty"),
        (["inspect", "photos", "--images", "0"], 2, "--images 0: it must be at least 1"),
        (["inspect", "photos", "--threads", "-1"], 2, "--threads -1: it must be at least 1"),
        (["inspect", "photos", "--output", "x.jpg"], 2, "--output x.jpg: the contact sheet is a PNG"),
        (["inspect", "photos", "--output", "photos/a/x.png"], 2, "--output photos/a/x.png would lie in"),
        (["inspect", "."], 2, "--output contact_sheet.png would lie in the data set"),
        (["inspect", "photos", "--quarantine", "photos/x"], 2, "--quarantine photos/x would lie in"),
        (["inspect", "photos", "--trheads", "2"], 2, "unknown option --trheads; did you mean --threads?"),
        (["look", "photos"], 2, "unknown command data 'look'; known: inspect"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    photos: Path,
    arguments: list[str],
    code: int,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    with files_unchanged(photos.parent):
        assert run(command, *arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {sentence}") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_file_that_vanishes_is_broken() -> None:
    samples = Memory([GREY] * 2, [0] * 2)
    gone = SampleError("shard/0", "No such file or directory")
    with mock.patch.object(samples, "read", side_effect=[gone, GREY]):
        found = inspection.inspect(samples, 2, 1, lambda fault: None)
    assert found.broken == [gone.fault] and found.decoded == 1 and found.bytes == len(GREY)
