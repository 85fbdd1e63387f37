"""The configuration of a training run: composes the components' own configs, and nothing else.

A complete one comes from a recipe (vfmvae.recipes) or from a run's config.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vfmvae.serialization import from_dict, read_json
from vfmvae.tokenizer import TokenizerConfig
from vfmvae.training.optim import OptimizerConfig


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the tokenizer's loss; a term with weight 0 is not computed."""

    l1: float = 1.0
    """L1 of the reconstruction."""
    multiscale_l1: float = 0.1
    """Sum of the L1 of the five smaller images."""
    lpips: float = 0.0
    """Not yet available."""
    adversarial: float = 0.0
    """Not yet available."""
    kl: float = 1e-6
    """Divergence of a Gaussian posterior from the standard normal distribution."""
    alignment: float = 5.0
    """Alignment to the encoder's features."""
    adaptive_alignment: bool = True
    """Multiply the alignment weight by the ratio of gradient norms, reconstruction over alignment."""
    quantization: float = 1.0
    """Code and commitment loss of a discrete bottleneck."""
    entropy: float = 0.0
    """Entropy loss of a discrete bottleneck."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"losses.{name} is {value}; weights must be finite and not negative")
        if not self.l1 and not self.multiscale_l1:
            raise ValueError(
                "losses.l1 and losses.multiscale_l1 are both 0; one must ask for a reconstruction"
            )

    def check_available(self) -> None:
        """ValueError if a term is switched on that does not exist yet."""
        missing = [name for name in ("lpips", "adversarial") if getattr(self, name)]
        if missing:
            raise ValueError(
                f"losses.{' and losses.'.join(missing)}: not yet available; to train without:"
                f" {' '.join(f'--losses.{name} 0' for name in missing)}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run of a tokenizer."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: str | None = None
    """A folder of images; without one, the embedded photographs."""
    batch_size: int = 512
    """Images per step."""
    steps: int = 39063
    """Updates of the whole run; the learning rate follows the share that is done."""
    fused: bool = False
    """Fused operations instead of the plain reference."""
    device: str = "auto"
    """A torch device, or auto: CUDA where there is one, else the CPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What fusion and decoder compute in; auto: bf16 on CUDA, else fp32. Parameters are fp32 always."""
    seed: int = 0
    """Start of every random draw; on one machine and device the same seed gives the same run."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only at the end."""

    def __post_init__(self) -> None:
        lowest = {"batch_size": 1, "steps": 1, "log_every": 1, "checkpoint_every": 0, "seed": 0}
        for name, limit in lowest.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {limit}")
        if self.dtype not in ("auto", "fp32", "bf16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, fp32 or bf16")
        if self.losses.alignment and -1 not in self.tokenizer.encoder.layers:
            raise ValueError(
                f"losses.alignment compares with the encoder's last layer; tokenizer.encoder.layers"
                f" {self.tokenizer.encoder.layers} lacks -1"
            )


def check_same_run(config: TrainConfig, earlier: TrainConfig) -> None:
    """ValueError if a run that began as `earlier` cannot go on as `config`.

    The tokenizer, the batch size and the seed stay; how long, how fast and where a run trains may change.
    """
    for name in ("tokenizer", "batch_size", "seed"):
        before, now = getattr(earlier, name), getattr(config, name)
        if name == "tokenizer":  # the encoder's weights may have moved
            before, now = (replace(t, encoder=replace(t.encoder, weights=None)) for t in (before, now))
        if before != now:
            values = "" if name == "tokenizer" else f" from {before} to {now}"
            raise ValueError(f"a resumed run cannot change its {name}{values}; start a new run instead")
    if config.optimizer.betas != earlier.optimizer.betas:  # the moments that Adam kept belong to the old ones
        raise ValueError(
            f"a resumed run cannot change its optimizer.betas from {earlier.optimizer.betas} to"
            f" {config.optimizer.betas}; start a new run instead"
        )


def read_config(path: Path) -> TrainConfig:
    """A run's resolved config.json; ValueError names the file and what is wrong in it."""
    return from_dict(TrainConfig, read_json(path), str(path))
