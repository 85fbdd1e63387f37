"""The configuration of a training run: composes the components' own configs, and nothing else.

A complete one comes from a recipe (vfmvae.recipes) or from a run's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vfmvae.serialization import from_dict, read_json
from vfmvae.tokenizer import TokenizerConfig
from vfmvae.training.optim import OptimizerConfig


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the tokenizer's loss; a term with weight 0 is not computed."""

    l1: float = 1.0
    multiscale_l1: float = 0.1
    """L1 of the five smaller images."""
    lpips: float = 0.0
    """Not yet available."""
    adversarial: float = 0.0
    """Not yet available."""
    kl: float = 1e-6
    alignment: float = 5.0
    """Alignment to the encoder's features."""
    adaptive_alignment: bool = True
    """Multiply the alignment weight by the ratio of gradient norms, reconstruction over alignment."""
    quantization: float = 1.0
    """Code and commitment loss of a discrete bottleneck."""
    entropy: float = 0.0
    """Entropy loss of a discrete bottleneck."""

    def __post_init__(self) -> None:
        negative = [name for name, value in vars(self).items() if value < 0]
        if negative:
            raise ValueError(
                f"losses.{negative[0]} is {getattr(self, negative[0])}; weights must not be negative"
            )

    def unavailable(self) -> list[str]:
        """Terms that are switched on and do not exist yet."""
        return [name for name in ("lpips", "adversarial") if getattr(self, name)]


@dataclass(frozen=True)
class TrainConfig:
    """One training run of a tokenizer."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: str | None = None
    """A folder of images; without one, the embedded photographs."""
    batch_size: int = 512
    steps: int = 39063
    fused: bool = False
    """Fused operations instead of the plain reference."""
    device: str = "auto"
    """A torch device, or auto: CUDA where there is one, else the CPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What fusion and decoder compute in; auto: bf16 on CUDA, else fp32. Parameters are fp32 always."""
    seed: int = 0
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only at the end."""

    def __post_init__(self) -> None:
        for name, lowest in (
            ("batch_size", 1),
            ("steps", 1),
            ("log_every", 1),
            ("checkpoint_every", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        if self.losses.alignment and -1 not in self.tokenizer.encoder.layers:
            raise ValueError(
                f"losses.alignment compares with the encoder's last layer; tokenizer.encoder.layers"
                f" {self.tokenizer.encoder.layers} lacks -1"
            )
        if self.dtype not in ("auto", "fp32", "bf16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, fp32 or bf16")


def read_config(path: Path) -> TrainConfig:
    """A run's resolved config.json; ValueError names the file and what is wrong in it."""
    return from_dict(TrainConfig, read_json(path), str(path))
