"""Opening what the library `datasets` saved, and parquet files, split by split; what is wrong with them in
words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vfmvae.atomic import reason
from vfmvae.data.named_files import named_files
from vfmvae.data.samples import Fault
from vfmvae.data.splits import divide, kind_of

if TYPE_CHECKING:
    from datasets import Dataset

PARQUET = (".parquet",)
SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))
"""What save_to_disk leaves in the folder of a DatasetDict, and of a Dataset."""


def is_saved(where: str) -> bool:
    return any(all(os.path.isfile(os.path.join(where, name)) for name in names) for names in SAVED)


def load_saved(where: str) -> tuple[dict[str, Dataset], list[Fault]]:
    """The splits, and those without rows, which the library does not load."""
    import datasets

    listed = os.path.join(where, "dataset_dict.json")
    if not os.path.isfile(listed):
        if not _holds_rows(where):
            raise ValueError(f"no image is left in {where}: it holds no rows")
        with readable(where):
            dataset = datasets.load_from_disk(where)
        assert isinstance(dataset, datasets.Dataset)
        return {str(dataset.split or "train"): dataset}, []
    splits: dict[str, Dataset] = {}
    faults: list[Fault] = []
    with readable(where), open(listed, encoding="utf-8") as file:
        names = json.load(file)["splits"]
    for name in names:
        folder = os.path.join(where, name)
        if is_saved(folder) and not _holds_rows(folder):
            faults.append(Fault(name, "holds no rows", False))
            continue
        with readable(where):
            splits[str(name)] = datasets.Dataset.load_from_disk(folder)
    if not splits:
        raise ValueError(f"no image is left in {where}: none of its splits holds rows")
    return splits, faults


def _holds_rows(folder: str) -> bool:
    """Whether a saved split has files of rows; one whose state cannot be read is left to the library."""
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            return json.load(file).get("_data_files") != []
    except (OSError, ValueError, AttributeError):
        return True


def load_parquet(where: str) -> tuple[dict[str, Dataset], list[Fault]]:
    """The splits by what the names of the files say, `train` where they say nothing; and the bad files."""
    import datasets

    root, names = named_files(where, PARQUET, "parquet file")
    training, validation = divide(names)
    splits: dict[str, Dataset] = {}
    faults: list[Fault] = []
    for files in (training, validation):
        good = [name for name in files if _has_rows(root, name, faults)]
        if good:
            split = kind_of(files[0]) or "train"
            load = partial(datasets.Dataset.from_parquet, split=datasets.NamedSplit(split))
            try:
                with readable(where):
                    splits[split] = load([os.path.abspath(root / name) for name in good])
            except ValueError as error:
                whole = [name for name in good if _is_whole(root, name, faults)]
                if whole == good:
                    _check_columns(root, good, error)
                    raise
                good = whole
                if good:
                    with readable(where):
                        splits[split] = load([os.path.abspath(root / name) for name in good])
        if files and not good:
            raise ValueError(f"no image is left in {where}: {faults[-1].key} {faults[-1].reason}")
    return splits, faults


def _has_rows(root: Path, name: str, faults: list[Fault]) -> bool:
    import pyarrow.parquet as pq

    try:
        if pq.read_metadata(root / name).num_rows:
            return True
        faults.append(Fault(name, "holds no rows", False))
    except (OSError, ValueError) as error:
        faults.append(Fault(name, f"cannot be read: {_first_line(error)}"))
    return False


def _is_whole(root: Path, name: str, faults: list[Fault]) -> bool:
    """Whether every row can be read, of a file whose footer can."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(root / name) as file:
            for _ in file.iter_batches(batch_size=64):
                pass
        return True
    except (OSError, ValueError, pa.ArrowException) as error:
        faults.append(Fault(name, f"cannot be read: {_first_line(error)}"))
        return False


def _check_columns(root: Path, names: list[str], error: ValueError) -> None:
    """ValueError that names the first file whose columns are not those of the first."""
    import pyarrow.parquet as pq

    columns = {name: [(f.name, f.type) for f in pq.read_schema(root / name)] for name in names}
    first = columns[names[0]]
    for name, own in columns.items():
        other = [column for column in own if column not in first]
        missing = [column for column in first if column not in own]
        if other or missing:
            differences = [f"{column} is {kind}" for column, kind in other]
            there = [column for column, _ in own]
            differences += [f"there is no {column}" for column, _ in missing if column not in there]
            raise ValueError(
                f"{error}; the columns of {root / name} differ from those of {names[0]}:"
                f" {', '.join(differences)}"
            ) from error


@contextmanager
def readable(where: str) -> Iterator[None]:
    """What the library raises for damaged files, as a ValueError with a sentence."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise ValueError(f"cannot read the data set {where}: {_first_line(cause)}") from error


def _first_line(error: BaseException) -> str:
    words = str(error)
    if isinstance(error, OSError):
        words = f"{error.filename}: {reason(error)}" if error.filename else reason(error)
    return next(iter(words.strip().splitlines()), type(error).__name__)
