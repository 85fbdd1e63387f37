"""Sets of tar shards: which shards, splits, classes and keys, and who may read the bytes.

The truth is tarfile, which wrote the shards, and the package webdataset, which others read them with.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data.shards import contents, jpeg, labelled, names, write_imagenet, write_tar
from vfmvae.data import webdataset
from vfmvae.data.named_files import expand_braces
from vfmvae.data.samples import Fault, SampleError
from vfmvae.data.shard_index import FORMAT
from vfmvae.data.webdataset import ShardSamples, is_shards, open_shards


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    return write_imagenet(tmp_path / "imagenet")


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
    samples = open_shards(str(tmp_path), "all")
    assert samples.classes == ("0", "1")
    assert samples.faults() == [
        Fault(place.rpartition("/")[2], "is not used: it has no line for label 1", False)
    ]


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


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    for name in ("a.tar", ".b.tar", ".hidden/c.tar", "d/.e.tar"):
        write_tar(tmp_path / name, [("1.jpg", b"x")])
    assert open_shards(str(tmp_path), "all").keys() == ["a/1"]


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
        (
            "https://x.org/a.tar",
            "shards are read from this machine, not from https://x.org/a.tar; copy them here",
        ),
        ("pipe:curl x", "shards are read from this machine, not from pipe:curl x"),
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
    os.utime(imagenet / "imagenet1k-train-0000.tar")
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
    with multiprocessing.get_context(method).Pool(1) as pool:
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
            stamp=np.array([FORMAT, size, file.stat().st_mtime_ns]),
            numbers=np.stack([index, index, index % 1000, 6 * (index + 1)]),
            names=np.frombuffer(text, np.uint8),
            faults=np.frombuffer(b"[[], []]", np.uint8),
        )
    monkeypatch.setattr(webdataset, "build_index", lambda path: pytest.fail("the indexes are there"))
    everything, train, validation = (open_shards(str(tmp_path), p) for p in ("all", "train", "validation"))
    assert len(everything) == 200_000 == len(train) + len(validation) and len(everything.classes) == 1000
    assert abs(len(validation) - 10_000) < 500
    assert set(train.keys()).isdisjoint(validation.keys())
    assert everything.key(123_456) == "x-024/003456" and everything.label(123_456) == 456
    assert len(pickle.dumps(train)) < 60 * 200_000
