"""Averages and gradient norms over a model that two processes share (FSDP2) against one that has it whole."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vfmvae.ops import why_no_adam_average
from vfmvae.training.ema import EMA
from vfmvae.training.optim import OptimizerConfig, build_optimizer, gradient_norm, scale_gradients

WORLD = 2


def build() -> nn.Sequential:
    torch.manual_seed(0)
    # 5 rows do not divide by 2: the shards differ in size, and 1 row leaves one process without any.
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.BatchNorm1d(5), nn.Linear(5, 1))


def train(model: nn.Module, ema: EMA, x: Tensor) -> list[Tensor]:
    """Three steps with gradients of norm 1; returns the norms. Each evaluates the average on the way."""
    norms = []
    optimizer = build_optimizer(OptimizerConfig(learning_rate=0.05), model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        (100 * model(x).square().mean()).backward()
        norms.append(gradient_norm(model.parameters()))
        scale_gradients(model.parameters(), norms[-1].reciprocal())
        optimizer.step()
        ema.update(0.5)
        with ema.applied(), torch.no_grad():
            model(x)  # gathers the average
    return norms


def compare(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(1)
    x = torch.randn(6, 4)  # the same in both: their gradients' mean is the gradient of one
    whole, sharded = build(), build()
    fully_shard(sharded[0])
    fully_shard(sharded)
    whole_ema, ema = EMA(whole, "3."), EMA(sharded, "3.")
    assert isinstance(ema.state_dict()["0.weight"], DTensor), "averages are sharded alike"
    expected, norms = train(whole, whole_ema, x), train(sharded, ema, x)
    for norm, wanted in zip(norms, expected, strict=True):
        assert not isinstance(norm, DTensor) and norm.ndim == 0 and wanted > 0.1
        torch.testing.assert_close(norm, wanted, rtol=1e-5, atol=0)
    # The forward inside `applied` gathered the average; the next one must gather the weights again.
    torch.testing.assert_close(sharded(x), whole(x), rtol=1e-5, atol=1e-6)
    with mock.patch("vfmvae.ops.native.why_no_triton", lambda x: None):
        objection = why_no_adam_average(torch.device("cpu"), sharded.parameters())
    assert objection is not None and "engine.parallel 'fsdp' shards them" in objection
    exported, wanted_file = ema.export(), whole_ema.export()
    assert exported.keys() == wanted_file.keys()
    for name, tensor in exported.items():
        assert not isinstance(tensor, DTensor)
        torch.testing.assert_close(tensor, wanted_file[name], rtol=1e-5, atol=1e-6)
    resumed = EMA(sharded, "3.")
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    for name, tensor in resumed.export().items():
        torch.testing.assert_close(tensor, exported[name], rtol=0, atol=0)
    # A model of which only a part is sharded.
    mixed = nn.Sequential(fully_shard(nn.Linear(4, 5)), nn.Linear(5, 1))
    mixed[0].load_state_dict(sharded[0].state_dict())
    (mixed(x).sum()).backward()
    whole_gradients = [
        p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in mixed.parameters()
    ]
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in whole_gradients]))
    torch.testing.assert_close(gradient_norm(mixed.parameters()), norm, rtol=1e-6, atol=0)
    scale_gradients(mixed.parameters(), torch.tensor(0.25))
    torch.testing.assert_close(gradient_norm(mixed.parameters()), norm / 4, rtol=1e-6, atol=0)
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare, args=(str(tmp_path / "store"),), nprocs=WORLD)
