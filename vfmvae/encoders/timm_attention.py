"""timm's self-attention with its product by `vfmvae.ops.attention`.

timm's modules call PyTorch's attention and leave no choice. Here they keep their parameters, names and
arithmetic, and get another `forward`: by changing their class, as they are already built.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.models import eva, vision_transformer
from torch import Tensor

from vfmvae import ops
from vfmvae.encoders.fp8 import linear_with


def use_ops_attention(trunk: Any) -> None:
    """For the blocks of a timm VisionTransformer or Eva.

    Left to timm are other classes of attention, which no encoder in the table has, and the pooling by one
    learned query of SigLIP.
    """
    forms = {vision_transformer.Attention: _Attention, eva.EvaAttention: _RotaryAttention}
    for block in trunk.blocks:
        if type(block.attn) in forms and getattr(block.attn, "gate", None) is None:
            block.attn.__class__ = forms[type(block.attn)]


class _Attention(vision_transformer.Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        assert attn_mask is None and not is_causal, "blocks of an encoder look at all tokens"
        return _attend(self, *_heads(self.qkv(x), self.num_heads))


class _RotaryAttention(eva.EvaAttention):
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        assert attn_mask is None and not is_causal, "blocks of an encoder look at all tokens"
        if self.qkv is None:  # EVA-CLIP: a product each is large enough for a GPU; names stay as published
            q, k, v = (
                project(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
        elif self.q_bias is None:
            q, k, v = _heads(self.qkv(x), self.num_heads)
        else:
            assert self.k_bias is not None and self.v_bias is not None, "biases come together"
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            q, k, v = _heads(linear_with(self.qkv, x, bias), self.num_heads)
        return _attend(self, q, k, v, rope)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[B, N, 3 C] as query, key and value [B, heads, N, d]."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None = None) -> Tensor:
    """What follows the projections: [B, heads, N, d] each -> [B, N, C]."""
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        q, k = (_rotate(t, rope, module.num_prefix_tokens, module.rotate_half) for t in (q, k))
    out = ops.attention(q.to(v.dtype), k.to(v.dtype), v)
    return module.proj_drop(module.proj(module.norm(out.transpose(1, 2).flatten(2))))


def _rotate(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """All but the class and register tokens."""
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2)
