"""The VFM-VAE tokenizer and the parts it is composed of."""

from vfmvae.tokenizer.bottleneck import BottleneckConfig, DiscretePosterior, Posterior
from vfmvae.tokenizer.decoder import DecoderConfig
from vfmvae.tokenizer.files import load_tokenizer
from vfmvae.tokenizer.fusion import FusionConfig
from vfmvae.tokenizer.model import AlignmentConfig, Tokenizer, TokenizerConfig, TokenizerOutput

__all__ = [
    "AlignmentConfig",
    "BottleneckConfig",
    "DecoderConfig",
    "DiscretePosterior",
    "FusionConfig",
    "Posterior",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "load_tokenizer",
]
