"""A pytest plugin (-p tests.lost_context): a test that breaks the CUDA context ends its process.

After an illegal memory access every call of CUDA in that process fails, so all later tests would fail with
it. Under pytest-xdist another process goes on with them; without it the session ends there.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.excinfo is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        if hasattr(item.config, "workerinput"):
            print(f"{item.nodeid}: {call.excinfo.exconly()}", file=sys.stderr, flush=True)
            os._exit(3)
        pytest.exit(f"{item.nodeid} broke the CUDA context: {first_line}", returncode=3)
