"""What torch.distributed.checkpoint writes and reads a checkpoint's tensors with.

Its format is kept as it is, so torch's own tools read it too. Added are the files and the order that make a
folder complete or absent (`CheckpointWriter`), and reading without trust: `.metadata` is a pickle, and a
pickle can name any function.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from vfmvae.training.checkpoint_folder import (
    METADATA,
    RECORD,
    FileDigest,
    commit,
    digests,
    partial_of,
    remove_all_but_newest,
    write_checksums,
    write_json,
)

# Everything that the metadata of a checkpoint of tensors is made of, besides torch's dtypes.
_METADATA_PARTS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
# What unpickling raises on bytes that are no such pickle.
_NO_METADATA = (AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError, pickle.UnpicklingError)


class CheckpointWriter(FileSystemWriter):
    """Writes one checkpoint into its partial folder; rank 0 gives it its name when all ranks have written.

    The writer of one rank among all that save the same checkpoint. Files reach the disk before the name does.
    """

    def __init__(self, path: Path, record: str, keep: int) -> None:
        """`path`: of the complete checkpoint. `record`: JSON. `keep`: how many checkpoints stay, this one
        included."""
        self._partial = partial_of(path)
        super().__init__(self._partial)
        self._complete = path
        self._record = record
        self._keep = keep

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:  # nobody writes before the coordinator has planned
            if self._complete.exists():
                raise OSError("a checkpoint of this step is there already")
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True, exist_ok=True)  # torch makes it on every rank too

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's share, and beside it the digests of its files, for rank 0 to collect."""
        written = super().write_data(plan, planner)
        names = sorted({result.storage_data.relative_path for result in written.value()})
        write_json(self._digests_of(self.rank or 0), digests(self._partial, names))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks have written."""
        super().finish(metadata, results)
        write_json(self._partial / RECORD, json.loads(self._record))
        files = digests(self._partial, [METADATA, RECORD])
        for rank in range(len(results)):
            files |= self._take_digests(rank)
        write_checksums(self._partial, files)
        commit(self._complete)
        remove_all_but_newest(self._complete.parent, self._keep)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # and no path: a run folder may move

    def _digests_of(self, rank: int) -> Path:
        return self._partial / f"digests_{rank}.json"

    def _take_digests(self, rank: int) -> dict[str, FileDigest]:
        path = self._digests_of(rank)
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise OSError(
                f"rank {rank} wrote, but its files are not in {self._partial}; the run folder must be on a"
                f" disk that all machines share"
            ) from None
        path.unlink()
        return {name: FileDigest(*digest) for name, digest in listed.items()}


class CheckpointReader(FileSystemReader):
    """Reads tensors of a checkpoint whose metadata was read with `read_metadata`."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def read_metadata(path: Path, files: Collection[str]) -> Metadata:
    """The metadata of a checkpoint of tensors, without running anything that the file names.

    Raises ValueError if the file holds anything else, or points outside of the checkpoint's `files`.
    """
    try:
        with open(path / METADATA, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except _NO_METADATA as error:
        raise ValueError(f"{path / METADATA} is no metadata of a checkpoint: {error}") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path / METADATA} holds a {type(metadata).__name__}, not metadata of a checkpoint")
    for name, stored in metadata.state_dict_metadata.items():
        # Anything else would be handed to an unpickler that trusts it.
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{path / METADATA} lists {name}, which is no tensor")
    for info in metadata.storage_data.values():
        if info.relative_path not in files:
            raise ValueError(f"{path / METADATA} points to {info.relative_path}, no file of the checkpoint")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the classes that metadata consists of and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_PARTS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
