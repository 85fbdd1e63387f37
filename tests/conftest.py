"""What every test gets: fixed seeds, one thread, and the fixtures that need a word of explanation."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import poisoned_memory

# The tensors are small, and two threads wait for each other where another process wants a core.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    torch.use_deterministic_algorithms(False)  # a run in this process may have turned them on
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fresh memory is full of NaN, so an element that a kernel forgets to write is seen."""
    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The folder with outputs of published implementations, which are too large for the repository."""
    folder = os.environ.get("VFMVAE_PARITY_DIR")
    if not folder:
        pytest.skip("VFMVAE_PARITY_DIR is not set: no published outputs to compare with")
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"VFMVAE_PARITY_DIR={folder} is not a folder")
    return path
