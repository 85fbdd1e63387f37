"""One set of pictures in every format: the same pictures, labels and splits come out."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.commands import save_image
from vfmvae.data import ImageLoader, Images, open_data, open_samples

COUNT = 24


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """COUNT training images of three classes and three to validate, by format."""
    folder = tmp_path_factory.mktemp("formats")
    files: dict[str, list[tuple[str, int, bytes]]] = {"train": [], "validation": []}
    for number in range(COUNT + 3):
        split, name = "train" if number < COUNT else "validation", f"{number:03}"
        file = folder / "folder" / split / f"class{number % 3}" / f"{name}.jpg"
        save_image(file, 50, 40, seed=number)
        files[split].append((name, number % 3, file.read_bytes()))
    (folder / "shards").mkdir()
    for split, samples in files.items():
        for first in range(0, len(samples), 10):
            with tarfile.open(folder / "shards" / f"some-{split}-{first:04}.tar", "w") as shard:
                for name, label, contents in samples[first : first + 10]:
                    for ending, stored in (("cls", str(label).encode()), ("jpg", contents)):
                        member = tarfile.TarInfo(f"{name}.{ending}")
                        member.size = len(stored)
                        shard.addfile(member, io.BytesIO(stored))
    return {
        "folder": str(folder / "folder"),
        "shards": str(folder / "shards"),
        "parquet": parquet(folder, files),
    }


def parquet(folder: Path, files: dict[str, list[tuple[str, int, bytes]]]) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    (folder / "parquet").mkdir()
    for split, samples in files.items():
        columns = {
            "image": [{"bytes": contents, "path": f"{name}.jpg"} for name, _, contents in samples],
            "label": [label for _, label, _ in samples],
        }
        file = folder / "parquet" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(file))
    return str(folder / "parquet")


@pytest.mark.parametrize("name", ["folder", "shards", "parquet"])
def test_every_format_gives_the_same_pictures(name: str, formats: dict[str, str]) -> None:
    source = open_data(formats[name], "train", 32, seed=1)
    assert isinstance(source, Images) and len(source) == COUNT and len(source.classes) == 3
    assert len(open_samples(formats[name], "all")) == COUNT + 3
    held_out = open_data(formats[name], "validation", 40).batch(0, 3)
    for image, label, key in zip(held_out["image"], held_out["label"], held_out["key"], strict=True):
        number = int(Path(key.rpartition("-")[2]).stem)
        assert label == number % 3
        with Image.open(f"{formats['folder']}/validation/class{number % 3}/{number:03}.jpg") as opened:
            middle = torch.frombuffer(bytearray(opened.convert("RGB").tobytes()), dtype=torch.uint8)
        assert torch.equal(image.permute(1, 2, 0), middle.view(40, 50, 3)[:, 5:45])


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("name", ["shards", "parquet"])
def test_workers_read_them_as_this_process_does(name: str, backend: str, formats: dict[str, str]) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    source = open_data(formats[name], "train", 32)
    here, there = (
        ImageLoader(source, 4, workers=workers, backend=backend)  # type: ignore[arg-type]
        for workers in (0, 2)
    )
    seen: list[str] = []
    for one, other, _ in zip(here, there, range(COUNT // 4), strict=False):
        assert one["key"] == other["key"] and torch.equal(one["image"], other["image"])
        seen += one["key"]
    assert len(set(seen)) == COUNT
