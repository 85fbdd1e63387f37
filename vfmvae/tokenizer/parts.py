"""The parts of a tokenizer that a training stage names."""

from __future__ import annotations

import re

from torch import nn

from vfmvae.tokenizer.decoder import NUM_BLOCKS
from vfmvae.tokenizer.model import Tokenizer

PARTS = ("encoder", "fusion", "bottleneck", "align", "decompress", "style", "decoder")
_ABOVE = re.compile(r"decoder>(\d+)$")


def module_names(part: str, resolution: int) -> tuple[str, ...]:
    """Names of a part's modules, in a tokenizer of this training resolution.

    `part`: a name of `PARTS`, or "decoder>N" for the decoder blocks above N px. Parts that overlap have names
    in common: no module of one lies inside a module of another. ValueError for another part, listing those
    that exist, and for N where no block is left.
    """
    blocks = [f"decoder.blocks.{number}" for number in range(NUM_BLOCKS)]
    if part in PARTS:
        return tuple(blocks) if part == "decoder" else (part,)
    above = _ABOVE.match(part)
    if above is None:
        raise ValueError(f"unknown part {part!r}; known: {', '.join(PARTS)} and 'decoder>N' (N in pixels)")
    limit = int(above[1])
    sizes = [resolution // 2 ** (NUM_BLOCKS - 1 - i) for i in range(NUM_BLOCKS)]
    found = [block for block, size in zip(blocks, sizes, strict=True) if size > limit]
    if not found:
        raise ValueError(f"no decoder block lies above {limit} px; their sizes are {sizes}")
    return tuple(found)


def part_modules(tokenizer: Tokenizer, part: str) -> list[nn.Module]:
    """The modules of a part; ValueError as `module_names`."""
    return [tokenizer.get_submodule(name) for name in module_names(part, tokenizer.config.resolution)]


def set_trained(tokenizer: Tokenizer, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Let only `parts` require gradients; returns their parameters by name, in the model's order."""
    tokenizer.requires_grad_(False)
    for part in parts:
        for module in part_modules(tokenizer, part):
            module.requires_grad_(True)
    return {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
