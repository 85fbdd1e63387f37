"""A tokenizer under the names that diffusers' autoencoders have; diffusers itself is not needed.

The interface is that of `diffusers.AutoencoderKL`: images [B, 3, H, W] in [-1, 1] go in and out, latents are
[B, z, h, w]. What comes out has the adapter's `dtype`, as pipelines in half precision expect: it is computed
and sampled in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vfmvae.tokenizer.bottleneck import DiscretePosterior, Posterior
from vfmvae.tokenizer.decoder import NUM_BLOCKS
from vfmvae.tokenizer.model import Tokenizer


@dataclass(frozen=True, eq=False)
class AutoencoderConfig(Mapping[str, Any]):
    """What pipelines ask of an autoencoder's config: attributes, and the same as a read-only mapping."""

    latent_channels: int
    sample_size: int
    """Side of the images in pixels."""
    block_out_channels: tuple[int, ...]
    """Pipelines take 2 ** (len(block_out_channels) - 1) for the pixels per latent position."""
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = False

    def __getitem__(self, key: str) -> Any:
        return vars(self)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


class LatentDistribution:
    """Latents that nothing is random in: those of a discrete tokenizer."""

    def __init__(self, latents: Tensor) -> None:
        self._latents = latents

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The same as `mode`; `generator` is taken because a Gaussian's `sample` takes one."""
        return self._latents

    def mode(self) -> Tensor:
        return self._latents


class GaussianLatentDistribution(LatentDistribution):
    """A diagonal Gaussian; tensors in `dtype`, except for `kl` [B] in float32."""

    def __init__(self, posterior: Posterior, dtype: torch.dtype) -> None:
        super().__init__(posterior.mode().to(dtype))
        self._posterior = posterior
        self._dtype = dtype

    @property
    def parameters(self) -> Tensor:
        """[B, 2z, h, w]: mean and log variance."""
        return self._posterior.moments.to(self._dtype)

    @property
    def mean(self) -> Tensor:
        return self._posterior.mean.to(self._dtype)

    @property
    def logvar(self) -> Tensor:
        return self._posterior.logvar.to(self._dtype)

    @property
    def std(self) -> Tensor:
        return self._posterior.std.to(self._dtype)

    @property
    def var(self) -> Tensor:
        return self._posterior.var.to(self._dtype)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self._posterior.sample(generator=generator).to(self._dtype)

    def kl(self) -> Tensor:
        """Divergence of each sample from the standard normal distribution, summed over the latent."""
        return self._posterior.kl()


class EncoderOutput(NamedTuple):
    latent_dist: LatentDistribution


class DecoderOutput(NamedTuple):
    sample: Tensor


class DiffusersAutoencoder(nn.Module):
    """`.encode(x).latent_dist` and `.decode(z).sample` around a tokenizer; images [B, 3, H, W] in [-1, 1].

    `enable_slicing()` takes the images of a batch one by one, in less memory. Tiling does not exist: the
    decoder's style and attention see the whole latent map.
    """

    use_tiling = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.use_slicing = False
        config = tokenizer.config
        stages = config.downsample.bit_length()
        widths = [config.decoder.channels(max(0, NUM_BLOCKS - 1 - i)) for i in range(stages)]
        self.config = AutoencoderConfig(config.latent_channels, config.resolution, tuple(widths))

    @property
    def dtype(self) -> torch.dtype:
        return self.tokenizer.dtype

    @property
    def device(self) -> torch.device:
        return self.tokenizer.align.weight.device

    def enable_slicing(self) -> None:
        """Encode and decode one image at a time from now on."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Raises NotImplementedError, as diffusers' autoencoders without tiling do."""
        raise NotImplementedError(
            "tiling is not possible with this autoencoder: its decoder's style and attention see the whole"
            " latent map, and tiles would not fit each other; enable_slicing() saves memory over the batch"
        )

    def disable_tiling(self) -> None:
        """Does nothing: tiling is never on."""

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[LatentDistribution]:
        distribution = self._distribution([self.tokenizer.encode(part) for part in self._parts(x)])
        return EncoderOutput(distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """`generator` is taken for compatibility: decoding draws nothing."""
        image = torch.cat([self.tokenizer.decode(part) for part in self._parts(z)]).to(self.dtype)
        return DecoderOutput(image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Images through encoder and decoder; latents are the mode, or drawn with `sample_posterior`."""
        (posterior,) = self.encode(sample, return_dict=False)
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict)

    def _parts(self, batch: Tensor) -> list[Tensor]:
        """What goes through the tokenizer at once; input that is no batch is the tokenizer's to refuse."""
        slices = self.use_slicing and isinstance(batch, Tensor) and batch.ndim == 4 and len(batch) > 1
        return list(batch.split(1)) if slices else [batch]

    def _distribution(self, parts: list[Posterior | DiscretePosterior]) -> LatentDistribution:
        gaussian = [part for part in parts if isinstance(part, Posterior)]
        if not gaussian:
            return LatentDistribution(torch.cat([part.mode() for part in parts]).to(self.dtype))
        whole = Posterior(torch.cat([part.moments for part in gaussian]), self.tokenizer.fused)
        return GaussianLatentDistribution(whole, self.dtype)


def diffusers_autoencoder(tokenizer: Tokenizer) -> DiffusersAutoencoder:
    """Give a tokenizer the interface of `diffusers.AutoencoderKL`, for pipelines and training scripts."""
    return DiffusersAutoencoder(tokenizer)
