"""The repeated blocks of a tokenizer, and what is done to them one by one: compile, recompute, shard.

Blocks are changed in place and keep their parameters' names, so checkpoints do not know about it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from vfmvae.encoders.base import FrozenEncoder
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.decoder import DecoderBlock
from vfmvae.training.engine import Compile


def encoder_blocks(encoder: FrozenEncoder) -> list[nn.Module]:
    """The transformer blocks of an encoder, in order."""
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == encoder.depth:
            return list(module)
    return []


def decoder_blocks(tokenizer: Tokenizer) -> list[nn.Module]:
    """The blocks of the decoder, smallest images first."""
    return list(tokenizer.decoder.blocks)


def compile_blocks(blocks: Iterable[nn.Module], mode: Compile) -> None:
    """Compile each block when it first runs, once for every shape it meets.

    "cuda-graphs" records a CUDA graph for each shape, so each image size of the equivariance regularisation
    gets its own.
    """
    for block in blocks:
        if mode == "default":
            block.compile(dynamic=False)
        elif mode == "cuda-graphs":
            block.compile(dynamic=False, mode="reduce-overhead")


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep only each block's input for the backward pass, which runs the block again."""
    for block in blocks:
        block.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def shard_blocks(blocks: Iterable[nn.Module]) -> None:
    """Shard each block's parameters over all processes (FSDP2); gathered while the block runs.

    Those that turn a decoder block's features into an image stay whole: they are used outside of its forward.
    """
    for block in blocks:
        outside = set(block.to_rgb.parameters()) if isinstance(block, DecoderBlock) else set()
        fully_shard(block, reshard_after_forward=True, ignored_params=outside)
