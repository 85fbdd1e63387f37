"""Processes of one run: torchrun starts them, each takes its share of every batch.

`torchrun --nproc-per-node 8 -m vfmvae.train ...` on one machine, with `--nnodes` and a rendezvous on several.
One process without torchrun needs no process group, and none is made.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others, which may be compiling, reading from a cold disk or writing files.

One that dies is noticed at once: its connections close, and torchrun ends the others on its machine.
"""
_turns = itertools.count()
LONG = timedelta(days=1)
"""The same for what is done once for all ranks, such as converting a data set."""
# What gloo and NCCL say when another process does not answer any more.
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "ncclRemoteError")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, for as long as the context is open.

    Collectives run over NCCL for CUDA tensors and gloo for CPU tensors (checkpoints are written from there).
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Convolutions give some gradients in channels-last order; DDP copies every gradient anyway.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """While entered, the loss of another process ends the work with ConnectionError, a sentence."""
    try:
        yield
    except RuntimeError as error:
        cause = next((phrase for phrase in _LOST if phrase in str(error)), None)
        if cause is None:
            raise
        raise ConnectionError(
            f"rank {rank()} has lost another process of this run ({cause}); what that one said last, or"
            f" torchrun's report, tells why"
        ) from None


def launcher() -> str:
    """What started this run's processes, as one types it."""
    if world_size() == 1:
        return "python"
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = world_size() // on_this_machine
    return f"torchrun {f'--nnodes {nodes} ... ' if nodes > 1 else ''}--nproc-per-node {on_this_machine}"


def rank() -> int:
    """This process's number among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def place() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says; (0, 1) without it.

    For work that needs no process group, because the processes do not talk to each other.
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def wait_for_all() -> None:
    """Wait until every process is here, however long some of them still work; a barrier gives up sooner."""
    if world_size() == 1:
        return
    store, key = dist.distributed_c10d._get_default_store(), f"vfmvae/wait_for_all/{next(_turns)}"
    store.set(f"{key}/{rank()}", "here")
    store.wait([f"{key}/{other}" for other in range(world_size())], LONG)


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """What is inside is done by rank 0 before the others begin, who wait for hours if it takes them."""
    if world_size() == 1:
        yield
        return
    # By the store that the processes met at. A barrier gives up after TIMEOUT, and one more process group
    # makes leaving slower than torchrun's patience with those whose peer has died.
    store, key = dist.distributed_c10d._get_default_store(), f"vfmvae/first_rank_first/{next(_turns)}"
    if rank() > 0:
        store.wait([key], LONG)
    yield
    if rank() == 0:
        store.set(key, "done")


def mean_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its mean over all ranks, in one collective; they share dtype and device."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag is set on at least one rank; a collective of the hosts, which waits for no device."""
    if world_size() == 1:
        return list(flags)
    seen = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in seen.tolist()]


def gather_lists(own: list[T]) -> list[T]:
    """The entries of all ranks' lists, in the order of ranks."""
    if world_size() == 1:
        return own
    lists: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, own)
    return [entry for entries in lists for entry in entries]
