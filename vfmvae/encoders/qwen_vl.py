"""The vision tower of Qwen2.5-VL (arXiv 2502.13923), through transformers (an optional package).

transformers gives the modules and their parameter names. The way of the tokens is written out here because
that library packs images into one sequence and reorders it by attention windows; here the tokens stay in
raster order, [B, N, C], and only the attention sees windows. Layer -1 is after the merger's RMSNorm
(`merger.ln_q`), on tokens not yet merged; pooled is their mean. The merger's MLP, which belongs to the
language model's side, is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.encoders.base import EncoderConfig, FrozenEncoder, Preprocessing, ViTConfig
from vfmvae.weights import check_names

OWN_PREFIX = "tower."
_WINDOW_PX = 112
_MERGE = 2  # patches that the language model later merges, per side; the image must hold whole groups
_ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class QwenFamily:
    """What the members share beyond their dimensions."""

    preprocessing: Preprocessing


class QwenEncoder(FrozenEncoder):
    """Qwen2.5-VL's vision tower; its parameters stand under `tower.` with transformers' names.

    Raises:
        ImportError: transformers is not installed.
    """

    tower: Any  # transformers' module; its attributes are not typed

    def __init__(self, config: EncoderConfig, family: QwenFamily, vit: ViTConfig) -> None:
        super().__init__(
            config,
            width=vit.width,
            depth=vit.depth,
            patch_size=vit.patch_size,
            multiple=vit.patch_size * _MERGE,
            pixels=family.preprocessing,
        )
        self.heads = vit.heads
        # Every fourth of the model ends with a block that attends to the whole image.
        self.global_blocks = {vit.depth * quarter // 4 for quarter in (1, 2, 3, 4)}
        self.window = _WINDOW_PX // vit.patch_size // _MERGE * _MERGE
        self.tower = _tower(vit)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.tower.blocks)

    def tokens(self, pixels: Tensor, wanted: set[int]) -> tuple[dict[int, Tensor], Tensor]:
        # The video kernel sees a still image as two equal frames.
        kernel = self.tower.patch_embed.proj.weight.sum(dim=2)  # [C, 3, patch, patch]
        x = F.conv2d(pixels, kernel, stride=self.patch_size)  # [B, C, h, w]
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)  # [B, N, C]
        rotary = self._rotary(grid, x.device)
        outputs = {0: x}
        for index, block in enumerate(self.tower.blocks, start=1):
            window = None if index in self.global_blocks else self.window
            x = block(x, rotary, grid, window)
            if index in wanted:
                outputs[index] = x
        x = self.tower.merger.ln_q(x)
        outputs[self.depth + 1] = x
        return {position: outputs[position] for position in wanted}, x.mean(dim=1)

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State dicts of the tower or of the whole model, whose language part is left out knowingly."""
        anchor = "patch_embed.proj.weight"
        prefix = next((name.removesuffix(anchor) for name in state if name.endswith(anchor)), "")
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        own = {name: tensor for name, tensor in own.items() if not name.startswith("merger.mlp.")}
        check_names(self.config.name, own, self.tower.state_dict())
        return {OWN_PREFIX + name: tensor for name, tensor in own.items()}

    def _rotary(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [N, head_dim] of each token's row (half of the angles) and column (other half)."""
        quarter = self.width // self.heads // 4
        frequencies = _ROTARY_BASE ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
        rows, columns = (torch.arange(count, device=device, dtype=torch.float32) for count in grid)
        angles = torch.cat(
            [
                torch.outer(rows, frequencies)[:, None].expand(-1, grid[1], -1),
                torch.outer(columns, frequencies)[None].expand(grid[0], -1, -1),
            ],
            dim=-1,
        ).flatten(0, 1)  # [N, head_dim / 2]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def _run_block(
    block: Any, x: Tensor, rotary: tuple[Tensor, Tensor], grid: tuple[int, int], window: int | None
) -> Tensor:
    """[B, N, C] -> [B, N, C]; what takes the place of the block's own forward, which has packed tokens."""
    x = x + _attend(block.attn, block.norm1(x), rotary, grid, window)
    return x + block.mlp(block.norm2(x))


def _attend(
    attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor], grid: tuple[int, int], window: int | None
) -> Tensor:
    """Attention [B, N, C] -> [B, N, C] over the whole image, or within windows of `window` a side."""
    qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
    q, k = _rotate(q, *rotary), _rotate(k, *rotary)
    out = ops.attention(q, k, v) if window is None else _windowed_attention(q, k, v, grid, window)
    return attention.proj(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, N, d] in float32, pairs lying half a head apart."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _windowed_attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Attention of [B, heads, N, d] within windows from the top left; those at the far edges may be cut.

    The cut ones are of other sizes, and computed by themselves: without zeros to fill them, or a mask.
    """
    heights, widths = (_sizes(count, window) for count in grid)
    bands = []
    for rows in zip(*(x.unflatten(2, grid).split([*heights], dim=2) for x in (q, k, v)), strict=True):
        parts = zip(*(x.split([*widths], dim=3) for x in rows), strict=True)
        height = heights[rows[0].shape[2]]
        band = [_attend_within(q, k, v, height, widths[q.shape[3]]) for q, k, v in parts]
        bands.append(torch.cat(band, dim=3))
    return torch.cat(bands, dim=2).flatten(2, 3)


def _sizes(count: int, window: int) -> dict[int, int]:
    """Of that many rows, how many belong to whole windows, and how many to cut ones; each with its size."""
    whole = count - count % window
    return {rows: size for rows, size in ((whole, window), (count - whole, count - whole)) if rows}


def _attend_within(q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
    """Attention of [B, heads, rows, columns, d] within windows of that size, which divides the whole."""
    batch, _, rows, _, _ = q.shape

    def cut(x: Tensor) -> Tensor:
        """-> [B * windows, heads, height * width, d]."""
        x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B, heads, wr, height, wc, width, d]
        return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)

    out = ops.attention(cut(q), cut(k), cut(v))
    out = out.unflatten(2, (height, width)).unflatten(0, (batch, rows // height, -1))
    return out.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)


def _tower(vit: ViTConfig) -> Any:
    """transformers' vision tower without the merger's MLP."""
    try:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel,
        )
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("transformers"):
            raise
        raise ImportError(
            'the Qwen2.5-VL encoders need the package transformers: pip install "vfmvae[qwen]"'
        ) from error
    config = Qwen2_5_VLVisionConfig(
        hidden_size=vit.width,
        depth=vit.depth,
        num_heads=vit.heads,
        patch_size=vit.patch_size,
        intermediate_size=vit.mlp_width,
        window_size=_WINDOW_PX,
        spatial_merge_size=_MERGE,
    )
    tower: Any = Qwen2_5_VisionTransformerPretrainedModel(config)
    tower.merger.mlp = nn.Identity()
    runs_raster = type("Block", (type(tower.blocks[0]),), {"forward": _run_block})
    for block in tower.blocks:
        block.__class__ = runs_raster
    return tower
