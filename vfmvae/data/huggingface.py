"""Hugging Face data sets as `Samples`: folders that the library saved, and parquet files. Never a download.

    folder/dataset_dict.json, train/, ...         DatasetDict.save_to_disk
    folder/state.json, data-00000-of-00001.arrow  Dataset.save_to_disk
    data/train-00000-of-00002.parquet ...         parquet as on the hub: a folder, a file, or a pattern; the
                                                  library converts it once to memory-mapped files in its cache

Images are the stored bytes, not decoded here. The image is the only column of type Image, else the one named
image, img, jpg or png that holds bytes. The label is the only column of type ClassLabel, else the one named
label, labels, cls, class or fine_label that holds integers; null and negative ones are no labels. The names
of the splits tell what trains (vfmvae.data.splits). Keys are `split/row-NAME`, NAME being that of the stored
path, where there is one.

Needs the package `datasets`: pip install "vfmvae[huggingface]".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vfmvae.atomic import reason
from vfmvae.data.huggingface_files import PARQUET, is_saved, load_parquet, load_saved
from vfmvae.data.named_files import means_files
from vfmvae.data.packed import PackedStrings
from vfmvae.data.samples import NO_LABEL, Fault, Part, SampleError
from vfmvae.data.shard_index import LARGEST_LABEL
from vfmvae.data.splits import check_part, divide, hashed_rows

if TYPE_CHECKING:
    from datasets import Dataset, Features

IMAGE_NAMES = ("image", "img", "jpg", "png")
LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")


class Table(NamedTuple):
    """The columns of a split that matter."""

    split: str
    rows: Dataset  # gives pyarrow tables
    image: str  # the column of the bytes
    path: str | None  # that of the stored paths
    names: PackedStrings | None  # [N], the last parts of the paths; "" where there is none
    label: np.ndarray | None  # int64 [N], NO_LABEL where there is none; None without a column
    classes: tuple[str, ...] | None  # what the column itself names


class DatasetSamples:
    """The images of some splits; made by `open_dataset`. May be read from many threads and processes."""

    def __init__(
        self, tables: list[Table], rows: np.ndarray, classes: tuple[str, ...], faults: list[Fault]
    ) -> None:
        """rows: int64 [N], numbers of rows, counted through all tables."""
        self.classes = classes
        self._tables = tables
        self._rows = rows
        self._starts = np.cumsum([0, *(len(table.rows) for table in tables)])
        self._faults = faults

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, number: int) -> str:
        table, row = self._place(number)
        return _key(table, row)

    def label(self, number: int) -> int:
        if self.classes == ("",):
            return 0
        table, row = self._place(number)
        return NO_LABEL if table.label is None else int(table.label[row])

    def read(self, number: int) -> bytes:
        table, row = self._place(number)
        stored = table.rows[row]
        image = stored.column(table.image)[0].as_py()
        path = stored.column(table.path)[0].as_py() if table.path else None
        if image is None and path:
            image = _read_file(path, _key(table, row))
        if not image:
            raise SampleError(_key(table, row), "it has no bytes")
        return image

    def faults(self) -> list[Fault]:
        return list(self._faults)

    def _place(self, number: int) -> tuple[Table, int]:
        row = int(self._rows[number])
        table = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._tables[table], row - int(self._starts[table])


def is_dataset(where: str) -> bool:
    """Whether `where` was saved by the library, or means parquet files: one, a pattern, or a folder."""
    return is_saved(where) or means_files(where, PARQUET)


def open_dataset(where: str, part: Part) -> DatasetSamples:
    """The samples of a saved data set or of parquet files, as `part` says.

    Parquet files that cannot be read are left out and told by `faults`. ValueError without the package
    `datasets`, for an address, a missing or damaged data set, columns that could each be the image, an
    unknown part, and where no image is left for `part`.
    """
    check_part(part)
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f'reading {where} needs the package datasets: pip install "vfmvae[huggingface]" ({error})'
        ) from None
    splits, faults = load_saved(where) if is_saved(where) else load_parquet(where)
    training, validation = divide(list(splits))
    tables = [_table(where, name, splits[name]) for name in (*training, *validation)]
    classes = _classes(where, tables)
    faults += [fault for name in (*training, *validation) for fault in _unread_label(name, splits[name])]
    if validation and part != "all":
        chosen = training if part == "train" else validation
        tables = [table for table in tables if table.split in chosen]
    rows = np.arange(sum(len(table.rows) for table in tables))
    if not validation and part != "all":
        rows = hashed_rows(part, [_key(table, row) for table in tables for row in range(len(table.rows))])
    if not len(rows):
        raise ValueError(f"no image for {part} in {where}; its splits are {', '.join(splits)}")
    return DatasetSamples(tables, rows, classes, faults)


def _table(where: str, split: str, rows: Dataset) -> Table:
    import datasets

    image = _image_column(where, split, rows.features)
    label = _label_column(rows.features)
    names = (
        rows.features[label].names
        if label and isinstance(rows.features[label], datasets.ClassLabel)
        else None
    )
    labels = None if label is None else _labels(where, split, rows, label)
    rows = rows.select_columns([image])
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    if not isinstance(rows.features[image], datasets.Value):
        rows = rows.flatten()
        image, path = f"{image}.bytes", f"{image}.path"
    else:
        path = None
    if path not in rows.features:
        path = None
    stored = None if path is None else _column(rows, path).to_pylist()
    return Table(
        split,
        rows.with_format("arrow"),
        image,
        path,
        None if stored is None else PackedStrings.pack((p or "").rpartition("/")[2] for p in stored),
        labels,
        None if names is None else tuple(names),
    )


def _image_column(where: str, split: str, features: Features) -> str:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) == 1:
        return images[0]
    named = [name for name in images or features if name in IMAGE_NAMES and _holds_bytes(features[name])]
    if len(named) == 1:
        return named[0]
    columns = ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())
    what = f"{len(images or named)} columns could be" if images or named else "no column is"
    raise ValueError(
        f"{what} the image in split {split} of {where}; name one of them image and save it again: {columns}"
    )


def _holds_bytes(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in (
        "binary",
        "large_binary",
    )


def _type(feature: Any) -> str:
    dtype = getattr(feature, "dtype", None)
    return dtype if type(feature).__name__ == "Value" and dtype else type(feature).__name__


def _label_column(features: Features) -> str | None:
    import datasets

    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    integers = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    ]
    return next((name for name in LABEL_NAMES if name in (classes or integers)), None)


def _unread_label(split: str, rows: Dataset) -> list[Fault]:
    """What is told of a column named as labels are, where none is taken."""
    named = [name for name in LABEL_NAMES if name in rows.features]
    if _label_column(rows.features) is not None or not named:
        return []
    kind = _type(rows.features[named[0]])
    return [Fault(split, f"column {named[0]} is {kind} and gives no labels: they are integers", False)]


def _labels(where: str, split: str, rows: Dataset, column: str) -> np.ndarray:
    """int64 [N], NO_LABEL for null and negative ones."""
    import pyarrow as pa
    import pyarrow.compute as pc

    stored = pc.fill_null(pc.cast(_column(rows, column), pa.int64(), safe=False), NO_LABEL)
    labels = np.maximum(stored.to_numpy(), NO_LABEL)
    if labels.max(initial=NO_LABEL) > LARGEST_LABEL:
        raise ValueError(
            f"column {column} in split {split} of {where} holds {labels.max()}; classes are numbers up to"
            f" {LARGEST_LABEL}: rename the column if it is no label"
        )
    return labels


def _column(rows: Dataset, column: str) -> Any:
    """A pyarrow ChunkedArray in the order of the rows."""
    return rows.select_columns([column]).with_format("arrow")[:].column(column)


def _classes(where: str, tables: list[Table]) -> tuple[str, ...]:
    """The names that the label columns give; else "0" to the largest label; else one class, ""."""
    named = {table.classes for table in tables if table.classes is not None}
    if len(named) > 1:
        raise ValueError(f"the splits of {where} name different classes; save them with the same ones")
    labels = [table.label.max(initial=NO_LABEL) for table in tables if table.label is not None]
    largest = int(max(labels, default=NO_LABEL))
    if named:
        (names,) = named
        if largest >= len(names):
            raise ValueError(f"{where} has label {largest}, but its label column names {len(names)} classes")
        return names
    return tuple(map(str, range(largest + 1))) or ("",)


def _key(table: Table, row: int) -> str:
    name = table.names[row] if table.names is not None else ""
    return f"{table.split}/{row:08d}" + (f"-{name}" if name else "")


def _read_file(path: str, key: str) -> bytes:
    """The file that a row without bytes points to."""
    if not os.path.isabs(path):
        raise SampleError(key, f"its row holds no bytes, only the relative path {path}")
    if not os.path.isfile(path):  # nor a device, which may have no end
        raise SampleError(key, f"its row holds no bytes, and the file {path} does not exist")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SampleError(key, f"{path}: {reason(error)}") from error
