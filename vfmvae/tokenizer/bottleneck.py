"""What the latent is: a diagonal Gaussian posterior, or codes of several codebooks.

Shapes: B batch, z latent channels, h x w latent grid, K codebooks, V codes in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.images import check_is_tensor
from vfmvae.ops.posterior import LOGVAR_RANGE
from vfmvae.serialization import check_fields, check_lowest


@dataclass(frozen=True)
class BottleneckConfig:
    """Gaussian or discrete latent. `initial_logvar` belongs to the first, the rest to the second."""

    kind: Literal["gaussian", "discrete"] = "gaussian"
    initial_logvar: float = 0.0
    """Log variance that an untrained model starts near. Means start near 0, so that at the published 0 the
    samples are noise at first; short runs start lower."""
    codebooks: int = 1
    """Number of codebooks; the latent channels are cut into as many contiguous chunks."""
    codes: int = 16384
    """Codes in all codebooks together."""
    beta: float = 0.25
    """Weight of the commitment term: pulls the chunk to its code."""
    entropy_temperature: float = 0.01
    """Temperature of the soft assignments that the entropy loss looks at."""

    def __post_init__(self) -> None:
        check_fields(self, "bottleneck")
        check_lowest(self, "bottleneck", {"codebooks": 1, "codes": 1, "beta": 0})
        if self.entropy_temperature <= 0:
            raise ValueError(
                f"bottleneck.entropy_temperature is {self.entropy_temperature}; it must be positive"
            )
        if self.codes % self.codebooks:
            raise ValueError(f"{self.codes} codes cannot be divided over {self.codebooks} codebooks")


class Posterior:
    """Diagonal Gaussian over latents. `mean` and `logvar` (clamped to [-30, 20]) are [B, z, h, w]."""

    def __init__(self, moments: Tensor, fused: ops.Fused = True) -> None:
        """moments: [B, 2z, h, w], the means and then the log variances."""
        self.mean, self._logvar = moments.chunk(2, dim=1)
        self._fused = fused
        self._kl: Tensor | None = None

    @property
    def logvar(self) -> Tensor:
        return self._logvar.clamp(*LOGVAR_RANGE)

    @property
    def moments(self) -> Tensor:
        """[B, 2z, h, w]: mean and clamped log variance, as latent caches store them."""
        return torch.cat([self.mean, self.logvar], dim=1)

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    @property
    def var(self) -> Tensor:
        return self.logvar.exp()

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, [B, z, h, w]; standard normal noise is drawn where none is given.

        Args:
            noise: [B, z, h, w], or the seed of noise, int64 [2] (see `ops.gaussian_posterior`).
            generator: draws on its own device: one of the CPU gives the same noise to latents on any device.
        """
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, dtype=self.mean.dtype, device=device, generator=generator)
            noise = noise.to(self.mean.device)
        latents, self._kl = ops.gaussian_posterior(self.mean, self._logvar, noise, fused=self._fused)
        return latents

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self) -> Tensor:
        """0.5 * sum(mean^2 + var - 1 - logvar) of each sample, [B].

        Of the pass that gave the last sample, where there was one: both share a graph then.
        """
        wanted = torch.is_grad_enabled() and self.mean.requires_grad
        if self._kl is None or (wanted and not self._kl.requires_grad):
            self.sample(torch.zeros_like(self.mean))
        assert self._kl is not None
        return self._kl


class DiscretePosterior:
    """Quantised latents.

    indices: [B, K, h, w] int64.  codes: [B, z, h, w], the chosen codes, unit length in each of the K chunks.
    quantization_loss: scalar, averaged over codebooks.
    """

    def __init__(
        self,
        latents: Tensor,
        codes: Tensor,
        indices: Tensor,
        quantization_loss: Tensor,
        entropy: Callable[[], Tensor],
    ) -> None:
        self._latents = latents
        self.codes = codes
        self.indices = indices
        self.quantization_loss = quantization_loss
        self._entropy = entropy

    @property
    def entropy_loss(self) -> Tensor:
        """Scalar, averaged over codebooks; computed when asked, since it is the dearest part."""
        return self._entropy()

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The codes with a straight-through gradient to the encoder's output; nothing is random here."""
        return self._latents

    def mode(self) -> Tensor:
        """The same as `sample`."""
        return self._latents


class GaussianBottleneck(nn.Module):
    """Moments -> Posterior."""

    fused: bool = True

    def forward(self, moments: Tensor) -> Posterior:
        return Posterior(moments, self.fused)


class DiscreteBottleneck(nn.Module):
    """Match each chunk of the latent to the nearest of its codebook's unit-length codes."""

    def __init__(self, config: BottleneckConfig, channels: int) -> None:
        super().__init__()
        if channels % config.codebooks:
            raise ValueError(
                f"{channels} latent channels cannot be cut into {config.codebooks} codebook chunks"
            )
        self.codebooks = nn.ModuleList(
            Codebook(config.codes // config.codebooks, channels // config.codebooks, config)
            for _ in range(config.codebooks)
        )

    @contextmanager
    def counting(self, number: int, parts: int) -> Iterator[None]:
        """While entered, a forward in training mode adds part `number` (0 for the first) of a batch to the
        codebooks' `usage`; of 0 parts, none.
        """
        books: list[Any] = list(self.codebooks)
        for book in books:
            book.counts, book.kept = parts > 0, Codebook.USAGE_DECAY if number == 0 else 1.0
        try:
            yield
        finally:
            for book in books:
                book.counts, book.kept = True, Codebook.USAGE_DECAY

    def forward(self, latents: Tensor) -> DiscretePosterior:
        """[B, z, h, w] -> codes, indices and losses; computed in float32."""
        results = [
            book(chunk)
            for book, chunk in zip(self.codebooks, latents.chunk(len(self.codebooks), dim=1), strict=True)
        ]
        straight, codes, indices, quantization, similarity = zip(*results, strict=True)
        books: Any = self.codebooks

        def entropy() -> Tensor:
            losses = [book.entropy_loss(s) for book, s in zip(books, similarity, strict=True)]
            return torch.stack(losses).mean()

        return DiscretePosterior(
            torch.cat(straight, dim=1),
            torch.cat(codes, dim=1),
            torch.stack(indices, dim=1),
            torch.stack(quantization).mean(),
            entropy,
        )

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [B, K, h, w] of any integer dtype -> codes [B, z, h, w], ready to decode.

        Raises ValueError for a wrong shape or dtype and for indices outside of the codebooks, which waits for
        the device.
        """
        count = len(self.codebooks)
        check_is_tensor(indices, "indices", f"[B, {count}, h, w] of integers")
        if indices.ndim != 4 or indices.shape[1] != count or not indices.numel():
            raise ValueError(f"indices have shape {tuple(indices.shape)}; needed is [B, {count}, h, w]")
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"indices have dtype {indices.dtype}; needed is an integer dtype")
        books: Any = self.codebooks
        indices, size = indices.long(), len(books[0].weight)
        lowest, highest = (int(limit) for limit in indices.aminmax())
        if lowest < 0 or highest >= size:
            raise ValueError(
                f"indices go from {lowest} to {highest}; each codebook has the codes 0..{size - 1}"
            )
        codes = [book.unit_codes()[index] for book, index in zip(books, indices.unbind(1), strict=True)]
        return torch.cat(codes, dim=-1).permute(0, 3, 1, 2)


class Codebook(nn.Module):
    """One codebook: weight [V, c], matched by cosine; `usage` [V] is a decayed mean of the hits per batch."""

    USAGE_DECAY = 0.99  # our choice, as the publication names none; nothing is computed from `usage`
    usage: Tensor

    def __init__(self, codes: int, width: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(codes, width), dim=1))
        self.register_buffer("usage", torch.zeros(codes))
        self.counts = True
        self.kept = self.USAGE_DECAY
        self.beta = config.beta
        self.temperature = config.entropy_temperature

    def unit_codes(self) -> Tensor:
        """The codes scaled to unit length, [V, c] in float32 (float64 for float64 weights)."""
        return F.normalize(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)), dim=-1)

    def forward(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """[B, c, h, w] -> straight-through code map, code map, indices [B, h, w], loss, similarities."""
        wide = torch.promote_types(chunk.dtype, torch.float32)
        x = F.normalize(chunk.to(wide).permute(0, 2, 3, 1), dim=-1)  # [B, h, w, c]
        codes = self.unit_codes()
        similarity = x @ codes.t()  # [B, h, w, V]
        indices = similarity.detach().argmax(dim=-1)
        chosen = codes[indices]  # [B, h, w, c]
        quantization = self.beta * F.mse_loss(x, chosen.detach()) + F.mse_loss(chosen, x.detach())
        if self.training and self.counts:
            self._track(indices)
        straight = x + (chosen - x).detach()
        return straight.permute(0, 3, 1, 2), chosen.permute(0, 3, 1, 2), indices, quantization, similarity

    def entropy_loss(self, similarity: Tensor) -> Tensor:
        """Similarities [B, h, w, V] -> mean entropy of each assignment minus that of the mean assignment.

        Low where assignments are sure and yet use all codes.
        """
        # |x - c|^2 = 2 - 2 x.c for unit vectors; the constant leaves a softmax unchanged.
        logits = 2.0 * similarity.flatten(0, 2) / self.temperature
        p, log_p = logits.softmax(dim=-1), logits.log_softmax(dim=-1)
        per_sample = -(p * log_p).sum(dim=-1).mean()
        mean = p.mean(dim=0)
        return per_sample + (mean * (mean + 1e-7).log()).sum()

    @torch.no_grad()
    def _track(self, indices: Tensor) -> None:
        # Not bincount, which waits for the device.
        ones = torch.ones_like(indices, dtype=self.usage.dtype).flatten()
        hits = torch.zeros_like(self.usage).scatter_add_(0, indices.flatten(), ones)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(hits)
        self.usage.mul_(self.kept).add_(hits, alpha=1 - self.USAGE_DECAY)
