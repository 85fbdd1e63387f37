"""When and how gradients are averaged over processes: by DDP, by FSDP2, or here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vfmvae.training.distributed import mean_over_ranks, world_size


def replicated(module: nn.Module, device: torch.device) -> nn.Module:
    """`module`, or where there are several processes a wrapper whose gradients are averaged over them."""
    if world_size() == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # The option's new name is not known to older releases of torch.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated")
        # Buffers are functions of the weights, or averaged by `Job.synchronise_statistics`.
        return DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def reducing(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around forward and backward of a part: gradients are averaged over processes with the last one.

    `model`: wrapped by DDP or sharded by FSDP2 where there are several processes.
    """
    if last or world_size() == 1:
        return nullcontext()
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    assert isinstance(model, FSDPModule)
    return _shards_waiting(model)


@contextmanager
def _shards_waiting(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def settle_unused(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Tell DDP, which waits for every gradient, that no loss of this step reads some parameters.

    Such are an encoder's head, and `align` while a schedule has the alignment loss off. DDP's own search
    (find_unused_parameters) would join the graphs of the forward's results, which are cut apart here.
    """
    if isinstance(model, DistributedDataParallel):
        unused = [p for p in trained if p.grad is None]
        if unused:
            torch.autograd.backward(unused, [torch.zeros_like(p) for p in unused])
        for parameter in unused:
            parameter.grad = None  # as without DDP: the optimizer passes it over


def reduce_unsharded(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Average the gradients that neither DDP nor FSDP2 averages: those of what is not sharded."""
    if world_size() > 1 and not isinstance(model, DistributedDataParallel):
        gradients = [p.grad for p in trained if p.grad is not None]
        mean_over_ranks(*[g for g in gradients if not isinstance(g, DTensor)])
