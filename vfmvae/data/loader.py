"""Batches ahead of time: worker processes read a run's next batches while the device computes.

Which images a batch holds depends on its position alone, so neither the number of workers nor a restart
changes what a run sees.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vfmvae.data.source import ImageSource


class _Batches(Dataset[Tensor | ValueError]):
    """Batch number n of a source as one tensor, or why there is none.

    An error that a worker process raised would arrive here with a traceback as its sentence.
    """

    def __init__(self, source: ImageSource, batch_size: int) -> None:
        self.source = source
        self.batch_size = batch_size

    def __getitem__(self, position: int) -> Tensor | ValueError:
        try:
            return self.source.batch(position, self.batch_size)["image"]
        except ValueError as error:
            return error


def load_batches(
    source: ImageSource, batch_size: int, numbers: list[int] | range, workers: int, pin: bool
) -> Generator[Tensor, None, None]:
    """Images uint8 [B, 3, R, R] of the batches with these numbers, in this order.

    Args:
        workers: reading processes; 0 reads in this one.
        pin: page-locked memory, from which copies to a GPU do not block.

    Close it where it is not read to its end, which ends the workers. Raises ValueError for an image that
    cannot be read, and RuntimeError where a batch is awaited from a worker that has died (`worker_deaths`).
    """
    loader = DataLoader(
        _Batches(source, batch_size),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    # Ctrl-C and batch systems signal every process of a run; workers inherit that these are blocked, and read
    # on until the parent has finished.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    on_death = signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # torch's own handler raises wherever the program is when a worker dies: in the middle of a step, of
        # which nothing could be kept. Without it the death is noticed where the worker's batch is awaited.
        if signal.getsignal(signal.SIGCHLD) is not on_death:
            signal.signal(signal.SIGCHLD, on_death or signal.SIG_DFL)
    try:
        for batch in batches:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    finally:
        del batches  # ends the workers, though a traceback may keep this frame


@contextmanager
def worker_deaths() -> Iterator[None]:
    """While entered, a worker that has died ends the work with ChildProcessError, a sentence."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        cause = str(error).strip().splitlines()[0]
        raise ChildProcessError(
            f"a process that reads images has died ({cause}); a machine short of memory kills them: try"
            f" fewer --workers"
        ) from None
