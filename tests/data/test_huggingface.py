"""Hugging Face data sets: which columns, rows, labels and splits, and what is said about those that are bad.

The library writes them; what was put in is the truth.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.data.shards import jpeg
from vfmvae.data.huggingface import DatasetSamples, is_dataset, open_dataset
from vfmvae.data.samples import NO_LABEL, Fault, SampleError

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")

IMAGE = datasets.Image()
CLASSES = datasets.ClassLabel(names=["tench", "goldfish", "shark"])


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of this test's own, no bars, and no network: an attempt fails the test, also if caught."""
    attempts: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        attempts.append(str(arguments[-1]))
        raise OSError("no network")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    datasets.disable_progress_bars()
    yield
    assert attempts == []


def rows(numbers: range, label: Any = CLASSES, name: str = "image", folder: str = "x/") -> Any:
    """Rows n.jpg with the label n % 3."""
    images = [{"bytes": jpeg(n), "path": f"{folder}{n}.jpg"} for n in numbers]
    columns = {name: images, "label": [n % 3 for n in numbers]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({name: IMAGE, "label": label}))


def parquet(path: Path, **columns: list[Any]) -> None:
    """A parquet file that the library has not written: without its features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def contents(samples: DatasetSamples) -> dict[str, tuple[bytes, int]]:
    found = {samples.key(n): (samples.read(n), samples.label(n)) for n in range(len(samples))}
    assert len(found) == len(samples)
    return found


def expected(split: str, numbers: range) -> dict[str, tuple[bytes, int]]:
    return {f"{split}/{row:08}-{n}.jpg": (jpeg(n), n % 3) for row, n in enumerate(numbers)}


def write(kind: str, folder: Path) -> Path:
    """A training split of 12 and a validation split of 5 rows, saved or as on the hub."""
    train, validation = rows(range(12)), rows(range(50, 55))
    if kind == "saved":
        datasets.DatasetDict({"train": train, "validation": validation}).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        train.select(range(7)).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
        train.select(range(7, 12)).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
        validation.to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
        (folder / "README.md").write_text("a card")
    return folder


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_splits_images_and_labels(tmp_path: Path, kind: str) -> None:
    where = str(write(kind, tmp_path / "set"))
    assert is_dataset(where)
    train, validation, everything = (open_dataset(where, part) for part in ("train", "validation", "all"))
    assert contents(train) == expected("train", range(12))
    assert contents(validation) == expected("validation", range(50, 55))
    assert contents(everything) == contents(train) | contents(validation)
    assert train.classes == validation.classes == ("tench", "goldfish", "shark")
    assert train.faults() == []


@pytest.mark.parametrize(
    ("names", "train", "validation"),
    [
        (["train", "validation", "test"], ["train"], ["validation"]),
        (["train", "val"], ["train"], ["val"]),
        (["train", "valid", "unsupervised"], ["train"], ["valid"]),
        (["train", "test"], ["train"], ["test"]),
    ],
)
def test_names_of_splits(tmp_path: Path, names: list[str], train: list[str], validation: list[str]) -> None:
    datasets.DatasetDict({name: rows(range(2)) for name in names}).save_to_disk(tmp_path)
    for part, splits in (("train", train), ("validation", validation), ("all", train + validation)):
        samples = open_dataset(str(tmp_path), part)
        assert {samples.key(n).partition("/")[0] for n in range(len(samples))} == set(splits)
        assert len(samples) == 2 * len(splits)


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict", "parquet"])
def test_one_split_is_divided_by_a_hash(tmp_path: Path, kind: str) -> None:
    data = rows(range(100))
    if kind == "parquet":
        data.to_parquet(tmp_path / "0.parquet")
    else:
        (data if kind == "Dataset" else datasets.DatasetDict({"train": data})).save_to_disk(tmp_path)
    train, validation, everything = (
        contents(open_dataset(str(tmp_path), part)) for part in ("train", "validation", "all")
    )
    assert everything == train | validation == expected("train", range(100))
    assert not set(train) & set(validation) and 1 <= len(validation) <= 15


def test_parquet_files_by_name_glob_and_braces(tmp_path: Path) -> None:
    folder = write("parquet", tmp_path / "set") / "data"
    for where, count in (
        (f"{folder}/train-00000-of-00002.parquet", 7),
        (f"{folder}/train-*.parquet", 12),
        (f"{folder}/train-{{00000..00001}}-of-00002.parquet", 12),
        (f"{folder}/*.parquet", 17),
    ):
        assert is_dataset(where) and len(open_dataset(where, "all")) == count


def test_parquet_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "0.parquet"
    rows(range(4)).to_parquet(file)

    def converted() -> list[Path]:
        return sorted(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))

    open_dataset(str(file), "all")
    first = converted()
    times = [path.stat().st_mtime_ns for path in first]
    open_dataset(str(file), "all")
    assert converted() == first and [path.stat().st_mtime_ns for path in first] == times
    rows(range(7)).to_parquet(file)
    assert len(open_dataset(str(file), "all")) == 7


def test_what_is_a_data_set(tmp_path: Path) -> None:
    assert is_dataset("missing.parquet") and is_dataset("https://x.org/0.parquet")
    for name in ("a.tar", "folder", "x/*.tar"):
        assert not is_dataset(str(tmp_path / name))
    assert not is_dataset(str(tmp_path))
    (tmp_path / "state.json").touch()
    assert not is_dataset(str(tmp_path))
    (tmp_path / "1.parquet").touch()
    assert is_dataset(str(tmp_path))
    (tmp_path / "1.JPG").touch()
    assert not is_dataset(str(tmp_path)), "a folder of images"


# Columns


def test_the_only_image_may_have_any_name(tmp_path: Path) -> None:
    rows(range(3), name="picture").add_column("image", [b"x"] * 3).save_to_disk(tmp_path)
    assert contents(open_dataset(str(tmp_path), "all")) == expected("train", range(3))


def test_of_two_images_the_one_called_image(tmp_path: Path) -> None:
    data = rows(range(3))
    columns = {
        "mask": [{"bytes": b"mask", "path": None}] * 3,
        "image": data.with_format("arrow")[:]["image"].to_pylist(),
    }
    features = datasets.Features({"mask": IMAGE, "image": IMAGE})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path)
    samples = open_dataset(str(tmp_path), "all")
    assert samples.read(1) == jpeg(1) and samples.classes == ("",) and samples.label(0) == 0


@pytest.mark.parametrize("name", ["image", "img", "jpg", "png"])
@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_bytes_under_a_known_name(tmp_path: Path, name: str, kind: str) -> None:
    images: Any = [jpeg(n) for n in range(3)]
    if kind == "struct":
        images = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)]
    if kind == "large_binary":
        images = pa.array(images, pa.large_binary())
    parquet(tmp_path / "0.parquet", text=["a", "b", "c"], other=[b"x"] * 3, **{name: images})
    samples = open_dataset(str(tmp_path), "all")
    assert [samples.read(n) for n in range(3)] == [jpeg(n) for n in range(3)]
    assert samples.key(2) == "train/00000002" + ("-2.jpg" if kind == "struct" else "")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [b"x"], "jpg": [b"y"]},
            r"2 columns could be the image in split train of .*: image \(binary\), jpg \(binary\)$",
        ),
        (
            {"picture": [b"x"], "image": ["a.jpg"], "n": [1]},
            r"no column is the image in .*: picture \(binary\), image \(string\), n \(int64\)$",
        ),
    ],
)
def test_columns_that_do_not_tell_the_image(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    parquet(tmp_path / "0.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        open_dataset(str(tmp_path), "all")


@pytest.mark.parametrize("name", ["label", "labels", "cls", "class", "fine_label"])
def test_integer_labels(tmp_path: Path, name: str) -> None:
    columns: dict[str, Any] = {"image": [b"x"] * 4, name: [4, None, -5, 0], "coarse_label": [9] * 4}
    parquet(tmp_path / "0.parquet", **columns)
    samples = open_dataset(str(tmp_path), "all")
    assert [samples.label(n) for n in range(4)] == [4, NO_LABEL, NO_LABEL, 0]
    assert samples.classes == ("0", "1", "2", "3", "4")


def test_a_class_label_of_any_name_comes_before_integers(tmp_path: Path) -> None:
    columns = {"image": [{"bytes": b"x", "path": None}] * 3, "label": [7, 8, 9], "kind": [2, None, -1]}
    features = datasets.Features({"image": IMAGE, "label": datasets.Value("int64"), "kind": CLASSES})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path)
    samples = open_dataset(str(tmp_path), "all")
    assert samples.classes == ("tench", "goldfish", "shark")
    assert [samples.label(n) for n in range(3)] == [2, NO_LABEL, NO_LABEL]


def test_of_two_class_labels_the_fine_one(tmp_path: Path) -> None:
    columns = {"img": [{"bytes": b"x", "path": None}], "coarse_label": [1], "fine_label": [2]}
    coarse = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"img": IMAGE, "coarse_label": coarse, "fine_label": CLASSES})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path)
    samples = open_dataset(str(tmp_path), "all")
    assert samples.classes == ("tench", "goldfish", "shark") and samples.label(0) == 2


def test_labels_that_are_none(tmp_path: Path) -> None:
    parquet(tmp_path / "0.parquet", image=[b"x"] * 2, label=[-1, -1])
    samples = open_dataset(str(tmp_path), "all")
    assert samples.classes == ("",) and samples.label(1) == 0
    parquet(tmp_path / "0.parquet", image=[b"x"] * 2, label=["cat", "dog"])
    assert open_dataset(str(tmp_path), "all").classes == ("",)


def test_a_split_without_labels_beside_one_with(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", image=[b"x"] * 2, label=[0, 1])
    parquet(tmp_path / "val.parquet", image=[b"x"] * 2)
    samples = open_dataset(str(tmp_path), "all")
    assert [samples.label(n) for n in range(4)] == [0, 1, NO_LABEL, NO_LABEL]


def test_labels_that_cannot_be_classes_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "0.parquet", image=[b"x"] * 2, label=[0, 2**40])
    with pytest.raises(ValueError, match=f"column label in split train of .* holds {2**40}; classes are"):
        open_dataset(str(tmp_path), "all")
    other = rows(range(3), datasets.ClassLabel(names=["x", "y", "z"]))
    datasets.DatasetDict({"train": rows(range(3)), "test": other}).save_to_disk(tmp_path / "dict")
    with pytest.raises(ValueError, match="the splits of .*dict name different classes"):
        open_dataset(str(tmp_path / "dict"), "train")


# Rows and files that are bad


def test_rows_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "there.jpg").write_bytes(jpeg(5))
    images = [
        {"bytes": jpeg(0), "path": None},
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": "a/empty.jpg"},
        {"bytes": None, "path": "relative.jpg"},
        {"bytes": None, "path": str(tmp_path / "gone.jpg")},
        {"bytes": None, "path": "/dev/zero"},
        {"bytes": None, "path": str(tmp_path / "there.jpg")},
    ]
    parquet(tmp_path / "set" / "0.parquet", image=images)
    samples = open_dataset(str(tmp_path / "set"), "all")
    assert len(samples) == 8 and samples.read(0) == jpeg(0) and samples.read(7) == jpeg(5)
    for number, key, reason in (
        (1, "train/00000001", "it has no bytes"),
        (2, "train/00000002", "it has no bytes"),
        (3, "train/00000003-empty.jpg", "it has no bytes"),
        (4, "train/00000004-relative.jpg", "its row holds no bytes, only the relative path relative.jpg"),
        (
            5,
            "train/00000005-gone.jpg",
            f"its row holds no bytes, and the file {tmp_path}/gone.jpg does not exist",
        ),
        (6, "train/00000006-zero", "its row holds no bytes, and the file /dev/zero does not exist"),
    ):
        with pytest.raises(SampleError) as error:
            samples.read(number)
        assert error.value.fault == Fault(key, reason)


def test_damaged_parquet_files_are_told_and_left_out(tmp_path: Path) -> None:
    where = write("parquet", tmp_path / "set")
    damaged = where / "data" / "train-00001-of-00002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (where / "data" / "train-empty.parquet").write_bytes(b"")
    samples = open_dataset(str(where), "train")
    assert contents(samples) == expected("train", range(7))
    assert [fault.key for fault in samples.faults()] == [
        "data/train-00001-of-00002.parquet",
        "data/train-empty.parquet",
    ]
    assert all(fault.reason.startswith("cannot be read: ") for fault in samples.faults())
    (where / "data" / "validation-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(
        ValueError, match="no image is left in .*: data/validation-00000-of-00001.parquet can"
    ):
        open_dataset(str(where), "train")
    with pytest.raises(ValueError, match="no image is left in .*: train-empty.parquet cannot be read: "):
        open_dataset(str(where / "data" / "train-empty.parquet"), "all")


def test_damage_among_rows_costs_its_parquet_file(tmp_path: Path) -> None:
    where = write("parquet", tmp_path / "set")
    damaged = where / "data" / "train-00001-of-00002.parquet"
    data = bytearray(damaged.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    damaged.write_bytes(data)
    samples = open_dataset(str(where), "train")
    assert contents(samples) == expected("train", range(7))
    (fault,) = samples.faults()
    assert fault.key == "data/train-00001-of-00002.parquet" and fault.reason.startswith("cannot be read: ")


def test_parquet_files_of_other_columns_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", jpg=[jpeg(0)], cls=[0])
    parquet(tmp_path / "train-1.parquet", jpg=[jpeg(1)], cls=["one"])
    with pytest.raises(ValueError, match="columns of .*train-1.parquet differ .*train-0.parquet: cls is str"):
        open_dataset(str(tmp_path), "train")


def test_damage_is_found_beside_columns_that_differ_a_little(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.int64(), pa.int32(), pa.int64())):
        table = pa.table({"jpg": [jpeg(number)] * 50, "cls": pa.array([number] * 50, kind)})
        pq.write_table(table, tmp_path / f"train-{number}.parquet")
    assert len(open_dataset(str(tmp_path), "all")) == 150
    damaged = tmp_path / "train-2.parquet"
    data = bytearray(damaged.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    damaged.write_bytes(data)
    samples = open_dataset(str(tmp_path), "all")
    assert len(samples) == 100 and [fault.key for fault in samples.faults()] == ["train-2.parquet"]


def test_splits_without_rows_are_told_and_left_out(tmp_path: Path) -> None:
    filled, empty = rows(range(4)), rows(range(0))
    datasets.DatasetDict({"train": filled, "test": empty}).save_to_disk(tmp_path / "some")
    samples = open_dataset(str(tmp_path / "some"), "all")
    assert contents(samples) == expected("train", range(4))
    assert samples.faults() == [Fault("test", "holds no rows", False)]
    datasets.DatasetDict({"train": empty}).save_to_disk(tmp_path / "none")
    empty.save_to_disk(tmp_path / "alone")
    for name in ("none", "alone"):
        with pytest.raises(ValueError, match=f"no image is left in .*{name}: .* rows"):
            open_dataset(str(tmp_path / name), "all")


def test_a_column_of_words_called_label_is_told(tmp_path: Path) -> None:
    words = datasets.Value("string")
    images = [{"bytes": jpeg(n), "path": None} for n in range(3)]
    features = datasets.Features({"image": IMAGE, "label": words})
    table = datasets.Dataset.from_dict({"image": images, "label": ["a", "b", "c"]}, features=features)
    table.save_to_disk(tmp_path)
    samples = open_dataset(str(tmp_path), "all")
    assert samples.classes == ("",)
    assert samples.faults() == [
        Fault("train", "column label is string and gives no labels: they are integers", False)
    ]


def test_a_damaged_saved_set_is_named(tmp_path: Path) -> None:
    write("saved", tmp_path)
    (file,) = (tmp_path / "train").glob("*.arrow")
    file.write_bytes(b"no arrow")
    with pytest.raises(ValueError, match=f"cannot read the data set {tmp_path}: "):
        open_dataset(str(tmp_path), "train")
    file.unlink()
    with pytest.raises(ValueError, match=f"cannot read the data set {tmp_path}: "):
        open_dataset(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "https://x.org/0.parquet",
            "parquet files are read from this machine, not from https://x.org/0.parq",
        ),
        ("{}/none.parquet", "parquet file .*/none.parquet does not exist; give a .parquet file, a folder or"),
        ("{}", "no parquet files in .*: looked for .parquet files at any depth"),
    ],
)
def test_places_without_data_are_named(tmp_path: Path, where: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(where.format(tmp_path), "train")


def test_a_split_without_rows_is_named(tmp_path: Path) -> None:
    rows(range(1)).save_to_disk(tmp_path)
    assert len(open_dataset(str(tmp_path), "train")) == 1
    with pytest.raises(ValueError, match="no image for validation in .*; its splits are train"):
        open_dataset(str(tmp_path), "validation")
    with pytest.raises(ValueError, match="unknown part 'test'"):
        open_dataset(str(tmp_path), "test")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = str(write("saved", tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert is_dataset(where)
    with pytest.raises(ValueError, match=r'needs the package datasets: pip install "vfmvae\[huggingface\]"'):
        open_dataset(where, "train")


# Readers


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_pickles_point_to_files(tmp_path: Path, kind: str) -> None:
    samples = open_dataset(str(write(kind, tmp_path / "set")), "train")
    first = contents(samples)
    pickled = pickle.dumps(samples)
    assert contents(pickle.loads(pickled)) == first
    assert not any(image in pickled for image, _ in first.values())


def read_first(samples: DatasetSamples) -> tuple[str, bytes]:
    return samples.key(0), samples.read(0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read(tmp_path: Path, method: str) -> None:
    samples = open_dataset(str(write("saved", tmp_path)), "validation")
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(read_first, [samples] * 2) == [read_first(samples)] * 2


def test_a_forked_process_reads_what_its_parent_opened(tmp_path: Path) -> None:
    samples = open_dataset(str(write("parquet", tmp_path / "set")), "train")
    first = samples.read(0)
    child = os.fork()
    if child == 0:
        os._exit(0 if samples.read(0) == first and samples.read(11) == jpeg(11) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_read(tmp_path: Path) -> None:
    samples = open_dataset(str(write("saved", tmp_path)), "all")
    order = [n % 17 for n in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(samples.read, order))
    assert images == [jpeg(n if n < 12 else n + 38) for n in order]
