"""Batches read ahead are the batches of the source, in order, however they are read."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.commands import save_image
from tests.data.latent_shards import fill
from tests.helpers import ROOT
from vfmvae.data import (
    Backend,
    Fault,
    ImageLoader,
    Images,
    LatentLoader,
    Latents,
    Photographs,
    Request,
    load_batches,
    open_data,
    worker_deaths,
)
from vfmvae.data.source import ImageBatch
from vfmvae.data.transforms import CropConfig

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        save_image(tmp_path / f"{number}.png", 40, 50, seed=number)
    return tmp_path


def first(count: int) -> Iterator[Request]:
    return map(Request, range(count))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_that_was_asked(workers: int) -> None:
    source, numbers = Photographs("train", 32, seed=3), [5, 0, 7, 7, 2]
    found = list(load_batches(source, 3, map(Request, numbers), workers, CPU))
    assert len(found) == len(numbers)
    for number, batch in zip(numbers, found, strict=True):
        assert batch["image"].dtype == torch.uint8
        assert torch.equal(batch["image"], source.batch(number, 3)["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_is_cut_as_it_was_asked(workers: int, folder: Path) -> None:
    whole, published = CropConfig(side=(1.0, 1.0), flip=0.0), CropConfig()
    source, requests = (
        open_data(str(folder), "train", 32),
        [Request(n, (whole, published)[n // 3]) for n in range(6)],
    )
    found = list(load_batches(source, 2, requests, workers, CPU, "torch"))
    for (number, crops), batch in zip(requests, found, strict=True):
        other = published if crops == whole else whole
        assert torch.equal(batch["image"], source.batch(number, 2, crops)["image"])
        assert not torch.equal(batch["image"], source.batch(number, 2, other)["image"])


def read(source: Images, pixels: multiprocessing.SimpleQueue[bytes]) -> None:
    pixels.put(source.batch(1, 3)["image"].numpy().tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_folder_is_read_in_other_processes_after_it_was_in_this_one(method: str, folder: Path) -> None:
    source, context = open_data(str(folder), "train", 32), multiprocessing.get_context(method)
    expected = source.batch(1, 3)["image"]  # which starts this process's threads
    pixels = context.SimpleQueue()
    process = context.Process(target=read, args=(source, pixels), daemon=True)
    process.start()
    process.join(timeout=30)
    try:
        assert process.exitcode == 0, "it ended, and without an error"
        assert pixels.get() == expected.numpy().tobytes()
    finally:
        process.kill()


def test_a_folder_survives_pickling(folder: Path) -> None:
    source = open_data(str(folder), "train", 32, seed=4)
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.batch(2, 3)["image"], source.batch(2, 3)["image"])


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_is_gone_is_a_plain_sentence(workers: int, backend: Backend, folder: Path) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    source = open_data(str(folder), "train", 32)
    for file in folder.iterdir():
        file.unlink()
    with (
        closing(load_batches(source, 1, first(3), workers, CPU, backend)) as batches,
        pytest.raises(
            ValueError, match=r"^32 images .* cannot be read, .*\.png: No such file or directory; [^\n]*$"
        ),
    ):
        next(batches)


class Endless:
    """A source whose batches after the first take forever."""

    classes = ()

    def __len__(self) -> int:
        return 1

    def batch(self, step: int, batch_size: int, crops: CropConfig) -> ImageBatch:
        if step:
            signal.pause()
        return {
            "image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            "label": torch.zeros(1, dtype=torch.int64),
            "key": [""],
            "number": [0],
            "faults": [],
        }

    def faults(self) -> list[Fault]:
        return []


def workers_of(batches: Iterator[ImageBatch]) -> list[int]:
    next(batches)
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def test_a_worker_that_is_killed_is_reported() -> None:
    message = "a process that reads images has died .*fewer --workers"
    with (
        pytest.raises(ChildProcessError, match=message),
        worker_deaths(),
        closing(load_batches(Endless(), 1, first(9), 1, CPU)) as batches,
    ):
        (worker,) = workers_of(batches)
        os.kill(worker, signal.SIGKILL)
        next(batches)


def test_closing_ends_the_workers() -> None:
    before = multiprocessing.active_children()
    with closing(load_batches(Photographs("train", 32), 1, first(99), 2, CPU)) as batches:
        assert len(workers_of(batches)) == 2 + len(before)
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_are_the_parents_business(number: signal.Signals) -> None:
    source = Photographs("train", 32)
    with closing(load_batches(source, 1, first(40), 2, CPU)) as batches:
        for worker in workers_of(batches):
            os.kill(worker, number)
        rest = list(batches)
    assert len(rest) == 39
    assert torch.equal(rest[-1]["image"], source.batch(39, 1)["image"])


def test_other_errors_are_not_the_workers() -> None:
    with pytest.raises(RuntimeError, match="something else"), worker_deaths():
        raise RuntimeError("something else")


def test_the_state_of_a_loader_may_be_taken_up_by_other_ranks_and_workers(folder: Path) -> None:
    for number in range(5, 24):
        save_image(folder / f"{number}.png", 40, 50, seed=number)
    source = open_data(str(folder), "train", 16)
    epoch = len(source)
    keys: list[str] = []

    def go_on(images: int, world_size: int, workers: int, batches: int) -> int:
        """`batches` of each rank, noted in the order of positions; returns the new state."""
        loaders = [
            ImageLoader(source, 2, rank=r, world_size=world_size, workers=workers, backend="torch")
            for r in range(world_size)
        ]
        for loader in loaders:
            loader.load_state_dict({"seen_images": images})
        parts = [iter(loader) for loader in loaders]
        for _ in range(batches):
            for part in parts:
                keys.extend(next(part)["key"])
        for part in parts:
            part.close()  # type: ignore[attr-defined]
        (seen,) = {loader.state_dict()["seen_images"] for loader in loaders}
        return seen

    images = go_on(0, world_size=2, workers=1, batches=2)
    images = go_on(images, world_size=1, workers=2, batches=2)
    images = go_on(images, world_size=3, workers=0, batches=-(-(epoch - images) // 6))
    assert images == len(keys) >= epoch
    assert sorted(keys[:epoch]) == sorted(source.samples.key(n) for n in range(epoch))
    with pytest.raises(ValueError, match="3 images were seen, which are no whole batches of 2 on 1 ranks"):
        loader = ImageLoader(source, 2)
        loader.load_state_dict({"seen_images": 3})
        next(iter(loader))
    with pytest.raises(ValueError, match="rank 2 must be from 0 to 1"):
        ImageLoader(source, 2, rank=2, world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_are_loaded_with_the_same_state(workers: int, tmp_path: Path) -> None:
    latents = Latents(fill(tmp_path / "latents"), seed=3)
    epoch = len(latents)
    keys: list[str] = []
    images = 0
    for world_size, batches in ((2, 2), (1, 3), (2, 9)):
        loaders = [
            LatentLoader(latents, 4 // world_size, rank=r, world_size=world_size, workers=workers)
            for r in range(world_size)
        ]
        for loader in loaders:
            loader.load_state_dict({"seen_images": images})
        parts = [iter(loader) for loader in loaders]
        for _ in range(batches):
            for part in parts:
                batch = next(part)
                expected = latents.batch(len(keys) // len(batch["key"]), len(batch["key"]))
                assert batch["key"] == expected["key"]
                assert torch.equal(batch["latent"], expected["latent"])
                keys += batch["key"]
        for part in parts:
            part.close()  # type: ignore[attr-defined]
        (images,) = {loader.state_dict()["seen_images"] for loader in loaders}
    assert images == len(keys) and len(set(keys[:epoch])) == epoch


def test_a_program_ends_beside_an_open_loader(folder: Path) -> None:
    """Workers do not hear that they are to end; nobody may wait for them."""
    program = (
        "from vfmvae.data import ImageLoader, open_data\n"
        f"source = open_data({str(folder)!r}, 'train', 16)\n"
        "batches = iter(ImageLoader(source, 2, workers=2, backend='torch'))\n"
        "next(batches)\n"
        "kept = [batches]\n"
        "kept.append(kept)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=100)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "foo"}, "unknown data backend 'foo'; choose one of auto, dali, torch"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ],
)
def test_wrong_options_of_a_loader_are_named(options: dict[str, object], sentence: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        ImageLoader(open_data(str(folder), "train", 16), **{"batch_size": 2} | options)  # type: ignore[arg-type]
