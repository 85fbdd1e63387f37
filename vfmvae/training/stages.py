"""Stages: what a run trains, for how many images, with which losses, one after another.

A run is a list of stages; nothing in the engine knows which system a list describes. Progress is counted in
images. `StagePlan` turns images into updates and says where in the list an update lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Generic, NamedTuple, Protocol, TypeVar

from vfmvae.data.transforms import CropConfig
from vfmvae.losses.schedule import WeightSchedule
from vfmvae.serialization import check_fields
from vfmvae.tokenizer.equivariance import EquivarianceConfig
from vfmvae.training.ema import EmaConfig
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.rates import PartRate

IMAGE_TERMS = ("l1", "l2", "multiscale_l1", "perceptual", "ssim")
"""Terms that compare the reconstruction with the image."""
ADVERSARIAL_TERMS = ("adversarial", "patch_adversarial", "feature_matching")
"""Terms that a discriminator gives."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of the tokenizer's loss; a term with weight 0 is not computed."""

    l1: float = 1.0
    """L1 of the reconstruction, images in [-1, 1]."""
    l2: float = 0.0
    """Mean squared error of the reconstruction."""
    multiscale_l1: float = 0.1
    """Sum of the L1 of the five smaller images."""
    perceptual: float = 0.0
    """Distance of network features; `perceptual.network` says of which network (LPIPS by default)."""
    ssim: float = 0.0
    """1 - structural similarity."""
    kl: float = 1e-6
    """Divergence of a Gaussian posterior from the standard normal distribution, summed over the latent."""
    alignment: float = 5.0
    """Alignment of the latents to the encoder's features."""
    adaptive_alignment: bool = True
    """Multiply the alignment weight by the ratio of gradient norms, reconstruction over alignment."""
    quantization: float = 1.0
    """Code and commitment loss of a discrete bottleneck."""
    entropy: float = 0.0
    """Entropy loss of a discrete bottleneck."""
    preservation: float = 0.0
    """Squared distance of the latents' mean from that of a frozen copy made when the stage began."""
    adversarial: float = 0.0
    """Hinge loss through the projected discriminator."""
    patch_adversarial: float = 0.0
    """Least-squares loss through the multi-scale PatchGAN."""
    adaptive_adversarial: bool = False
    """Multiply these two weights by the ratio of gradient norms at the decoder's last layer, image terms over
    the two."""
    feature_matching: float = 0.0
    """L1 of the PatchGAN's features, fake to real."""
    r1: float = 0.0
    """Penalty on the projected discriminator's gradient at real images (a loss of the discriminator)."""

    def __post_init__(self) -> None:
        check_fields(self, "losses")
        for name in TERMS:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"losses.{name} is {value}; weights must be finite and not negative")
        if not any(getattr(self, name) for name in (*IMAGE_TERMS, *ADVERSARIAL_TERMS)):
            raise ValueError(
                f"no loss asks for a reconstruction; give one of losses."
                f"{{{','.join((*IMAGE_TERMS, *ADVERSARIAL_TERMS))}}} a weight"
            )
        if self.alignment and self.adaptive_alignment and not any(getattr(self, t) for t in IMAGE_TERMS):
            raise ValueError(
                f"losses.adaptive_alignment compares with the image losses; give one of"
                f" losses.{{{','.join(IMAGE_TERMS)}}} a weight, or turn it off"
            )
        if self.adaptive_adversarial:
            self._check_adaptive()
        if self.r1 and not self.adversarial:
            raise ValueError(
                f"losses.r1 is {self.r1}, which penalises the discriminator of losses.adversarial;"
                f" give that a weight too"
            )

    def _check_adaptive(self) -> None:
        if not self.adversarial and not self.patch_adversarial:
            raise ValueError(
                "losses.adaptive_adversarial balances losses.adversarial and losses.patch_adversarial; give"
                " one of them a weight"
            )
        # The smaller images do not come from the last layer.
        terms = [name for name in IMAGE_TERMS if name != "multiscale_l1"]
        if not any(getattr(self, name) for name in terms):
            raise ValueError(
                f"losses.adaptive_adversarial compares with the image losses; give one of"
                f" losses.{{{','.join(terms)}}} a weight"
            )


TERMS = tuple(f.name for f in fields(LossWeights) if not f.name.startswith("adaptive_"))


@dataclass(frozen=True)
class TermSchedule(WeightSchedule):
    """When one term of a stage is on; images are counted from the beginning of the stage."""

    term: str = "l1"
    """A name of `LossWeights`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.term not in TERMS:
            raise ValueError(
                f"a schedule names the loss {self.term!r}, which does not exist; known: {', '.join(TERMS)}"
            )


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run."""

    name: str = "train"
    images: int = 20_000_000
    """Length of the stage, in images seen."""
    trains: tuple[str, ...] = ("fusion", "bottleneck", "align", "decompress", "style", "decoder")
    """Parts that train; all others are frozen. Also "encoder", and "decoder>N": the blocks above N px."""
    losses: LossWeights = field(default_factory=LossWeights)
    schedules: tuple[TermSchedule, ...] = ()
    """Terms without one are on for the whole stage."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rates: tuple[PartRate, ...] = ()
    """Parts with a factor of the optimizer's learning rate; the others have it as it is."""
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    blur_sigma: float = 0.0
    """Blur of what the discriminators see when the stage begins, in pixels."""
    blur_images: int = 0
    """Images over which that blur fades."""

    def __post_init__(self) -> None:
        check_fields(self, "")
        if not self.name:
            raise ValueError("a stage needs a name")
        if self.images < 1:
            raise ValueError(f"stage {self.name!r}: images is {self.images}; it must be at least 1")
        if not self.trains:
            raise ValueError(f"stage {self.name!r} trains nothing; name at least one part in trains")
        if self.losses.alignment and self.losses.adaptive_alignment and "fusion" not in self.trains:
            raise ValueError(
                f"stage {self.name!r} does not train 'fusion', so losses.adaptive_alignment has no gradient"
                f" to compare; turn it off, or losses.alignment to 0"
            )
        if self.losses.adaptive_adversarial and not any(part.startswith("decoder") for part in self.trains):
            raise ValueError(
                f"stage {self.name!r} does not train the decoder's last block, so losses.adaptive_adversarial"
                f" has no gradient to compare; turn it off"
            )
        if "align" in self.trains and not self.losses.alignment:
            raise ValueError(
                f"stage {self.name!r} trains 'align', which only losses.alignment reads; give that a weight"
                f" or leave 'align' out of trains"
            )
        for schedule in self.schedules:
            if not getattr(self.losses, schedule.term):
                raise ValueError(
                    f"stage {self.name!r} has a schedule for losses.{schedule.term}, whose weight is 0; give"
                    f" it one or leave out the schedule"
                )
            if schedule.start >= self.images:
                raise ValueError(
                    f"stage {self.name!r}: losses.{schedule.term} starts after {schedule.start} images, and"
                    f" the stage has {self.images}; schedules count from the beginning of the stage"
                )
        if self.blur_sigma < 0 or self.blur_images < 0:
            raise ValueError(
                f"stage {self.name!r}: blur_sigma {self.blur_sigma} and blur_images {self.blur_images}"
                f" must not be negative"
            )
        if self.blur_sigma and not self.blur_images:
            raise ValueError(
                f"stage {self.name!r}: blur_sigma is {self.blur_sigma} and blur_images 0, so nothing would be"
                f" blurred; say over how many images the blur fades"
            )

    def weights(self, seen_images: int) -> dict[str, float]:
        """The weight of every term after `seen_images` images of this stage, without those that are 0."""
        weights = {term: getattr(self.losses, term) for term in TERMS}
        for schedule in self.schedules:
            weights[schedule.term] *= schedule.factor(seen_images)
        return {term: weight for term, weight in weights.items() if weight}


class Place(NamedTuple):
    """Where an update lies: the number of its stage, and the updates of that stage that come before it."""

    stage: int
    step: int


class Stage(Protocol):
    """What a plan asks of a stage."""

    @property
    def name(self) -> str: ...
    @property
    def images(self) -> int: ...


S = TypeVar("S", bound=Stage)


class StagePlan(Generic[S]):
    """Stages of given lengths in updates, in a row."""

    def __init__(self, stages: Sequence[S], batch_size: int, steps: int | None = None) -> None:
        """`steps`: updates in all, shared among the stages in proportion; None: as their images need."""
        self._batch_size = batch_size
        if steps is None:
            self.lengths = [math.ceil(stage.images / batch_size) for stage in stages]
        else:
            ends, total, seen = [], sum(stage.images for stage in stages), 0
            for stage in stages:
                seen += stage.images
                ends.append(round(steps * seen / total))
            self.lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        self._stages = tuple(stages)

    @property
    def steps(self) -> int:
        """Updates of all stages."""
        return sum(self.lengths)

    def locate(self, step: int) -> Place:
        """The place of update number `step` (0 for the first), or ValueError beyond the end."""
        left = step
        for number, length in enumerate(self.lengths):
            if left < length:
                return Place(number, left)
            left -= length
        raise ValueError(f"step {step} lies beyond the {self.steps} of this run")

    def stage_of(self, step: int) -> S:
        """The stage that update number `step` lies in."""
        return self._stages[self.locate(step).stage]

    def check_position(self, step: int, stage: int) -> None:
        """ValueError unless a run that did `step` updates, the last in `stage`, can go on by this plan."""
        if step > self.steps:
            raise ValueError(f"the run has done {step} steps already; --steps {self.steps} is fewer")
        planned = self.locate(max(step - 1, 0)).stage
        if planned != stage:
            names = [self._stages[number].name for number in (stage, planned)]
            raise ValueError(
                f"step {step} of the run lies in stage {names[0]!r}; by stages of"
                f" {', '.join(map(str, self.lengths))} steps it would lie in {names[1]!r}. --steps is shared"
                f" among all stages: to lengthen one, give --stages.N.images (the first is 0)"
            )

    def progress(self, place: Place) -> float:
        """The share of its stage that is done in the middle of an update."""
        return (place.step + 0.5) / self.lengths[place.stage]

    def stage_images(self, place: Place) -> int:
        """Images of its stage before an update, on the scale that the stage's configuration uses."""
        return round(self._stages[place.stage].images * place.step / self.lengths[place.stage])
