"""What a diffusion configuration becomes on a device: the model, its average, the present stage."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict

import torch
from torch import Tensor, nn

from vfmvae.data import Fault
from vfmvae.diffusion import DiffusionTransformer
from vfmvae.diffusion.files import load_transformer, tokenizer_hash_of
from vfmvae.diffusion_config import DiffusionConfig
from vfmvae.diffusion_inputs import Source, open_source
from vfmvae.model_files import find_model
from vfmvae.training.averaging_adam import AveragingAdam
from vfmvae.training.device import compute_dtype, keep_freed_memory, run_device, set_precision
from vfmvae.training.diffusion_forward import DiffusionForward
from vfmvae.training.diffusion_stage import DiffusionStageConfig
from vfmvae.training.distributed import rank, world_size
from vfmvae.training.draws import StepDraws
from vfmvae.training.ema import EMA, ema_beta
from vfmvae.training.guard import StepGuard
from vfmvae.training.job import DataIdentity
from vfmvae.training.optim import check_available, learning_rate, next_optimizer, set_learning_rate
from vfmvae.training.reduction import replicated
from vfmvae.training.regions import compile_blocks, recompute_blocks, shard
from vfmvae.training.state import TrainingState

TRAINING, ENCODING, EVALUATION = range(3)
"""Streams of random draws: of the loss, of latents that are drawn from posteriors, of evaluations."""


class DiffusionJob:
    """One run in this process; see `vfmvae.training.run.Job` for what the loop asks of it.

    After building, `enter_stage` makes the first stage the present one.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        config.check_sampler()
        self.config = config
        self.device = run_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        set_precision(deterministic=config.engine.deterministic)
        keep_freed_memory()
        for stage in config.stages:
            check_available(stage.optimizer, self.device)
        self.plan = config.plan()
        self.part_size = config.images_at_once(world_size())
        self.dtype = compute_dtype(config.dtype, self.device)
        self.source: Source = open_source(config, self.device, self.dtype)
        self.faults = self.source.faults()
        self.transformer = self._build()
        self.forward = DiffusionForward(self.transformer)
        self._arrange_blocks()
        self.model: nn.Module = self.forward  # as a step calls it
        self.ema = EMA(self.transformer)
        self.guard = StepGuard(config.safety, self.device, scaled=self.dtype == torch.float16)
        self.parameters = list(self.transformer.parameters())
        self.stage: DiffusionStageConfig = config.stages[0]
        self.optimizer: torch.optim.Optimizer | None = None
        self.state = TrainingState(
            modules={"transformer": self.transformer},
            optimizers={},
            others={"ema": self.ema, "guard": self.guard},
        )
        if config.engine.parallel == "ddp":
            self.model = replicated(self.forward, self.device)
        self.reducer = self.model if config.engine.parallel == "ddp" else self.transformer

    # Building

    def _build(self) -> DiffusionTransformer:
        config = self.config
        if config.initial is not None:
            model = load_transformer(config.initial, self.device, config.fused)
            ours, theirs = asdict(config.diffusion), asdict(model.config)
            for name in ours:
                if ours[name] != theirs[name]:
                    raise ValueError(
                        f"the model in {config.initial} has diffusion.{name} {theirs[name]}, and this run"
                        f" {ours[name]}; give it the same options, or leave initial out"
                    )
        else:
            torch.manual_seed(config.seed)
            model = DiffusionTransformer(config.diffusion, config.fused).to(self.device)
        model.compute_dtype = self.dtype
        return model.train()

    def _arrange_blocks(self) -> None:
        """Shard, recompute and compile as the engine's options say."""
        engine, blocks = self.config.engine, list(self.transformer.blocks)
        if engine.parallel == "fsdp" and world_size() > 1:
            shard(self.transformer, [blocks])
        if engine.recompute:
            recompute_blocks(blocks, engine.compile)
        else:
            compile_blocks(blocks, engine.compile)

    def take_statistics(self) -> None:
        """Give the model the statistics of the latents, or hold those that it has to them.

        Goes after a checkpoint is loaded, whose model knows them; a collective. An initial model keeps its
        own, which published ones state in round numbers.
        """
        model, known = self.transformer, self.state.numbers.get("statistics", False)
        began = known or self.config.initial is not None
        if self.config.latents is None and (known or self._same_tokenizer()):
            self.state.numbers["statistics"] = True
            return  # measured on images when this run, or that of the first weights, began
        mean, std = (x.to(self.device) for x in self.source.statistics())
        if not began:
            model.latents_mean.copy_(mean)
            model.latents_std.copy_(std)
            self.ema.update(1.0)  # buffers are copied
        elif not _alike(model, mean, std, *((1e-3, 1e-3) if self.config.initial is None else LOOSELY)):
            whose = "the run's checkpoint" if known else f"initial {self.config.initial}"
            remedy = "start a new run" if known else "leave initial out"
            raise ValueError(
                f"the latents of {self.source.name} have other statistics than those that {whose} was trained"
                f" on; give the same latents and tokenizer, or {remedy}"
            )
        self.state.numbers["statistics"] = True

    def _same_tokenizer(self) -> bool:
        """Whether the initial model is known to be of this tokenizer's latents."""
        if self.config.initial is None:
            return False
        known = tokenizer_hash_of(find_model(self.config.initial))
        return known is not None and known == self.source.tokenizer_hash

    def check_tokenizer(self) -> None:
        """ValueError where the latents are those of another tokenizer than before."""
        now, before = self.source.tokenizer_hash, self.state.numbers.get("tokenizer")
        if before is None and self.config.initial is not None:
            before = tokenizer_hash_of(find_model(self.config.initial))
        if before is not None and now is not None and now != before:
            raise ValueError(
                f"the latents of {self.source.name} are those of another tokenizer ({now[:12]}) than those"
                f" that the run, or its initial model, began with ({before[:12]}); give the same, or start a"
                f" new run"
            )
        if now is not None:
            self.state.numbers["tokenizer"] = now

    # Stages

    @property
    def steps(self) -> int:
        return self.plan.steps

    @property
    def stage_name(self) -> str:
        return self.stage.name

    @property
    def images(self) -> int:
        return self.source.images

    def data_identity(self) -> DataIdentity | None:
        return self.source.identity()

    def take_faults(self) -> list[Fault]:
        faults, self.faults = self.faults, []
        return faults

    def enter_stage(self, number: int) -> None:
        """Make a stage the present one: its losses, times and optimizer, which keeps its moments."""
        stage = self.config.stages[number]
        self.optimizer = next_optimizer(stage.optimizer, self.parameters, self.optimizer)
        if isinstance(self.optimizer, AveragingAdam):
            averages = self.ema.of_parameters()
            self.optimizer.follow({parameter: averages[parameter] for parameter in self.parameters})
        self.state.optimizers["transformer"] = self.optimizer
        self.guard.begin_stage()
        self.stage = stage
        self.state.numbers["stage"] = number

    def check_position(self, step: int, stage: int) -> None:
        """ValueError unless a run that did `step` updates, the last in `stage`, can go on by this plan."""
        self.plan.check_position(step, stage)

    def begin_step(self) -> dict[str, float]:
        """Go to the stage and the learning rate of the present step; returns the rate by name."""
        place = self.plan.locate(self.state.step)
        if place.stage != self.state.numbers["stage"]:
            self.enter_stage(place.stage)
        assert self.optimizer is not None
        rate = learning_rate(self.stage.optimizer, self.plan.progress(place))
        set_learning_rate(self.optimizer, rate)
        if isinstance(self.optimizer, AveragingAdam):
            self.optimizer.set_average_weight(1 - self.ema_beta())
        return {"transformer": rate}

    # What a step asks for

    def batches(self, start: int) -> Generator[list, None, None]:
        """This process's part of every step's batch from `start` on, in parts to accumulate."""
        accumulate = self.config.engine.accumulate
        numbers = (
            (step * world_size() + rank()) * accumulate + part
            for step in range(start, self.plan.steps)
            for part in range(accumulate)
        )
        with closing(self.source.batches(numbers, self.part_size)) as loaded:
            for first in loaded:
                parts = [first, *(next(loaded) for _ in range(accumulate - 1))]
                self.faults += [fault for part in parts for fault in part.get("faults", ())]
                yield parts

    def draws(self, part: int, stream: int) -> StepDraws:
        """Random numbers of this step for one of this process's parts."""
        # After a rollback the same numbers would lead to the same trouble.
        seed = self.config.seed + 1_000_003 * self.state.numbers.get("rollbacks", 0)
        first = (rank() * self.config.engine.accumulate + part) * self.part_size
        return StepDraws(
            seed, self.state.step, self.device, first, self.part_size, self.config.batch_size, stream
        )

    def ema_beta(self) -> float:
        """Share of the averaged weights that the present step keeps."""
        return ema_beta(self.stage.ema, self.config.batch_size, self.state.step * self.config.batch_size)

    def average(self) -> None:
        """Move the averaged weights towards the present ones, as far as the optimizer has not done it."""
        moved = self.optimizer.averaged if isinstance(self.optimizer, AveragingAdam) else ()
        self.ema.update(self.ema_beta(), moved)

    def skips_in_a_row(self) -> int:
        return int(self.guard.in_a_row.item())


LOOSELY = 0.5, 1.0
"""Latents of an initial model: a mean within half a deviation, and a deviation within a factor of two."""


def _alike(model: DiffusionTransformer, mean: Tensor, std: Tensor, of_mean: float, of_std: float) -> bool:
    """Whether latents have the model's statistics: means within a share of the deviation, and deviations
    within a factor of 1 + `of_std`. Rounding of latents may change both a little.
    """
    ratio = std / model.latents_std
    means = (model.latents_mean - mean).abs() <= of_mean * model.latents_std
    return bool((means & (ratio <= 1 + of_std) & (ratio >= 1 / (1 + of_std))).all())
