"""Reading ahead: worker processes do a run's next pieces of reading while the device computes.

What a piece holds depends on its request alone, so neither the number of workers nor a restart changes what a
run sees.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
R = TypeVar("R")


class _Pieces(Dataset, Generic[R, T]):
    """What `read` gives for a request, or why there is none.

    An error that a worker process raised would arrive with a traceback as its sentence.
    """

    def __init__(self, read: Callable[[R], T]) -> None:
        self.read = read

    def __getitem__(self, request: R) -> T | ValueError | OSError:
        try:
            return self.read(request)
        except (ValueError, OSError) as error:
            return error


def read_ahead(
    read: Callable[[R], T], requests: Iterable[R], workers: int, pin: bool = False
) -> Generator[T, None, None]:
    """What `read` gives for each request, in their order.

    Args:
        read: can be pickled where processes are spawned; what it returns goes through a queue.
        workers: reading processes; 0 reads in this one.
        pin: tensors in page-locked memory, from which copies to a GPU do not block.

    Close it where it is not read to its end, which ends the workers. Raises ValueError and
    OSError where `read` did, and RuntimeError where a piece is awaited from a worker that has died
    (`worker_deaths`).
    """
    loader: DataLoader = DataLoader(
        _Pieces(read),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    # Ctrl-C and batch systems signal every process of a run; workers inherit that these are blocked, and read
    # on until the parent has finished.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    on_death = signal.getsignal(signal.SIGCHLD)
    try:
        pieces = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # torch's own handler raises wherever the program is when a worker dies: in the middle of a step, of
        # which nothing could be kept. Without it the death is noticed where the worker's piece is awaited.
        if signal.getsignal(signal.SIGCHLD) is not on_death:
            signal.signal(signal.SIGCHLD, on_death or signal.SIG_DFL)
    # At the end of the program multiprocessing would ask them to end, which they do not hear, and wait.
    at_exit = partial(_kill_workers, pieces)
    atexit.register(at_exit)
    try:
        for piece in pieces:
            if isinstance(piece, ValueError | OSError):
                raise piece
            yield piece
    finally:
        atexit.unregister(at_exit)
        del at_exit, pieces  # ends the workers, though a traceback may keep this frame


def _kill_workers(pieces: object) -> None:
    for worker in getattr(pieces, "_workers", ()):
        worker.kill()


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
