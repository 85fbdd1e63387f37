"""The configuration of a diffusion run: composes the components' own configs, and nothing else.

A complete one comes from a recipe (vfmvae.recipes) or from a run's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from vfmvae.diffusion.config import TransformerConfig
from vfmvae.diffusion.sampling import Sampling
from vfmvae.encoders import EncoderConfig
from vfmvae.serialization import check_fields, from_dict, read_json
from vfmvae.training.diffusion_stage import DiffusionStageConfig
from vfmvae.training.engine import ComputeConfig
from vfmvae.training.run_config import RunConfig, shared_batch
from vfmvae.training.stages import StagePlan


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation draws and measures, with the averaged weights."""

    count: int = 16
    """Samples in the picture, of classes spread over all."""
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=50))
    images: int = 256
    """Whose losses are measured, always at the same times and noise."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        for name in ("count", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class DiffusionConfig(RunConfig):
    """One training run of a diffusion transformer: on latents of a folder, or on images as they are read."""

    diffusion: TransformerConfig = field(default_factory=TransformerConfig)
    stages: tuple[DiffusionStageConfig, ...] = (DiffusionStageConfig(),)
    engine: ComputeConfig = field(default_factory=lambda: ComputeConfig(clip_norm=1.0))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    data: str | None = None
    """Image folder, tar shards, saved data set or parquet (docs/data.md), scenes or shapes (drawn)."""
    latents: str | None = None
    """A folder that `vfmvae encode` has written; instead of data."""
    tokenizer: str | None = None
    """A saved tokenizer, a training run or a hub id. With data: what makes latents of images; without one
    the model learns the pixels themselves. With latents: what the pictures are decoded with."""
    encoder: EncoderConfig | None = None
    """The frozen encoder that losses.alignment and a class token come from, which sees the images of data;
    if not given, the tokenizer's own, or what the folder of latents holds."""
    initial: str | None = None
    """A saved diffusion model that training begins with; if not given, random weights."""
    verify_latents: bool = True
    """Compare the checksums of the latents before the first step, which reads all of them."""
    statistics_images: int = 10_000
    """With data: how many images' latents give the mean and deviation of each channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise ValueError("stages is empty; a run needs at least one")
        if (self.latents is None) == (self.data is None):
            if self.data is None:
                raise ValueError(
                    "neither latents nor data is given: name a folder of latents (vfmvae encode makes them),"
                    " or a data set"
                )
            raise ValueError(
                f"latents ({self.latents}) and data ({self.data}) are both given; take away the recipe's with"
                f" --data None or --latents None"
            )
        if self.latents is not None and self.encoder is not None:
            raise ValueError(
                "encoder sees images, and latents come without them; encode with --tokens, or give data"
            )
        if self.statistics_images < 2:
            raise ValueError(f"statistics_images is {self.statistics_images}; it must be at least 2")
        for stage in self.stages:
            self._check_stage(stage)

    def check_sampler(self) -> None:
        """ValueError where pictures would be made by the SDE of another path than the model's."""
        cosine = [stage.name for stage in self.stages if stage.path == "cosine"]
        if cosine and self.evaluation.sampling.sampler == "sde":
            raise ValueError(
                f"evaluation.sampling.sampler sde is for the linear path, and stage {cosine[0]!r} learns the"
                f" cosine path; take heun"
            )

    def _check_stage(self, stage: DiffusionStageConfig) -> None:
        model, losses = self.diffusion, stage.losses
        if losses.alignment and not model.alignment_widths:
            raise ValueError(
                f"stage {stage.name!r} has losses.alignment, and the model no projector; give"
                f" diffusion.alignment_widths the width of the encoder"
            )
        if losses.alignment and model.class_token_width not in (None, *model.alignment_widths):
            raise ValueError(
                f"stage {stage.name!r} has losses.alignment, which compares the class token too; make"
                f" diffusion.class_token_width {model.class_token_width} equal to diffusion.alignment_widths"
                f" {model.alignment_widths}"
            )
        if bool(losses.class_token) != (model.class_token_width is not None):
            has = "no" if model.class_token_width is None else "a"
            raise ValueError(
                f"stage {stage.name!r} has losses.class_token {losses.class_token:g}, and the model {has}"
                f" class token (diffusion.class_token_width); these go together"
            )
        if losses.alignment and self.data is not None and self.tokenizer is None and self.encoder is None:
            raise ValueError(
                f"stage {stage.name!r} has losses.alignment, and nothing gives features; name an encoder"
                f" (--encoder.name), or a tokenizer (--tokenizer), whose encoder is used"
            )

    @property
    def needs_features(self) -> bool:
        """Whether some stage compares with an encoder's tokens."""
        return any(stage.losses.alignment for stage in self.stages)

    def images_at_once(self, processes: int = 1) -> int:
        """Images that one of so many processes computes at a time; ValueError where they cannot."""
        return shared_batch(self.batch_size, processes, self.engine.accumulate)

    def plan(self) -> StagePlan[DiffusionStageConfig]:
        """The stages in updates."""
        return StagePlan(self.stages, self.batch_size, self.steps)


def check_same_diffusion(config: DiffusionConfig, earlier: DiffusionConfig) -> None:
    """ValueError if a run that began as `earlier` cannot go on as `config`.

    What it learns and from what stays; how long, how fast and where it trains may change. Latents and a
    tokenizer may lie elsewhere: the job compares what they hold.
    """
    for name in ("diffusion", "data", "latents", "tokenizer", "encoder", "batch_size", "seed"):
        before, now = (_portable(getattr(c, name)) for c in (earlier, config))
        moved = name in ("latents", "tokenizer") and before is not None and now is not None
        only_decodes = name == "tokenizer" and config.latents is not None
        if before != now and not moved and not only_decodes:
            values = f" from {before} to {now}" if isinstance(now, int | str | None) else ""
            raise ValueError(f"a resumed run cannot change its {name}{values}; start a new run instead")
    names = [[stage.name for stage in c.stages] for c in (earlier, config)]
    if names[0] != names[1]:
        raise ValueError(
            f"a resumed run cannot change its stages from {', '.join(names[0])} to {', '.join(names[1])};"
            f" start a new run instead"
        )
    for stage, before in zip(config.stages, earlier.stages, strict=True):
        if stage.path != before.path:
            raise ValueError(
                f"a resumed run cannot change path of its stage {stage.name!r} from {before.path} to"
                f" {stage.path}; start a new run instead"
            )
        for what in ("kind", "betas", "implementation"):
            now, then = getattr(stage.optimizer, what), getattr(before.optimizer, what)
            if now != then and not {now, then} <= {"torch", "triton"}:  # whose state is the same
                raise ValueError(
                    f"a resumed run cannot change optimizer.{what} of its stage {stage.name!r} from {then} to"
                    f" {now}; start a new run instead"
                )


def _portable(part: object) -> object:
    """An encoder's config without the place of its weights, which may have moved."""
    return replace(part, weights=None) if isinstance(part, EncoderConfig) else part


def read_diffusion_config(path: Path) -> DiffusionConfig:
    """A run's resolved config.json; ValueError names the file and what is wrong in it."""
    return from_dict(DiffusionConfig, read_json(path), str(path))
