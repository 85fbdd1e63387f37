"""Diffusion transformers, one implementation with options: SiT, REPA, REG, LightningDiT.

Velocity of the flow at noisy latents, given time and class: DiT blocks with adaLN-Zero (arXiv 2212.09748,
SiT 2401.08740), a head that is aligned with a foundation model (REPA, 2410.06940; iREPA, 2512.10794), a class
token that is denoised along (REG, 2507.01467), RMSNorm, SwiGLU and rotary positions (LightningDiT,
2501.01423). Sizes: Parameters have the names of the published models.

Shapes: B batch, C latent channels, n = h/p = w/p tokens per side, N = n*n (+ 1 with a class token), D width,
    K class token width
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae.diffusion.blocks import MLP, Attention, DiTBlock, FinalLayer, SwiGLU
from vfmvae.diffusion.config import TransformerConfig
from vfmvae.diffusion.embeddings import (
    LabelEmbedder,
    TimestepEmbedder,
    rotary_tables,
    sincos_positions,
)
from vfmvae.diffusion.heads import ClassTokenEmbedder, ConvProjector, MLPProjector, PatchEmbedder


class TransformerOutput(NamedTuple):
    """What one forward gives."""

    velocity: Tensor
    """[B, C, h, w]: noise minus latents, as the model has it."""
    class_velocity: Tensor | None
    """[B, K], of the class token."""
    projected: list[Tensor]
    """[B, N, width] per projector, the class token first."""


class DiffusionTransformer(nn.Module):
    """The velocity of latents at any time, see the module's docstring.

    `compute_dtype`: of the products and what they read, float32 until it is set; parameters and the sum that
    blocks add to are float32 (or wider) always. Results are in it. `fused` may be changed at any time.
    """

    positions: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: TransformerConfig, fused: bool = True) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.classes, config.width)
        self.class_token_embedder: ClassTokenEmbedder | None = None
        if config.class_token_width is not None:
            self.class_token_embedder = ClassTokenEmbedder(config.class_token_width, config.width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.projectors = nn.ModuleList(_projector(config, width) for width in config.alignment_widths)
        self.final_layer = FinalLayer(config)
        self.apply(_initialise)
        extra = config.tokens - config.grid**2
        positions = sincos_positions(config.width, config.grid)
        self.register_buffer("positions", F.pad(positions, (0, 0, extra, 0)), persistent=False)
        turns = (
            rotary_tables(config.width // config.heads, config.grid, extra) if config.rope else (None,) * 2
        )
        self.register_buffer("rotary_cos", turns[0], persistent=False)
        self.register_buffer("rotary_sin", turns[1], persistent=False)
        # Of the latents in training: (latents - mean) / std is what the model sees.
        self.register_buffer("latents_mean", torch.zeros(config.channels))
        self.register_buffer("latents_std", torch.ones(config.channels))
        self.fused = fused

    def cast_weights(self) -> None:
        """Keep the matrices in the dtype that every forward casts them to; for models that do not train."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(self.dtype)

    def normalise(self, latents: Tensor) -> Tensor:
        """A tokenizer's latents [B, C, h, w] -> what the model sees: each channel of mean 0 and std 1."""
        return (latents - self.latents_mean[:, None, None]) / self.latents_std[:, None, None]

    def denormalise(self, latents: Tensor) -> Tensor:
        """What `sample` gives -> latents that the tokenizer decodes."""
        return latents * self.latents_std[:, None, None] + self.latents_mean[:, None, None]

    @property
    def fused(self) -> bool:
        """Whether fused operations are used, where they apply, or the plain reference."""
        return self._fused

    @fused.setter
    def fused(self, fused: bool) -> None:
        self._fused = fused
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            block.fused = fused

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.compute_dtype or self.y_embedder.embedding_table.weight.dtype

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None = None
    ) -> TransformerOutput:
        """
        Args:
            x: noisy latents [B, C, h, w].
            t: times [B] in [0, 1]; 1 is noise.
            y: labels, int64 [B]; `config.classes` is the null class. Not checked: that would wait for the
                device.
            class_token: the noisy class token [B, K], which a model with one needs.

        Raises ValueError for inputs of other shapes, and for a class token that is missing or not wanted.
        """
        self._check(x, t, y, class_token)
        tokens, c, rotation = self._embed(x, t, y, class_token)
        projected: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, c, rotation)
            if number == self.config.alignment_depth:
                projected = [projector(tokens.to(c.dtype)) for projector in self.projectors]
        patches, class_velocity = self.final_layer(tokens, c, self.fused)
        velocity = self._unpatchify(patches)
        if self.config.published_time == "data":
            velocity = -velocity
            class_velocity = None if class_velocity is None else -class_velocity
        return TransformerOutput(velocity, class_velocity, projected)

    def project(self, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None = None) -> list[Tensor]:
        """`forward(...).projected`, without the blocks after `alignment_depth`."""
        self._check(x, t, y, class_token)
        tokens, c, rotation = self._embed(x, t, y, class_token)
        for block in self.blocks[: self.config.alignment_depth]:
            tokens = block(tokens, c, rotation)
        return [projector(tokens.to(c.dtype)) for projector in self.projectors]

    def features(self, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None = None) -> list[Tensor]:
        """Patch tokens [B, n*n, D] after each block, in float32."""
        self._check(x, t, y, class_token)
        tokens, c, rotation = self._embed(x, t, y, class_token)
        found = []
        for block in self.blocks:
            tokens = block(tokens, c, rotation)
            found.append(tokens[:, -(self.config.grid**2) :])
        return found

    def _embed(
        self, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens [B, N, D], conditioning [B, D], rotary tables."""
        dtype = self.dtype
        tokens = self.x_embedder(x.to(dtype))
        if self.class_token_embedder is not None and class_token is not None:
            tokens = torch.cat([self.class_token_embedder(class_token.to(dtype)), tokens], dim=1)
        tokens = tokens + self.positions  # float32 from here on: dozens of branches are added to it
        if self.config.published_time == "data":
            t = 1 - t
        c = self.t_embedder(t, dtype) + self.y_embedder(y, dtype)
        return tokens, c, (self.rotary_cos, self.rotary_sin) if self.config.rope else None

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """[B, n*n, p*p*C] -> [B, C, h, w]; without the channels that stand for the variance."""
        n, p = self.config.grid, self.config.patch
        image = patches.view(len(patches), n, n, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        image = image.reshape(len(patches), -1, n * p, n * p)
        return image[:, : self.config.channels]

    def _check(self, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None) -> None:
        config = self.config
        needed: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "x": (x, (len(x), config.channels, config.latent_size, config.latent_size)),
            "t": (t, (len(x),)),
            "y": (y, (len(x),)),
        }
        if config.class_token_width is not None:
            needed["class_token"] = (class_token, (len(x), config.class_token_width))
        elif class_token is not None:
            raise ValueError("class_token is given, and this model has none (model.class_token_width)")
        for name, (tensor, shape) in needed.items():
            if tensor is None or tensor.shape != shape:
                found = "missing" if tensor is None else list(tensor.shape)
                raise ValueError(f"{name} is {found}; this model needs {list(shape)}")


def _projector(config: TransformerConfig, out_width: int) -> nn.Module:
    if config.projector == "conv":
        return ConvProjector(config, out_width)
    return MLPProjector(config.width, config.projector_width, out_width)


def _initialise(module: nn.Module) -> None:
    """Xavier for the linear layers that have no start of their own."""
    layers: tuple[nn.Module, ...] = ()
    if isinstance(module, Attention):
        layers = (module.qkv, module.proj)
    elif isinstance(module, MLP):
        layers = (module.fc1, module.fc2)
    elif isinstance(module, SwiGLU):
        layers = (module.w12, module.w3)
    elif isinstance(module, MLPProjector):
        layers = (module[0], module[2], module[4])
    elif isinstance(module, ClassTokenEmbedder):
        layers = (module.proj,)
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
