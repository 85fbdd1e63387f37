"""What a diffusion transformer repeats: modulated attention and MLP (adaLN-Zero, arXiv 2212.09748).

Shapes: B batch, N tokens, D width, K class token width. Layers compute in the dtype of their input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.diffusion.config import TransformerConfig
from vfmvae.diffusion.embeddings import linear

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """The weight of an RMS norm over the last dimension; the operations apply it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Multi-head self-attention with q/k norm and rotary positions where the config has them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width, head_width = config.width, config.width // config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_norm:
            norm = RMSNorm if config.norm == "rms" else nn.LayerNorm
            self.q_norm, self.k_norm = norm(head_width), norm(head_width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, fused: bool) -> Tensor:
        query, key, value = ops.qk_norm_rope(
            linear(x, self.qkv),
            self.heads,
            _qk_norm(self.q_norm),
            _qk_norm(self.k_norm),
            rotation,
            fused=fused,
        )  # each [B, heads, N, D / heads]
        y = ops.attention(query, key, value, fused=fused)
        return linear(y.transpose(1, 2).flatten(2), self.proj)  # [B, N, D]


def _qk_norm(norm: nn.Module | None) -> ops.QKNorm | None:
    if isinstance(norm, nn.LayerNorm):
        return ops.QKNorm(norm.weight, norm.bias, norm.eps, "layer")
    return ops.QKNorm(norm.weight, None, NORM_EPS, "rms") if isinstance(norm, RMSNorm) else None


class MLP(nn.Module):
    """Two layers with tanh GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        del fused  # GELU is no memory-bound chain of its own: torch has it in one pass
        return linear(F.gelu(linear(x, self.fc1), approximate="tanh"), self.fc2)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), w1 and w2 in one matrix (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        return linear(ops.swiglu_halves(linear(x, self.w12), fused=fused), self.w3)


class Modulation(nn.Sequential):
    """Conditioning [B, D] -> `chunks` rows [B, D] each, all 0 at first (adaLN-Zero)."""

    def __init__(self, width: int, chunks: int) -> None:
        rows = nn.Linear(width, chunks * width)
        super().__init__(nn.SiLU(), rows)
        self.chunks = chunks
        nn.init.zeros_(rows.weight)
        nn.init.zeros_(rows.bias)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return linear(F.silu(c), self[1]).chunk(self.chunks, dim=1)


class Norm(nn.Module):
    """A norm before a modulation: without parameters, or the weight of an RMSNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.kind = config.norm
        self.weight = nn.Parameter(torch.ones(config.width)) if config.norm == "rms" else None

    def forward(self, x: Tensor, shift: Tensor | None, scale: Tensor, fused: bool) -> Tensor:
        return ops.norm_modulate(
            x, shift, scale, self.weight, norm=self.kind, eps=NORM_EPS, dtype=scale.dtype, fused=fused
        )


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated before and gated after by the conditioning."""

    fused: bool = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.width * config.mlp_ratio
        self.norm1, self.norm2 = Norm(config), Norm(config)
        self.attn = Attention(config)
        self.mlp: MLP | SwiGLU
        if config.swiglu:
            self.mlp = SwiGLU(config.width, int(2 / 3 * hidden))
        else:
            self.mlp = MLP(config.width, int(hidden))
        self.adaLN_modulation = Modulation(config.width, 6 if config.block_shift else 4)

    def forward(self, x: Tensor, c: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Tokens [B, N, D], conditioning [B, D] -> tokens."""
        fused = self.fused
        rows = self.adaLN_modulation(c)
        if len(rows) == 6:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows
        else:
            (scale_a, gate_a, scale_m, gate_m), shift_a, shift_m = rows, None, None
        attended = self.attn(self.norm1(x, shift_a, scale_a, fused), rotation, fused)
        x = ops.gated_residual(x, gate_a, attended, fused=fused)
        mixed = self.mlp(self.norm2(x, shift_m, scale_m, fused), fused)
        return ops.gated_residual(x, gate_m, mixed, fused=fused)


class FinalLayer(nn.Module):
    """Modulated tokens -> velocities of their patches, and of the class token; zero at first."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        channels = config.channels * (2 if config.learn_sigma else 1)
        self.norm_final = Norm(config)
        self.adaLN_modulation = Modulation(config.width, 2)
        self.linear = nn.Linear(config.width, config.patch**2 * channels)
        heads = [self.linear]
        self.linear_cls: nn.Linear | None = None
        if config.class_token_width is not None:
            self.linear_cls = nn.Linear(config.width, config.class_token_width)
            heads.append(self.linear_cls)
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, x: Tensor, c: Tensor, fused: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, N, D] -> [B, n*n, p*p*C], and [B, K] or None."""
        shift, scale = self.adaLN_modulation(c)
        x = self.norm_final(x, shift, scale, fused)
        if self.linear_cls is None:
            return linear(x, self.linear), None
        return linear(x[:, 1:], self.linear), linear(x[:, 0], self.linear_cls)
