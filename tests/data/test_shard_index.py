"""A tar shard: which samples and labels it holds, what damage costs, and how long its index is kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.shards import contents, jpeg, labelled, names, overwrite, reasons, write_imagenet, write_tar
from vfmvae.data import shard_index, webdataset
from vfmvae.data.samples import NO_LABEL, Fault
from vfmvae.data.shard_index import index_places
from vfmvae.data.webdataset import is_shards, open_shards


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    return write_imagenet(tmp_path / "imagenet")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_other_letters(tmp_path: Path, format: int) -> None:
    long = "/".join(["folder" * 9] * (2 if format == tarfile.USTAR_FORMAT else 8))
    files = [(f"{long}/bär.JPG", jpeg(1)), (f"{long}/bär.cls", b" 3\n"), ("./plain.jpeg", jpeg(2))]
    write_tar(tmp_path / "a.tar", files, format)
    samples = open_shards(str(tmp_path), "all")
    assert contents(samples) == {f"a/{long}/bär": (jpeg(1), 3), "a/plain": (jpeg(2), NO_LABEL)}


def test_names_that_are_not_utf8_become_text_that_is(tmp_path: Path) -> None:
    places = write_tar(tmp_path / "a.tar", [("b\xe4r.jpg", jpeg(1)), ("c.jpg", jpeg(2))])
    block = bytearray((tmp_path / "a.tar").read_bytes()[:512])
    block[:8] = b"b\xe4r.jpg\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    overwrite(tmp_path / "a.tar", places["b\xe4r.jpg"], bytes(block))
    assert open_shards(str(tmp_path), "all").keys() == ["a/b\\xe4r", "a/c"]


def test_members_of_a_sample_may_be_apart_and_of_many_kinds(tmp_path: Path) -> None:
    files = [
        ("1.cls", b"1"),
        ("2.png", b"png"),
        ("3.webp", b"webp"),
        ("2.jpg", b"jpg"),
        ("2.seg.png", b"mask"),
        ("3.json", json.dumps({"label": 7}).encode()),
        ("1.tiff", b"tiff"),
        ("2.json", json.dumps({"label": 9}).encode()),
        ("2.cls", b"2"),
        ("._1.jpg", b"of a Mac"),
        ("README", b"no extension"),
    ]
    write_tar(tmp_path / "a.tar", files)
    samples = open_shards(str(tmp_path), "all")
    assert contents(samples) == {"a/2": (b"jpg", 2), "a/3": (b"webp", 7), "a/1": (b"tiff", 1)}
    assert samples.classes == tuple("01234567") and samples.faults() == []


def test_labels_that_are_missing_negative_or_no_integers(tmp_path: Path) -> None:
    records = {"d": b'{"label": "dog"}', "e": b"[1]", "f": b'{"caption": "x"}', "g": b'{"label": true}'}
    files = [(f"{n}.jpg", b"x") for n in "abcdefghi"]
    files += [("a.cls", b"2"), ("b.cls", b"-5"), ("h.cls", b"cat"), ("i.json", b'{"lab')]
    write_tar(tmp_path / "a.tar", files + [(f"{n}.json", text) for n, text in records.items()])
    samples = open_shards(str(tmp_path), "all")
    assert [samples.label(n) for n in range(9)] == [2] + 8 * [NO_LABEL]
    assert samples.classes == ("0", "1", "2")
    assert samples.faults() == [
        Fault("a.tar", "4 samples, the first d, are with a label that is no integer up to 999999", False)
    ]


def test_a_set_without_any_label_has_one_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.jpg", b"y"), ("2.cls", b"-1")])
    samples = open_shards(str(tmp_path), "all")
    assert samples.classes == ("",) and [samples.label(0), samples.label(1)] == [0, 0]


# Damage


def test_a_damaged_header_costs_its_member(tmp_path: Path) -> None:
    shard = tmp_path / "train-0.tar"
    places = write_tar(shard, labelled(range(6)))
    overwrite(shard, places["0003.jpg"] + 100, b"\xff" * 40)
    samples = open_shards(str(tmp_path), "all")
    assert names(samples) == ["0000", "0001", "0002", "0004", "0005"]
    assert all(samples.read(n) == jpeg(int(name)) for n, name in enumerate(names(samples)))
    skipped = places["0003.cls"] - places["0003.jpg"]
    assert samples.faults() == [
        Fault(
            "train-0.tar",
            f"has no valid header at byte {places['0003.jpg']}; reading went on {skipped} bytes later",
        ),
        Fault("train-0.tar", "sample 0003 is without an image after the first dot of the name"),
    ]


def test_zeros_in_the_middle_are_not_the_end(tmp_path: Path) -> None:
    places = write_tar(tmp_path / "a.tar", labelled(range(6)))
    overwrite(tmp_path / "a.tar", places["0002.jpg"], bytes(places["0004.jpg"] - places["0002.jpg"]))
    samples = open_shards(str(tmp_path), "all")
    assert names(samples) == ["0000", "0001", "0004", "0005"]
    assert f"no valid header at byte {places['0002.jpg']}" in reasons(samples)


@pytest.mark.parametrize("piece", [64, 512, 4 * 2**20])
def test_missing_bytes_shift_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(shard_index, "SEARCHED_AT_ONCE", piece)
    places = write_tar(tmp_path / "a.tar", labelled(range(5)))
    whole, cut = (tmp_path / "a.tar").read_bytes(), places["0001.jpg"] + 600
    (tmp_path / "a.tar").write_bytes(whole[:cut] + whole[cut + 77 :])
    samples = open_shards(str(tmp_path), "all")
    assert names(samples) == ["0000", "0001", "0002", "0003", "0004"]
    assert [samples.read(n) for n in (0, 2, 3, 4)] == [jpeg(n) for n in (0, 2, 3, 4)]
    assert f"no valid header at byte {places['0001.cls']}; reading went on" in reasons(samples)


def test_a_damaged_first_header(tmp_path: Path) -> None:
    places = write_tar(tmp_path / "a.tar", labelled(range(3)))
    overwrite(tmp_path / "a.tar", 0, b"\xff" * 512)
    samples = open_shards(str(tmp_path), "all")
    assert names(samples) == ["0001", "0002"] and places["0000.cls"] > 0
    assert "a.tar has no valid header at byte 0" in reasons(samples)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_header_behind_a_long_name(tmp_path: Path, format: int) -> None:
    long = "x" * 150
    files = [("1.jpg", jpeg(1)), (f"{long}.jpg", jpeg(2)), ("3.jpg", jpeg(3)), ("4.jpg", jpeg(4))]
    places = write_tar(tmp_path / "a.tar", files, format)
    overwrite(tmp_path / "a.tar", places[f"{long}.jpg"] + 1024 + 148, b"99999999")
    samples = open_shards(str(tmp_path), "all")
    assert names(samples) == ["1", "3", "4"] and [samples.read(n) for n in (1, 2)] == [jpeg(3), jpeg(4)]
    assert f"no valid header at byte {places[f'{long}.jpg']}" in reasons(samples)


def test_a_member_that_is_cut_short_is_left_out(tmp_path: Path) -> None:
    places = write_tar(tmp_path / "a.tar", labelled(range(3)))
    end = places["0002.jpg"] + 600
    os.truncate(tmp_path / "a.tar", end)
    samples = open_shards(str(tmp_path), "all")
    assert names(samples) == ["0000", "0001"]
    assert samples.faults() == [Fault("a.tar", f"is cut short at byte {end}, within 0002.jpg")]


def test_an_archive_that_ends_between_members(tmp_path: Path) -> None:
    for cut in (0, 100):
        places = write_tar(tmp_path / "a.tar", labelled(range(3)))
        os.truncate(tmp_path / "a.tar", places["0002.jpg"] + cut)
        samples = open_shards(str(tmp_path), "all")
        assert names(samples) == ["0000", "0001"]
        assert reasons(samples) == "a.tar ends without the zeros that end an archive; it may be cut short"


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>" * 100, "is no tar"),
        (
            b"\x1f\x8b" + bytes(5000),
            "is compressed with gzip, and random access needs a plain tar: unpack it",
        ),
        (None, "holds no images: looked for .jpg, .jpeg"),
    ],
)
def test_shards_without_images_are_told_and_left_out(
    tmp_path: Path, contents: bytes | None, reason: str
) -> None:
    if contents is None:
        write_tar(tmp_path / "bad.tar", [("1.txt", b"words"), ("1.v2.jpg", b"two dots")])
    else:
        (tmp_path / "bad.tar").write_bytes(contents)
    with pytest.raises(ValueError, match=f"no image is left in .*: bad.tar {reason}"):
        open_shards(str(tmp_path), "all")
    write_tar(tmp_path / "good.tar", [("1.jpg", b"x")])
    samples = open_shards(str(tmp_path), "all")
    assert samples.keys() == ["good/1"]
    assert samples.faults()[0].key == "bad.tar" and samples.faults()[0].reason.startswith(reason)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(__file__, "1.jpg")
    with pytest.raises(ValueError, match=r"a.tar.gz is compressed with gzip, and random access needs"):
        open_shards(str(tmp_path / "a.tar.gz"), "train")
    assert is_shards(str(tmp_path))


def test_a_name_that_comes_twice_is_a_fault(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.jpg", b"y"), ("1.JPG", b"z"), ("1.cls", b"0")])
    samples = open_shards(str(tmp_path), "all")
    assert contents(samples) == {"a/1": (b"x", 0), "a/2": (b"y", NO_LABEL)}
    assert samples.faults() == [Fault("a.tar", "sample 1 is there twice; the first is used")]


# Indexes


def test_an_index_is_made_once_and_as_long_as_the_shard_stays(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    first = contents(open_shards(str(imagenet), "all", lambda *progress: told.append(progress)))
    assert told == [(n, 5) for n in range(1, 6)]
    assert len(list(imagenet.glob("*.tar.index.npz"))) == 5 == len(list(imagenet.iterdir())) - 5

    built: list[str] = []
    real = webdataset.build_index
    monkeypatch.setattr(webdataset, "build_index", lambda path: built.append(path.name) or real(path))
    again = open_shards(str(imagenet), "all", lambda *progress: pytest.fail("nothing is left to do"))
    assert contents(again) == first and built == []
    shard = imagenet / "imagenet1k-train-0001.tar"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert contents(open_shards(str(imagenet), "all")) == first and built == [shard.name]
    changed = shard.stat().st_mtime_ns
    write_tar(shard, labelled([7]))
    os.utime(shard, ns=(0, changed))
    assert len(open_shards(str(imagenet), "train")) == 41 and built == 2 * [shard.name]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY", b"\x80\x04\x95pickle"])
def test_a_damaged_index_is_made_again(imagenet: Path, damage: bytes) -> None:
    first = contents(open_shards(str(imagenet), "train"))
    index = imagenet / "imagenet1k-train-0000.tar.index.npz"
    whole = index.read_bytes()
    method = whole.index(b"PK\x01\x02") + 10  # of compression, one that is not known
    unknown = whole[:method] + b"\x63" + whole[method + 1 :]
    for wrong in (damage, whole[: len(whole) // 2], whole[:-200], unknown):
        index.write_bytes(wrong)
        assert contents(open_shards(str(imagenet), "train")) == first
        with np.load(index, allow_pickle=False) as stored:
            assert stored["numbers"].shape == (4, 20)


def test_faults_are_kept_with_an_index(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.jpg", b"y")])
    assert open_shards(str(tmp_path), "all").faults() == open_shards(str(tmp_path), "all").faults() != []


def test_folders_that_cannot_be_written(imagenet: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in imagenet.glob("*.tar"):
        index_places(shard)[0].mkdir()  # in the way of the index, also of a user who may write anywhere
    first = contents(open_shards(str(imagenet), "all"))
    assert len(list((cache / "vfmvae" / "shards").glob("*.npz"))) == 5
    monkeypatch.setattr(webdataset, "build_index", lambda path: pytest.fail(f"{path} is indexed again"))
    assert contents(open_shards(str(imagenet), "all")) == first


def test_no_place_for_an_index_at_all(
    imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for shard in imagenet.glob("*.tar"):
        index_places(shard)[0].mkdir()
    assert len(open_shards(str(imagenet), "all")) == 70


def open_all(where: str) -> dict[str, tuple[bytes, int]]:
    return contents(open_shards(where, "all"))


def test_processes_may_index_at_once(imagenet: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(open_all, [str(imagenet)] * 8, chunksize=1)
    assert all(result == results[0] and len(result) == 70 for result in results)
    assert sorted(p.name for p in imagenet.iterdir() if not p.name.endswith(".tar")) == [
        f"{p.name}.index.npz" for p in sorted(imagenet.glob("*.tar"))
    ]
