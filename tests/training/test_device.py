"""Devices and dtypes: what can be used, and the sentence for what cannot."""

from __future__ import annotations

import pytest
import torch

from vfmvae.training.device import compute_dtype, pick_device


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["meta", "gpu", "cuda:99", "cpu:x", ""])
def test_devices_that_cannot_be_used_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used: .+; try --device cpu"):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'cuda' cannot be used"):
        pick_device("cuda")


def test_auto_computes_in_bfloat16_on_cuda_alone() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert compute_dtype("auto", cuda) is torch.bfloat16
    assert compute_dtype("auto", cpu) is None
    assert compute_dtype("bf16", cpu) is torch.bfloat16
    assert compute_dtype("fp32", cuda) is None
