"""Tar shards: which samples, which bytes, which labels and splits, what damage costs, and who may read them.

The truth is tarfile, which wrote the shards, and the package webdataset, which others read them with.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data.shards import jpeg, labelled, overwrite, write_tar
from vfmvae.data import webdataset
from vfmvae.data.samples import NO_LABEL, Fault, SampleError
from vfmvae.data.shard_files import expand_braces
from vfmvae.data.shard_index import index_places
from vfmvae.data.webdataset import ShardSamples, is_shards, open_shards


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Three training shards of 20 and two validation shards of 5 samples."""
    root = tmp_path / "imagenet"
    for shard in range(3):
        write_tar(root / f"imagenet1k-train-{shard:04}.tar", labelled(range(20 * shard, 20 * shard + 20)))
    for shard in range(2):
        numbers = range(100 + 5 * shard, 105 + 5 * shard)
        write_tar(root / f"imagenet1k-validation-{shard:02}.tar", labelled(numbers))
    return root


def contents(samples: ShardSamples) -> dict[str, tuple[bytes, int]]:
    keys = [samples.key(number) for number in range(len(samples))]
    assert len(set(keys)) == len(keys) and keys == samples.keys()
    return {key: (samples.read(n), samples.label(n)) for n, key in enumerate(keys)}


def names(samples: ShardSamples) -> list[str]:
    return [samples.key(number).rpartition("/")[2] for number in range(len(samples))]


def reasons(samples: ShardSamples) -> str:
    return "; ".join(f"{fault.key} {fault.reason}" for fault in samples.faults())


def test_the_public_layout_of_imagenet(imagenet: Path) -> None:
    train, validation, everything = (open_shards(str(imagenet), p) for p in ("train", "validation", "all"))
    expected = {f"imagenet1k-train-{n // 20:04}/{n:04}": (jpeg(n), n % 10) for n in range(60)}
    assert contents(train) == expected
    held = {f"imagenet1k-validation-{n // 5 - 20:02}/{n:04}": (jpeg(n), n % 10) for n in range(100, 110)}
    assert contents(validation) == held
    assert contents(everything) == expected | held
    assert train.classes == validation.classes == tuple("0123456789")
    assert train.faults() == []


def test_the_package_webdataset_reads_the_same(imagenet: Path) -> None:
    package = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(imagenet.glob("*.tar"))]
    samples = package.WebDataset(shards, shardshuffle=False, empty_check=False)
    expected = [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in samples]
    ours = open_shards(str(imagenet), "all")
    found = [(name, ours.read(n), ours.label(n)) for n, name in enumerate(names(ours))]
    assert found == expected and len(found) == 70


def test_the_package_webdataset_writes_what_is_read(tmp_path: Path) -> None:
    package = pytest.importorskip("webdataset")
    with package.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=4, verbose=0) as writer:
        for n in range(10):
            writer.write({"__key__": f"a/{n:03}", "jpg": jpeg(n), "json": {"label": n, "x": "y"}})
    samples = open_shards(str(tmp_path), "all")
    assert contents(samples) == {f"train-{n // 4:04}/a/{n:03}": (jpeg(n), n) for n in range(10)}


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
    files += [("a.cls", b"2"), ("b.cls", b"-1"), ("h.cls", b"cat"), ("i.json", b'{"lab')]
    write_tar(tmp_path / "a.tar", files + [(f"{n}.json", text) for n, text in records.items()])
    samples = open_shards(str(tmp_path), "all")
    assert [samples.label(n) for n in range(9)] == [2] + 8 * [NO_LABEL]
    assert samples.classes == ("0", "1", "2")
    assert samples.faults() == [
        Fault("a.tar", "2 samples, the first h, are with a label that is no integer up to 999999")
    ]


def test_a_set_without_any_label_has_one_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.jpg", b"y"), ("2.cls", b"-1")])
    samples = open_shards(str(tmp_path), "all")
    assert samples.classes == ("",) and [samples.label(0), samples.label(1)] == [0, 0]


def test_classes_are_those_of_both_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [("1.jpg", b"x"), ("1.cls", b"1")])
    write_tar(tmp_path / "val.tar", [("1.jpg", b"x"), ("1.cls", b"3")])
    assert open_shards(str(tmp_path), "train").classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("place", ["classes.txt", "classnames.txt", "train/classes.txt"])
def test_a_file_names_the_classes(tmp_path: Path, place: str) -> None:
    write_tar(tmp_path / "train" / "a.tar", [("1.jpg", b"x"), ("1.cls", b"1")])
    (tmp_path / place).write_text("tench, fish\ngoldfish\nwhite shark\n")
    samples = open_shards(str(tmp_path), "all")
    assert samples.classes == ("tench, fish", "goldfish", "white shark") and samples.label(0) == 1
    (tmp_path / place).write_text("tench\n")
    assert open_shards(str(tmp_path), "all").classes == ("0", "1")


@pytest.mark.parametrize(
    ("shards", "train", "validation"),
    [
        (["x-train-0", "x-val-0", "x-test-0"], ["x-train-0"], ["x-val-0"]),
        (["train/0", "valid/0"], ["train/0"], ["valid/0"]),
        (["train2017_0", "Validation.0"], ["train2017_0"], ["Validation.0"]),
        (["train-0", "test-0"], ["train-0"], ["test-0"]),
        (["0", "1", "val-0"], ["0", "1"], ["val-0"]),
        (["testament/train-0", "trainer/val-0"], ["testament/train-0"], ["trainer/val-0"]),
    ],
)
def test_words_of_the_names_tell_the_splits(
    tmp_path: Path, shards: list[str], train: list[str], validation: list[str]
) -> None:
    for shard in shards:
        write_tar(tmp_path / f"{shard}.tar", [("1.jpg", b"x")])
    for part, expected in (("train", train), ("validation", validation), ("all", train + validation)):
        keys = open_shards(str(tmp_path), part).keys()
        assert sorted(keys) == sorted(f"{shard}/1" for shard in expected)


@pytest.mark.parametrize("name", ["images-{}", "x-train-{}", "x-val-{}"])
def test_one_kind_of_shards_is_divided_by_a_hash(tmp_path: Path, name: str) -> None:
    for shard in range(4):
        write_tar(tmp_path / f"{name.format(shard)}.tar", [(f"{n}.jpg", b"x") for n in range(100)])
    train, validation, everything = (
        set(open_shards(str(tmp_path), part).keys()) for part in ("train", "validation", "all")
    )
    assert not train & validation and train | validation == everything and len(everything) == 400
    assert 8 <= len(validation) <= 36
    write_tar(tmp_path / f"{name.format('new')}.tar", [(f"{n}.jpg", b"x") for n in range(100)])
    grown = open_shards(str(tmp_path), "validation").keys()
    assert validation == {key for key in grown if "new" not in key}


def test_the_smallest_sets(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    assert len(open_shards(str(tmp_path), "all")) == len(open_shards(str(tmp_path), "train")) == 1
    with pytest.raises(ValueError, match="no image for validation in"):
        open_shards(str(tmp_path), "validation")
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.jpg", b"x")])
    assert len(open_shards(str(tmp_path), "train")) == len(open_shards(str(tmp_path), "validation")) == 1
    with pytest.raises(ValueError, match="unknown part 'test'; choose one of train, validation, all"):
        open_shards(str(tmp_path), "test")


def test_folders_files_globs_and_braces_give_the_same_keys(imagenet: Path) -> None:
    folder = open_shards(str(imagenet), "train").keys()
    for where in (
        f"{imagenet}/imagenet1k-train-{{0000..0002}}.tar",
        f"{imagenet}/imagenet1k-{{train-000[0-2],validation-0?}}.tar",
        f"{imagenet}/*.tar",
        f"{imagenet}/**/*.tar",
    ):
        assert is_shards(where)
        keys = open_shards(where, "all" if "train-{" in where else "train").keys()
        assert keys == folder, where
    single = f"{imagenet}/imagenet1k-train-0001.tar"
    assert is_shards(single) and open_shards(single, "all").keys() == folder[20:40]


def test_braces() -> None:
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{2..0}{x,}") == ["2x", "2", "1x", "1", "0x", "0"]
    assert set(expand_braces("{a,b{1,2}}")) == {"a", "b1", "b2"}
    assert expand_braces("no{thing}") == ["no{thing}"]


def test_what_is_shards(tmp_path: Path, imagenet: Path) -> None:
    assert is_shards(str(imagenet)) and is_shards(str(tmp_path))
    assert is_shards("https://x.org/a-{000..127}.tar?download=1") and is_shards("missing.tar")
    assert is_shards("a.tar.gz") and is_shards("a-???.tar")
    for other in (tmp_path / "empty", tmp_path / "photos" / "a"):
        other.mkdir(parents=True)
        assert not is_shards(str(other)) and not is_shards(str(other / "nothing"))
    (tmp_path / "photos" / "a" / "1.JPEG").write_bytes(b"")
    write_tar(tmp_path / "photos" / "originals.tar", [])
    assert not is_shards(str(tmp_path / "photos"))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("https://x.org/a.tar", "shards are read from files, not from https://x.org/a.tar; copy them here"),
        ("pipe:curl x", "shards are read from files, not from pipe:curl x"),
        ("{}/none.tar", r"shard .*/none.tar does not exist; give a .tar file, a folder or a pattern"),
        ("{}/a-{{0..3}}.tar", r"shard .*/a-1.tar, one of .*/a-\{0..3\}.tar, does not exist"),
        ("{}/b-*.tar", r"no file matches .*/b-\*.tar"),
        ("{}/folder", "no shards in .*/folder: looked for .tar files at any depth"),
    ],
)
def test_places_without_shards_are_named(tmp_path: Path, where: str, message: str) -> None:
    write_tar(tmp_path / "a-0.tar", [("1.jpg", b"x")])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        open_shards(where.format(tmp_path), "train")


def test_keys_of_nested_names_cannot_meet(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("b/1.jpg", b"x")])
    write_tar(tmp_path / "a" / "b.tar", [("2.jpg", b"x")])
    assert open_shards(str(tmp_path), "all").keys() == ["a/b/1", "a/b/2"]
    write_tar(tmp_path / "a" / "b.tar", [("1.jpg", b"x")])
    with pytest.raises(ValueError, match="shards a and a/b both hold a/b/1; rename one of them"):
        open_shards(str(tmp_path), "all")


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


def test_an_image_without_bytes(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b""), ("2.jpg", b"y")])
    samples = open_shards(str(tmp_path), "all")
    with pytest.raises(SampleError, match="cannot read image a/1: it has no bytes") as error:
        samples.read(0)
    assert error.value.fault == Fault("a/1", "it has no bytes") and samples.read(1) == b"y"


def test_shards_that_disappear_or_change(imagenet: Path) -> None:
    samples = open_shards(str(imagenet), "train")
    shard = imagenet / "imagenet1k-train-0001.tar"
    shutil.move(shard, imagenet / "elsewhere")
    with pytest.raises(SampleError, match="shard imagenet1k-train-0001.tar has disappeared"):
        samples.read(20)
    assert samples.read(0) == jpeg(0)
    write_tar(shard, labelled(range(3)))
    with pytest.raises(SampleError, match="shard imagenet1k-train-0001.tar has changed since"):
        samples.read(20)


def test_short_reads_are_not_taken_for_images(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_shards(str(imagenet), "train")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 100), offset))
    assert samples.read(3) == jpeg(3), "a call may give less than it is asked for"
    samples.read(0)  # the shard is open now
    os.truncate(imagenet / "imagenet1k-train-0000.tar", int(samples._offset[5]) + 10)
    with pytest.raises(SampleError, match=r"imagenet1k-train-0000.tar gives 10 of its \d+ bytes"):
        samples.read(5)


def test_errors_of_the_machine_are_not_those_of_a_sample(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = open_shards(str(imagenet), "train")

    def fails(number: int) -> Callable[..., bytes]:
        def pread(*_: int) -> bytes:
            raise OSError(number, os.strerror(number))

        return pread

    monkeypatch.setattr(os, "pread", fails(errno.EIO))
    with pytest.raises(SampleError, match="imagenet1k-train-0000.tar: Input/output error"):
        samples.read(0)
    monkeypatch.setattr(os, "pread", fails(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):
        samples.read(0)


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
    write_tar(shard, labelled([7]))
    assert len(open_shards(str(imagenet), "train")) == 41 and built == 2 * [shard.name]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY", b"\x80\x04\x95pickle"])
def test_a_damaged_index_is_made_again(imagenet: Path, damage: bytes) -> None:
    first = contents(open_shards(str(imagenet), "train"))
    index = imagenet / "imagenet1k-train-0000.tar.index.npz"
    whole = index.read_bytes()
    for wrong in (damage, whole[: len(whole) // 2], whole[:-200]):
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


# Readers


def test_threads_read_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "OPEN_SHARDS", 2)
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", [(f"{n}.jpg", f"{shard} {n}".encode()) for n in range(10)])
    samples = open_shards(str(tmp_path), "all")
    before = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).integers(0, 80, 3000).tolist()
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(samples.read, order))
    assert images == [f"{n // 10} {n % 10}".encode() for n in order]
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def read_first(samples: ShardSamples) -> tuple[str, bytes]:
    return samples.key(0), samples.read(0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_for_themselves(imagenet: Path, method: str) -> None:
    samples = open_shards(str(imagenet), "validation")
    samples.read(0)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_first, [samples] * 2) == [read_first(samples)] * 2


def test_a_fork_does_not_wait_for_a_lock_of_its_parent(imagenet: Path) -> None:
    samples = open_shards(str(imagenet), "validation")
    expected = samples.read(0)
    _, lock, _ = samples._files._state
    with lock:  # as another thread would hold it at that moment
        child = os.fork()
        if child == 0:
            os._exit(0 if samples.read(0) == expected else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_pickles_are_arrays_and_no_descriptors(imagenet: Path) -> None:
    samples = open_shards(str(imagenet), "train")
    samples.read(0)
    copy = pickle.loads(pickle.dumps(samples))
    assert contents(copy) == contents(samples) and copy.classes == samples.classes


def test_a_large_set_is_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 samples whose indexes are written by hand: no image lies in these shards."""
    for shard in range(40):
        write_tar(tmp_path / f"x-{shard:03}.tar", [("1.jpg", b"x")])
    size, index = (tmp_path / "x-000.tar").stat().st_size, np.arange(5000)
    text = "".join(f"{n:06}" for n in index).encode()
    for shard in range(40):
        file = tmp_path / f"x-{shard:03}.tar"
        np.savez(
            f"{file}.index.npz",
            stamp=np.array([1, size, file.stat().st_mtime_ns]),
            numbers=np.stack([index, index, index % 1000, 6 * (index + 1)]),
            names=np.frombuffer(text, np.uint8),
            faults=np.frombuffer(b"[]", np.uint8),
        )
    monkeypatch.setattr(webdataset, "build_index", lambda path: pytest.fail("the indexes are there"))
    everything, train, validation = (open_shards(str(tmp_path), p) for p in ("all", "train", "validation"))
    assert len(everything) == 200_000 == len(train) + len(validation) and len(everything.classes) == 1000
    assert abs(len(validation) - 10_000) < 500
    assert set(train.keys()).isdisjoint(validation.keys())
    assert everything.key(123_456) == "x-024/003456" and everything.label(123_456) == 456
    assert len(pickle.dumps(train)) < 60 * 200_000
