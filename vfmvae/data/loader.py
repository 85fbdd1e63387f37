"""Batches of training images ahead of time, on the device: by worker processes, by DALI where it is there.

Which images a batch holds depends on its number and its crops alone, so neither the backend, nor the number
of workers, nor a restart changes what a run sees.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import count
from typing import Literal, get_args

import torch

from vfmvae.data import dali
from vfmvae.data.images import Images
from vfmvae.data.latents import LatentBatch, Latents
from vfmvae.data.source import ImageBatch, ImageSource, Request
from vfmvae.data.transforms import PUBLISHED_CROPS, CropConfig
from vfmvae.data.workers import read_ahead

Backend = Literal["auto", "dali", "torch"]


def choose_backend(source: ImageSource, backend: Backend, device: torch.device) -> Literal["dali", "torch"]:
    """What `backend` comes to: auto is DALI where nothing speaks against it.

    ValueError where DALI is asked for and cannot be used.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown data backend {backend!r}; choose one of {', '.join(get_args(Backend))}")
    if backend == "torch":
        return "torch"
    objection = dali.why_not(source, device)
    if backend == "dali" and objection is not None:
        raise ValueError(f"the data backend dali cannot be used: {objection}")
    return "torch" if objection is not None else "dali"


def load_batches(
    source: ImageSource,
    batch_size: int,
    requests: Iterable[Request],
    workers: int,
    device: torch.device,
    backend: Backend = "auto",
) -> Generator[ImageBatch, None, None]:
    """The batches that are asked for, in this order, their images on `device`.

    Args:
        workers: reading processes; 0 reads in this one.
        backend: dali decodes and cuts in DALI, on the GPU where `device` is one; torch in the workers, by
            Pillow. See `choose_backend`, and vfmvae.data.dali for how far their pictures differ.

    Close it where it is not read to its end, which ends the workers. Raises ValueError where images cannot be
    read, and RuntimeError where a batch is awaited from a worker that has died (`worker_deaths`).
    """
    if choose_backend(source, backend, device) == "dali":
        assert isinstance(source, Images)
        yield from dali.load_batches(source, batch_size, requests, workers, device)
        return
    read = partial(_read, source, batch_size)
    with closing(read_ahead(read, requests, workers, pin=device.type == "cuda")) as batches:
        for batch in batches:
            batch["image"] = batch["image"].to(device, non_blocking=True)
            yield batch


def _read(source: ImageSource, batch_size: int, asked: Request) -> ImageBatch:
    return source.batch(asked.number, batch_size, asked.crops)


class _Stream:
    """This rank's part of an endless order, and where in it all ranks are."""

    def __init__(self, batch_size: int, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} must be from 0 to {world_size - 1}, one below world_size")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seen_images = 0

    def state_dict(self) -> dict[str, int]:
        """As it is after the batch that was given last."""
        return {"seen_images": self.seen_images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes effect at the next `iter`."""
        self.seen_images = int(state["seen_images"])

    def _numbers(self) -> Iterator[int]:
        """Of this rank's batches from the present state on."""
        together = self.batch_size * self.world_size
        first, rest = divmod(self.seen_images, together)
        if rest:
            raise ValueError(
                f"{self.seen_images} images were seen, which are no whole batches of {self.batch_size} on"
                f" {self.world_size} ranks; go on with sizes that divide them"
            )
        return (step * self.world_size + self.rank for step in count(first))

    def _count(self) -> None:
        """Goes before a batch is given."""
        self.seen_images += self.batch_size * self.world_size


class ImageLoader(_Stream):
    """An endless iterator over this rank's training batches, with a state that checkpoints.

    Every sample comes once per epoch, over all ranks together, whatever happens in between: the state is how
    many images all ranks have been given, and may be taken up by other numbers of ranks and workers. All
    ranks are taken to have asked for as many batches as this one.

        loader = ImageLoader(open_data("photos", "train", 256), 32, workers=4, device="cuda")
        for batch in loader:  # image uint8 [B, 3, R, R] on the device, label int64 [B], key, number, faults
            ...
            checkpoint["data"] = loader.state_dict()
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        backend: Backend = "auto",
        crops: CropConfig = PUBLISHED_CROPS,
    ) -> None:
        """batch_size: images of one batch of this rank; the others are described at `load_batches`."""
        super().__init__(batch_size, rank, world_size)
        self.source = source
        self.workers = workers
        self.device = torch.device(device)
        self.backend = choose_backend(source, backend, self.device)
        self.crops = crops

    def __iter__(self) -> Iterator[ImageBatch]:
        requests = (Request(number, self.crops) for number in self._numbers())
        loaded = load_batches(self.source, self.batch_size, requests, self.workers, self.device, self.backend)
        with closing(loaded):
            for batch in loaded:
                self._count()
                yield batch


class LatentLoader(_Stream):
    """The same over latents: batches as `Latents.batch` gives them, on the device, with the same state."""

    def __init__(
        self,
        latents: Latents,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """workers: reading processes; the files were verified when `latents` was opened."""
        super().__init__(batch_size, rank, world_size)
        self.latents = latents
        self.workers = workers
        self.device = torch.device(device)

    def __iter__(self) -> Iterator[LatentBatch]:
        with closing(
            load_latents(self.latents, self.batch_size, self._numbers(), self.workers, self.device)
        ) as batches:
            for batch in batches:
                self._count()
                yield batch


def load_latents(
    latents: Latents, batch_size: int, numbers: Iterable[int], workers: int, device: torch.device
) -> Generator[LatentBatch, None, None]:
    """The batches of these numbers in this order, on `device`; as `load_batches`."""
    read = partial(_read_latents, latents, batch_size)
    with closing(read_ahead(read, numbers, workers, pin=device.type == "cuda")) as batches:
        for batch in batches:
            for field in ("latent", "moments", "features", "class_token"):
                values = batch[field]
                if values is not None:
                    batch[field] = values.to(device, non_blocking=True)
            yield batch


def _read_latents(latents: Latents, batch_size: int, number: int) -> LatentBatch:
    return latents.batch(number, batch_size)
