"""The parts of a tokenizer that a training stage names."""

from __future__ import annotations

import re

from torch import nn

from vfmvae.tokenizer.decoder import NUM_BLOCKS
from vfmvae.tokenizer.model import Tokenizer

PARTS = ("encoder", "fusion", "bottleneck", "align", "decompress", "style", "decoder")
_ABOVE = re.compile(r"decoder>(\d+)$")


def part_modules(tokenizer: Tokenizer, part: str) -> list[nn.Module]:
    """The modules of a part: a name of `PARTS`, or "decoder>N" for the blocks above N px at the tokenizer's
    training resolution.

    ValueError for another name, listing those that exist, and for N where no block is left.
    """
    if part in PARTS:
        return [getattr(tokenizer, part)]
    above = _ABOVE.match(part)
    if above is None:
        raise ValueError(f"unknown part {part!r}; known: {', '.join(PARTS)} and 'decoder>N' (N in pixels)")
    limit, resolution = int(above[1]), tokenizer.config.resolution
    sizes = [resolution // 2 ** (NUM_BLOCKS - 1 - i) for i in range(NUM_BLOCKS)]
    blocks = [block for block, size in zip(tokenizer.decoder.blocks, sizes, strict=True) if size > limit]
    if not blocks:
        raise ValueError(f"no decoder block lies above {limit} px; their sizes are {sizes}")
    return blocks


def set_trained(tokenizer: Tokenizer, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Let only `parts` require gradients; returns their parameters by name, in the model's order."""
    tokenizer.requires_grad_(False)
    for part in parts:
        for module in part_modules(tokenizer, part):
            module.requires_grad_(True)
    return {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
