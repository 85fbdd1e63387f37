"""A tokenizer under the names that diffusers' autoencoders have; diffusers itself is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vfmvae.tokenizer.bottleneck import DiscretePosterior, Posterior
from vfmvae.tokenizer.model import Tokenizer


class LatentDistribution:
    """A posterior whose `sample` takes the generator first, as diffusers calls it."""

    def __init__(self, posterior: Posterior | DiscretePosterior) -> None:
        self._posterior = posterior

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self._posterior.sample(generator=generator)

    def mode(self) -> Tensor:
        return self._posterior.mode()


class EncoderOutput(NamedTuple):
    latent_dist: LatentDistribution


class DecoderOutput(NamedTuple):
    sample: Tensor


class DiffusersAutoencoder(nn.Module):
    """`.encode(x).latent_dist` and `.decode(z).sample` around a tokenizer; images [B, 3, H, W] in [-1, 1]."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        config = tokenizer.config
        # Pipelines derive their scale factor from the number of blocks: 2 ** (len(block_out_channels) - 1).
        stages = config.downsample.bit_length()
        self.config = SimpleNamespace(
            in_channels=3,
            out_channels=3,
            latent_channels=config.latent_channels,
            sample_size=config.resolution,
            scaling_factor=1.0,
            shift_factor=0.0,
            block_out_channels=tuple(config.decoder.channels(5 - i) for i in range(min(stages, 6)))
            + (config.decoder.channels(0),) * max(0, stages - 6),
            force_upcast=False,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.tokenizer.dtype

    @property
    def device(self) -> torch.device:
        return self.tokenizer.align.weight.device

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[LatentDistribution]:
        distribution = LatentDistribution(self.tokenizer.encode(x))
        return EncoderOutput(distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """`generator` is taken for compatibility: decoding draws nothing."""
        image = self.tokenizer.decode(z)
        return DecoderOutput(image) if return_dict else (image,)

    def forward(self, x: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        return self.decode(self.tokenizer.encode(x).mode(), return_dict)


def diffusers_autoencoder(tokenizer: Tokenizer) -> DiffusersAutoencoder:
    """Give a tokenizer the interface of `diffusers.AutoencoderKL`, for pipelines and training scripts."""
    return DiffusersAutoencoder(tokenizer)
