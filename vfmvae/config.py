"""The configuration of a training run: composes the components' own configs, and nothing else.

A complete one comes from a recipe (vfmvae.recipes) or from a run's config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vfmvae.discriminators import ProjectedDiscriminatorConfig
from vfmvae.discriminators.layers import GROUP_SIZE, group_count
from vfmvae.losses.perceptual import PerceptualName
from vfmvae.serialization import from_dict, read_json
from vfmvae.tokenizer import TokenizerConfig
from vfmvae.tokenizer.decoder import INPUT_STRIDE
from vfmvae.tokenizer.equivariance import check_equivariance
from vfmvae.training.adversary import TERMS_OF
from vfmvae.training.engine import EngineConfig
from vfmvae.training.joint import JointConfig
from vfmvae.training.rates import check_parts
from vfmvae.training.run_config import RunConfig, shared_batch
from vfmvae.training.stages import ADVERSARIAL_TERMS, LossWeights, StageConfig, StagePlan


@dataclass(frozen=True)
class PerceptualConfig:
    """The network of the perceptual loss, and of the perceptual distance that evaluation reports."""

    network: PerceptualName = "lpips-vgg"
    weights: str | None = None
    """A file or folder; without one, the usual source (for LPIPS: torch's cache, then the hub)."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One training run of a tokenizer."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    initial: str | None = None
    """A saved tokenizer, a training run or a hub id whose weights, the encoder's too, training begins with;
    its architecture replaces a recipe's. If not given: random weights behind a pretrained encoder."""
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    discriminator: ProjectedDiscriminatorConfig = field(default_factory=ProjectedDiscriminatorConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    joint: JointConfig | None = None
    """A diffusion transformer that trains along, end to end (REPA-E); None: the tokenizer alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise ValueError("stages is empty; a run needs at least one")
        if self.joint is not None:
            self._check_joint(self.joint)
        for stage in self.stages:
            self._check_stage(stage)

    def _check_joint(self, joint: JointConfig) -> None:
        model, tokenizer = joint.model, self.tokenizer
        side = tokenizer.resolution // tokenizer.downsample
        latents, needed = (tokenizer.latent_channels, side), (model.channels, model.latent_size)
        if latents != needed:
            raise ValueError(
                f"the tokenizer's latents have {latents[0]} channels on a side of {latents[1]}, and"
                f" joint.model takes {needed[0]} on {needed[1]} (channels, latent_size); make them equal"
            )
        if -1 not in tokenizer.encoder.layers:
            raise ValueError(
                f"joint aligns with the encoder's last layer; tokenizer.encoder.layers"
                f" {tokenizer.encoder.layers} lacks -1"
            )
        changing = [s.name for s in self.stages if s.equivariance.image_probability]
        if changing:
            raise ValueError(
                f"joint.model takes latents of one size, and stage {changing[0]!r} shrinks images"
                f" (equivariance.image_probability); turn that off"
            )
        if self.engine.parallel == "fsdp":
            raise ValueError("joint.model is not sharded: use engine.parallel 'ddp' with it")

    def _check_stage(self, stage: StageConfig) -> None:
        gaussian = self.tokenizer.bottleneck.kind != "discrete"
        if gaussian and set(stage.trains) == {"bottleneck"}:
            raise ValueError(
                f"stage {stage.name!r} trains 'bottleneck' alone, and a Gaussian one has no parameters; name"
                f" another part in trains"
            )
        if stage.losses.alignment and -1 not in self.tokenizer.encoder.layers:
            raise ValueError(
                f"stage {stage.name!r}: losses.alignment compares with the encoder's last layer;"
                f" tokenizer.encoder.layers {self.tokenizer.encoder.layers} lacks -1"
            )
        if self.engine.fp8_encoder and "encoder" in stage.trains:
            raise ValueError(
                f"stage {stage.name!r} trains 'encoder', and engine.fp8_encoder is for frozen ones; turn"
                f" it off"
            )
        changing = stage.equivariance.latent_probability or stage.equivariance.image_probability
        if self.engine.graphs and not self.engine.share_forward and changing:
            raise ValueError(
                f"stage {stage.name!r} has equivariance, and without engine.share_forward a step draws it"
                f" twice: engine.graphs would record a graph for every pair; turn one of the three off"
            )
        resolution = self.tokenizer.resolution
        try:
            check_equivariance(stage.equivariance, resolution, INPUT_STRIDE)
            check_parts(stage.trains, stage.rates, resolution)
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}: {error}") from None
        self._check_accumulation(stage)

    def _check_accumulation(self, stage: StageConfig) -> None:
        """Losses with an adaptive weight are kept apart while parts are accumulated; shards cannot be."""
        engine, losses = self.engine, stage.losses
        if engine.parallel != "fsdp" or engine.accumulate == 1:
            return
        if losses.alignment and losses.adaptive_alignment and "encoder" in stage.trains:
            raise ValueError(
                f"stage {stage.name!r} trains 'encoder', so losses.adaptive_alignment cannot be measured with"
                f" engine.accumulate {engine.accumulate} and engine.parallel fsdp; use engine.accumulate 1 or"
                f" engine.parallel ddp"
            )
        if losses.adaptive_adversarial:
            raise ValueError(
                f"stage {stage.name!r} has losses.adaptive_adversarial, which cannot be measured with"
                f" engine.accumulate {engine.accumulate} and engine.parallel fsdp; use engine.accumulate 1 or"
                f" engine.parallel ddp"
            )

    def images_at_once(self, processes: int = 1) -> int:
        """Images that one of so many processes computes at a time.

        Raises ValueError for a batch that cannot be shared like that.
        """
        images = shared_batch(self.batch_size, processes, self.engine.accumulate)
        if any(getattr(stage.losses, term) for stage in self.stages for term in ADVERSARIAL_TERMS):
            group_count(images)  # found now, not when the stage begins
        return images

    def warnings(self, processes: int = 1) -> list[str]:
        """Without effect, or computed otherwise than for the whole batch at once, which may be meant."""
        return [*self._without_effect(), *self._other_groups(processes)]

    def _without_effect(self) -> Iterator[str]:
        kind = self.tokenizer.bottleneck.kind
        absent = ("kl",) if kind == "discrete" else ("quantization", "entropy")
        for stage, updates in zip(self.stages, self.plan().lengths, strict=True):
            for term in absent:
                weight = getattr(stage.losses, term)
                if weight and weight != getattr(LossWeights(), term):
                    yield (
                        f"stage {stage.name!r}: losses.{term} is {weight:g}, and a {kind} bottleneck has none"
                    )
            if stage.blur_sigma and not any(getattr(stage.losses, term) for term in ADVERSARIAL_TERMS):
                yield (
                    f"stage {stage.name!r}: blur_sigma is {stage.blur_sigma:g}, and there is no discriminator"
                    f" to blur images for"
                )
            if not updates:
                yield (
                    f"stage {stage.name!r} gets no update: its {stage.images:,} images are too few of"
                    f" --steps {self.steps}"
                )

    def _other_groups(self, processes: int) -> list[str]:
        adversarial = any(getattr(s.losses, term) for s in self.stages for term in ADVERSARIAL_TERMS)
        at_once = self.images_at_once(processes)
        if not adversarial or at_once == self.batch_size:
            return []
        group = at_once // group_count(at_once)
        try:
            whole = self.batch_size // group_count(self.batch_size)
        except ValueError:  # of a whole batch there would be no equal groups
            whole = GROUP_SIZE
        if group == whole:
            return []
        return [
            f"discriminators normalise over groups of {group} images, as {at_once} are computed at once, and"
            f" not over {whole}: adversarial losses differ from those of the whole batch"
        ]

    def plan(self) -> StagePlan[StageConfig]:
        """The stages in updates."""
        return StagePlan(self.stages, self.batch_size, self.steps)


def check_same_run(config: TrainConfig, earlier: TrainConfig) -> None:
    """ValueError if a run that began as `earlier` cannot go on as `config`.

    What it learns and from what stays; how long, how fast and where it trains may change.
    """
    for name in ("tokenizer", "discriminator", "perceptual", "data", "batch_size", "seed"):
        before, now = (_without_paths(getattr(c, name)) for c in (earlier, config))
        if before != now:
            values = f" from {before} to {now}" if isinstance(now, int | str | None) else ""
            raise ValueError(f"a resumed run cannot change its {name}{values}; start a new run instead")
    if (config.initial is None) != (earlier.initial is None):
        raise ValueError(
            f"a resumed run cannot change its initial from {earlier.initial} to {config.initial}; start a new"
            f" run instead"
        )
    models = [None if c.joint is None else c.joint.model for c in (earlier, config)]
    if models[0] != models[1]:
        raise ValueError(
            "a resumed run cannot change its diffusion transformer (joint.model); start a new run instead"
        )
    _check_same_stages(config.stages, earlier.stages)


def _check_same_stages(stages: Sequence[StageConfig], earlier: Sequence[StageConfig]) -> None:
    """The stages' names, parts and optimizers stay: checkpoints hold the optimizers' moments."""
    if [s.name for s in stages] != [s.name for s in earlier]:
        raise ValueError(
            f"a resumed run cannot change its stages from {', '.join(s.name for s in earlier)} to"
            f" {', '.join(s.name for s in stages)}; start a new run instead"
        )
    for stage, before in zip(stages, earlier, strict=True):
        for name, terms in {**TERMS_OF, "preservation": ("preservation",)}.items():
            on = [any(getattr(s.losses, term) for term in terms) for s in (before, stage)]
            if on[0] != on[1]:
                raise ValueError(
                    f"a resumed run cannot turn {' and '.join(f'losses.{t}' for t in terms)}"
                    f" {'on' if on[1] else 'off'} in its stage {stage.name!r}, since checkpoints hold what"
                    f" {name!r} needs; start a new run instead"
                )
        pairs = [("trains", stage.trains, before.trains)]
        for name in ("optimizer", "discriminator_optimizer"):
            now, then = getattr(stage, name), getattr(before, name)
            for what in ("kind", "betas", "implementation"):
                pairs.append((f"{name}.{what}", getattr(now, what), getattr(then, what)))
        for what, a, b in pairs:
            if a != b and not {a, b} <= {"torch", "triton"}:  # whose state is the same
                raise ValueError(
                    f"a resumed run cannot change {what} of its stage {stage.name!r} from {b} to {a};"
                    f" start a new run instead"
                )


def _without_paths(part: object) -> object:
    """A component's config without the place of its weights, which may have moved."""
    if isinstance(part, TokenizerConfig):
        return replace(part, encoder=replace(part.encoder, weights=None))
    if isinstance(part, ProjectedDiscriminatorConfig | PerceptualConfig):
        return replace(part, weights=None)
    return part


def read_config(path: Path) -> TrainConfig:
    """A run's resolved config.json; ValueError names the file and what is wrong in it."""
    return from_dict(TrainConfig, read_json(path), str(path))
