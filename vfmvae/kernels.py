"""Gives the top-level folder `kernels/` (Triton) the name `vfmvae.kernels`.

A module with a `__path__` is a package to the import system. The folder itself has no `__init__.py`: with
one it would hide the PyPI package `kernels` from transformers whenever the working directory is the
repository.
"""

from __future__ import annotations

from pathlib import Path

_installed = Path(__file__).parent / "kernels"  # where a wheel puts the folder
_checkout = Path(__file__).parents[1] / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _checkout)]
