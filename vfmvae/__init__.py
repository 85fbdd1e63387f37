"""vfmvae: train image tokenizers from frozen vision foundation models.

tokenizer = vfmvae.load("path/or/hub-id")
latents = tokenizer.encode(images).sample()
images = tokenizer.decode(latents)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vfmvae.diffusion import DiffusionTransformer, TransformerConfig
    from vfmvae.diffusion.sampling import sample
    from vfmvae.saved import load
    from vfmvae.tokenizer import Tokenizer, TokenizerConfig
    from vfmvae.tokenizer.diffusers_adapter import diffusers_autoencoder

__version__ = "0.1.0"

__all__ = [
    "DiffusionTransformer",
    "Tokenizer",
    "TokenizerConfig",
    "TransformerConfig",
    "__version__",
    "diffusers_autoencoder",
    "load",
    "sample",
]

# Resolved on first use: `import vfmvae` alone stays fast and needs nothing but Python.
_HOME = {
    "Tokenizer": "vfmvae.tokenizer",
    "TokenizerConfig": "vfmvae.tokenizer",
    "DiffusionTransformer": "vfmvae.diffusion",
    "TransformerConfig": "vfmvae.diffusion",
    "load": "vfmvae.saved",
    "sample": "vfmvae.diffusion.sampling",
    "diffusers_autoencoder": "vfmvae.tokenizer.diffusers_adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vfmvae' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
