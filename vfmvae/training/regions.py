"""The repeated blocks of a tokenizer, and what is done to them one by one: compile, recompute, shard.

Blocks are changed in place and keep their parameters' names, so checkpoints do not know about it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from vfmvae.encoders.base import FrozenEncoder
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.decoder import DecoderBlock
from vfmvae.training.engine import Compile

COMPILED_SHAPES = 128
"""So many variants of a block's code may be compiled: the decoder's six blocks, each in four sizes, with a
graph and without, and for other batches in evaluation. Beyond its own limit of 8, torch.compile would run the
rest plainly."""


def encoder_blocks(encoder: FrozenEncoder) -> list[nn.Module]:
    """The transformer blocks of an encoder, in order."""
    return list(encoder.blocks)


def decoder_blocks(tokenizer: Tokenizer) -> list[nn.Module]:
    """The blocks of the decoder, smallest images first."""
    return list(tokenizer.decoder.blocks)


def compile_blocks(blocks: Iterable[nn.Module], mode: Compile) -> None:
    """Compile each block when it first runs, once for every shape it meets, with a graph and without."""
    if mode != "off":
        for block in blocks:
            block.compile(**_compile_options())


def recompute_blocks(blocks: Iterable[nn.Module], mode: Compile) -> None:
    """Keep only each block's input for the backward pass, which runs the block again; compiled as above."""
    for block in blocks:
        # What runs twice is compiled, not what runs it twice: checkpoint() switches torch.compile off around
        # itself, and inside of a compiled graph it fails with operations of a project's own.
        forward = block.forward if mode == "off" else torch.compile(block.forward, **_compile_options())
        block.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, forward, use_reentrant=False, preserve_rng_state=False
        )


@contextmanager
def keeping_graphs(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While entered, blocks that `recompute_blocks` has changed keep their graphs."""
    changed = [(block, block.forward) for block in blocks if isinstance(block.forward, functools.partial)]
    for block, recomputing in changed:
        block.forward = recomputing.args[0]  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, recomputing in changed:
            block.forward = recomputing  # type: ignore[method-assign]


def _compile_options() -> dict[str, Any]:
    # The adaptive alignment weight goes backward through the same graph twice, and a backward pass that was
    # compiled in a step without it would have reused the memory of what that graph keeps.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
    return {"dynamic": False}


def shard(root: nn.Module, rows: Sequence[Sequence[nn.Module]], methods: Sequence[str] = ()) -> None:
    """Shard the parameters of the blocks below `root` over all processes (FSDP2).

    A block's parameters are gathered before it runs, while the one before it still computes. All others stay
    whole: they are small. So do those that turn a decoder block's features into an image, which are used
    outside of its forward.

    Args:
        root: knows the blocks of all rows, so that they share streams and order; run what is in it through it
            alone, from the first time on.
        rows: blocks that run one after another, in order.
        methods: names of the root's other methods that run blocks.
    """
    # Images are views, and nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    sharded = [[fully_shard(block, ignored_params=_used_outside(block)) for block in row] for row in rows]
    whole = {p for p in root.parameters() if not isinstance(p, DTensor)}
    fully_shard(root, ignored_params=whole)
    for row in sharded:
        # PyTorch would prefetch in the order of the last forward, but forgets it with the first of several
        # backward passes, and would gather a frozen encoder's last block in the decoder's.
        for first in row[:1]:
            first.set_modules_to_backward_prefetch([first])
        for block, following in zip(row, row[1:], strict=False):
            block.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([block])
    for name in methods:
        register_fsdp_forward_method(root, name)


def _used_outside(block: nn.Module) -> set[nn.Parameter]:
    """Parameters that are used outside of a block's own forward."""
    return set(block.to_rgb.parameters()) if isinstance(block, DecoderBlock) else set()
