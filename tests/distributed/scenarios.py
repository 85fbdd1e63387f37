"""Short runs whose result must not depend on the number of processes, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tests.companions import reader
from tests.tiny_runs import ALL_LOSSES, raise_layer_scales, stage, tiny
from vfmvae.train_job import Job
from vfmvae.training.engine import EngineConfig
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.stages import LossWeights, StageConfig, TermSchedule

# No L1 and a low rate: signs that flip, and large steps, would enlarge rounding from step to step.
PLAIN = LossWeights(l1=0.0, l2=1.0, kl=1e-4, alignment=0.5)
SLOW = OptimizerConfig(learning_rate=2e-4, betas=(0.5, 0.9), eps=1e-3)
WITH_ENCODER = ("encoder", "fusion", "bottleneck", "align", "decompress", "style", "decoder")


def plain(losses: LossWeights = PLAIN, **changes: Any) -> StageConfig:
    return stage(losses, **{"optimizer": SLOW} | changes)


@dataclass(frozen=True)
class Scenario:
    """A run of `steps` updates, and how several processes compute it."""

    stages: tuple[StageConfig, ...] = (plain(),)
    batch_size: int = 4
    steps: int = 4
    engine: EngineConfig = field(default_factory=EngineConfig)
    tolerance: float = 1e-5
    """Largest difference of a parameter from that of one process."""
    companion: bool = False
    """Another model trains along."""

    def in_one_process(self) -> Scenario:
        """The same run, computed plainly; equal for scenarios that differ in how they compute."""
        engine = replace(self.engine, accumulate=1, parallel="ddp", recompute=False)
        return replace(self, engine=engine, tolerance=0.0)

    def job(self) -> Job:
        """Ready for its first step."""
        built = Job(
            tiny(stages=self.stages, batch_size=self.batch_size, steps=self.steps, engine=self.engine)
        )
        raise_layer_scales(built)
        if self.companion:
            built.add_companion("reader", reader(), 0.5, SLOW)
        built.enter_stage(0)
        return built


ALL_TRAINED = plain(replace(PLAIN, preservation=1.0), name="all", trains=WITH_ENCODER)
BEHIND = (plain(name="before"), plain(replace(PLAIN, preservation=1.0), name="kept"))
TWO_STAGES = (plain(name="frozen encoder"), ALL_TRAINED)
LATE_ALIGNMENT = (plain(schedules=(TermSchedule(term="alignment", start=500),)),)
LARGE_IMAGES = (plain(replace(PLAIN, alignment=0.0), trains=("decoder>16",)),)
GAME = (plain(replace(ALL_LOSSES, r1=0.1), discriminator_optimizer=SLOW),)

WHOLE = EngineConfig()
FSDP = EngineConfig(parallel="fsdp")
IN_PARTS = EngineConfig(accumulate=2)
FSDP_IN_PARTS = EngineConfig(parallel="fsdp", accumulate=2)


def game(batch_size: int = 16, engine: EngineConfig = WHOLE) -> Scenario:
    """All losses. The discriminators' batch norms see 8 images at a time, and enlarge the last digits."""
    return Scenario(GAME, batch_size, steps=1, engine=engine, tolerance=5e-5)


SCENARIOS = {
    "ddp": Scenario(steps=20),
    "ddp in parts, weight measured now and then": Scenario(
        engine=EngineConfig(accumulate=2, adaptive_every=2)
    ),
    "ddp, game": game(),
    "ddp, game in parts": game(32, IN_PARTS),
    "ddp, two stages": Scenario(TWO_STAGES),
    "ddp, late alignment": Scenario(LATE_ALIGNMENT),
    "ddp, part of the decoder": Scenario(LARGE_IMAGES),
    "ddp in parts, with a companion": Scenario(engine=IN_PARTS, companion=True),
    "fsdp": Scenario(steps=8, engine=FSDP),
    "fsdp in parts": Scenario(engine=FSDP_IN_PARTS),
    "fsdp, game": game(engine=FSDP),
    "fsdp, game in parts": game(32, FSDP_IN_PARTS),
    "fsdp, two stages": Scenario(TWO_STAGES, engine=FSDP),
    "fsdp, kept behind a frozen encoder": Scenario(BEHIND, engine=FSDP),
    "fsdp, recomputed and clipped": Scenario(engine=replace(FSDP, recompute=True, clip_norm=0.5)),
}
