"""What every run has, whatever it trains: where data come from, how long, how fast, what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vfmvae.data import Backend
from vfmvae.data.quarantine import check_share
from vfmvae.serialization import check_fields
from vfmvae.training.guard import SafetyConfig
from vfmvae.training.trackers import LogConfig


@dataclass(frozen=True)
class RunConfig:
    """The part of a run's configuration that the loop around the training step reads."""

    safety: SafetyConfig = field(default_factory=SafetyConfig)
    log: LogConfig = field(default_factory=LogConfig)
    data: str | None = None
    """Image folder, tar shards, saved data set or parquet (docs/data.md), scenes or shapes (drawn); if not
    given, the embedded photographs."""
    data_backend: Backend = "auto"
    """What decodes: dali, torch (Pillow in the workers), or auto: dali where it is installed and applies."""
    workers: int = 0
    """Processes per rank that read images ahead; 0: the training process reads."""
    max_broken: float = 0.001
    """Share of the images that may be unreadable: others take their places. Beyond it the run stops."""
    batch_size: int = 512
    """Images per update, over all processes."""
    steps: int | None = None
    """Updates of the whole run, shared among the stages in proportion to their images; None: as many as
    these need."""
    fused: bool = False
    """Fused operations instead of the plain reference."""
    device: str = "auto"
    """A torch device, or auto: CUDA where there is one, else the CPU."""
    threads: int | None = None
    """CPU threads of each process; None: torch's choice. Small models are fastest, and steadiest beside other
    programs, with one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What activations are computed in; auto: bf16 on CUDA, else fp32. Parameters are fp32 always."""
    seed: int = 0
    """Start of every random draw; on one machine and device the same seed gives the same run."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 0
    """Images seen between evaluations, with a picture each; 0: only at the end."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0: only at the beginning and the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        check_fields(self, "")
        lowest = {"batch_size": 1, "log_every": 1, "evaluate_every": 0, "checkpoint_every": 0, "seed": 0}
        for name, limit in {**lowest, "workers": 0, "keep_checkpoints": 1}.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {limit}")
        check_share(self.max_broken)
        for name in ("steps", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def shared_batch(batch_size: int, processes: int, accumulate: int) -> int:
    """Images that one of so many processes computes at a time; ValueError if they cannot share the batch."""
    parts = processes * accumulate
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared by {processes} processes in"
            f" {accumulate} parts (engine.accumulate); use a multiple of {parts}"
        )
    return batch_size // parts
