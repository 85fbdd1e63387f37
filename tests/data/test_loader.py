"""Batches read ahead are the batches of the source, in order, however they are read."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.commands import save_image
from vfmvae.data import ImageFolder, Photographs, Request, load_batches, worker_deaths
from vfmvae.data.source import ImageBatch
from vfmvae.data.transforms import CropConfig


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
    found = list(load_batches(source, 3, map(Request, numbers), workers, pin=False))
    assert len(found) == len(numbers)
    for number, batch in zip(numbers, found, strict=True):
        assert batch.dtype == torch.uint8
        assert torch.equal(batch, source.batch(number, 3)["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_is_cut_as_it_was_asked(workers: int, folder: Path) -> None:
    whole, published = CropConfig(side=(1.0, 1.0), flip=0.0), CropConfig()
    source, requests = ImageFolder(folder, 32), [Request(n, (whole, published)[n // 3]) for n in range(6)]
    found = list(load_batches(source, 2, requests, workers, pin=False))
    for (number, crops), batch in zip(requests, found, strict=True):
        other = published if crops == whole else whole
        assert torch.equal(batch, source.batch(number, 2, crops)["image"])
        assert not torch.equal(batch, source.batch(number, 2, other)["image"])


def read(source: ImageFolder, pixels: multiprocessing.SimpleQueue[bytes]) -> None:
    pixels.put(source.batch(1, 3)["image"].numpy().tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_folder_is_read_in_other_processes_after_it_was_in_this_one(method: str, folder: Path) -> None:
    source, context = ImageFolder(folder, 32), multiprocessing.get_context(method)
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
    source = ImageFolder(folder, 32, seed=4)
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.batch(2, 3)["image"], source.batch(2, 3)["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_a_plain_sentence_in_its_turn(workers: int, folder: Path) -> None:
    source = ImageFolder(folder, 32)
    order = [source.batch(n, 1)["key"][0] for n in range(len(source))]
    (folder / order[2]).write_bytes(b"no image")
    with closing(load_batches(source, 1, first(len(source)), workers, pin=False)) as batches:
        assert len([next(batches), next(batches)]) == 2, "those before it are read"
        with pytest.raises(ValueError) as raised:
            next(batches)
    sentence = str(raised.value)
    assert sentence.startswith(f"cannot read image {folder / order[2]}: ")
    assert "\n" not in sentence


class Endless:
    """A source whose batches after the first take forever."""

    classes = ()

    def __len__(self) -> int:
        return 1

    def batch(self, step: int, batch_size: int, crops: CropConfig) -> ImageBatch:
        if step:
            signal.pause()
        return {"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "label": torch.zeros(1), "key": [""]}


def workers_of(batches: Iterator[Tensor]) -> list[int]:
    next(batches)
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def test_a_worker_that_is_killed_is_reported() -> None:
    message = "a process that reads images has died .*fewer --workers"
    with (
        pytest.raises(ChildProcessError, match=message),
        worker_deaths(),
        closing(load_batches(Endless(), 1, first(9), 1, pin=False)) as batches,
    ):
        (worker,) = workers_of(batches)
        os.kill(worker, signal.SIGKILL)
        next(batches)


def test_closing_ends_the_workers() -> None:
    before = multiprocessing.active_children()
    with closing(load_batches(Photographs("train", 32), 1, first(99), 2, pin=False)) as batches:
        assert len(workers_of(batches)) == 2 + len(before)
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_are_the_parents_business(number: signal.Signals) -> None:
    source = Photographs("train", 32)
    with closing(load_batches(source, 1, first(40), 2, pin=False)) as batches:
        for worker in workers_of(batches):
            os.kill(worker, number)
        rest = list(batches)
    assert len(rest) == 39
    assert torch.equal(rest[-1], source.batch(39, 1)["image"])


def test_other_errors_are_not_the_workers() -> None:
    with pytest.raises(RuntimeError, match="something else"), worker_deaths():
        raise RuntimeError("something else")
