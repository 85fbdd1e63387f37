"""Kernels compiled by the host compiler, through the shim beside this file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT

FOLDER = Path(__file__).parent


def compile_for_host(source: str, into: Path) -> Path:
    """tests/csrc/`source`, which includes a .cu file, as a shared library in the folder `into`."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = into / Path(source).with_suffix(".so").name
    includes = ("-I", str(FOLDER / "shim"), "-I", str(ROOT / "csrc"))
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas")
    subprocess.run([compiler, *flags, *includes, str(FOLDER / source), "-o", str(library)], check=True)
    return library
