"""Diffusion transformers on a tokenizer's latents, and how they are sampled.

One time convention everywhere: t = 1 is noise, t = 0 is data; x_t = (1 - t) x + t e and v = e - x.
"""

from vfmvae.diffusion.config import SIZES, TransformerConfig
from vfmvae.diffusion.transformer import DiffusionTransformer, TransformerOutput

__all__ = ["SIZES", "DiffusionTransformer", "TransformerConfig", "TransformerOutput"]
