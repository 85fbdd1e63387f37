"""The counter of host reads sees them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.host_reads import host_reads


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: float(x.sum()),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.detach().numpy(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.nn.functional.relu(x[0]) if x[1] > x[0] else x,
    ],
)
def test_a_read_is_counted(read: Callable[[Tensor], object]) -> None:
    with host_reads() as reads:
        read(torch.tensor([1.0, 2.0]))
    assert len(reads) == 1 and "test_host_reads.py" in reads[0]


def test_a_read_in_a_backward_pass_is_counted() -> None:
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda gradient: gradient * float(gradient.sum()))
    with host_reads() as reads:
        (x * 2).sum().backward()
    assert len(reads) == 1


def test_computing_is_no_read() -> None:
    x = torch.ones(3, requires_grad=True)
    with host_reads() as reads:
        y = torch.where(x > 0, x * 2, x)[1:].sum()
        y.backward()
        x.detach()[torch.tensor([0, 2])] = 1.0
    assert reads == []
