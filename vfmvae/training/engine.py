"""How a run computes: options that change speed, memory or precision, and nothing a run should learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vfmvae.serialization import check_fields

Compile = Literal["off", "default"]
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class ComputeConfig:
    """Speed and memory of a training step, whatever it trains."""

    accumulate: int = 1
    """Parts that every batch is computed in, one after another; the update is that of the whole batch,
    except that a discriminator's batch norm, whose groups are of 8 images, and entropy losses see a part."""
    clip_norm: float = 0.0
    """Gradients are scaled down to this norm, those of every optimizer apart; 0: not."""
    recompute: bool = False
    """Keep only the input of each block (of the decoder, of the transformer) and compute the rest again in
    the backward pass."""
    compile: Compile = "off"
    """torch.compile of the blocks of encoder, decoder and transformer."""
    parallel: Parallel = "ddp"
    """Several processes: a copy of the model in each (DDP), or its blocks sharded (FSDP2)."""
    deterministic: bool = True
    """Only operations that give the same bits every time, where they exist."""

    def __post_init__(self) -> None:
        check_fields(self, "engine")
        if self.accumulate < 1:
            raise ValueError(f"engine.accumulate is {self.accumulate}; it must be at least 1")
        if self.clip_norm < 0:
            raise ValueError(f"engine.clip_norm is {self.clip_norm}; it must not be negative")


@dataclass(frozen=True)
class EngineConfig(ComputeConfig):
    """Speed and memory of a tokenizer's training step."""

    share_forward: bool = True
    """One forward per step for discriminator and tokenizer, with the same random draws; else two, with
    draws of their own, as published. With engine.accumulate above 1 each part is computed twice against a
    discriminator: for it, and for the tokenizer."""
    adaptive_every: int = 1
    """Steps between two measurements of the adaptive weights; they stay as they are in between."""
    fp8_encoder: bool = False
    """Linear layers of the encoder in float8 (vfmvae.encoders.fp8), which changes its features a little. For
    runs whose stages do not train it, on a GPU of compute capability 8.9 or later. Models are saved with the
    weights as they were."""
    graphs: bool = False
    """Record each kind of step as a CUDA graph when it comes for the second time, and replay it from then on:
    one for each size and rotation of the equivariance regularisation. On one GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive_every < 1:
            raise ValueError(f"engine.adaptive_every is {self.adaptive_every}; it must be at least 1")
        if self.graphs and self.parallel == "fsdp":
            raise ValueError(
                "engine.graphs records where weights lie, and engine.parallel 'fsdp' gathers them anew each"
                " time; use one of the two"
            )
        if self.fp8_encoder and self.parallel == "fsdp":
            raise ValueError(
                "engine.fp8_encoder keeps the whole encoder in each process, and engine.parallel 'fsdp'"
                " shards it; use one of the two"
            )
