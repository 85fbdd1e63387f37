"""Images of classes from a trained diffusion model; the function `vfmvae.sample` gives latents.

vfmvae sample runs/diffusion --tokenizer runs/demo --classes 1,5 --count 16
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from vfmvae.diffusion.sampling import sample


class _CallableModule(ModuleType):
    """Importing this module binds it to `vfmvae.sample`, which must go on being the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return sample(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


def main() -> None: ...
