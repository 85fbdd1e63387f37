"""What a training configuration becomes on a device: models, optimizers, averages, the present stage."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager

import torch
from torch import Tensor, nn

from vfmvae.config import TrainConfig
from vfmvae.data import Fault, Images, Request, choose_backend, load_batches, open_data
from vfmvae.discriminators.blur import Blur, blur_sigma, reach_of
from vfmvae.images import to_unit
from vfmvae.losses.schedule import WeightSchedule
from vfmvae.model_files import weights_hash
from vfmvae.tokenizer.parts import set_trained
from vfmvae.train_networks import (
    build_forward,
    build_games,
    build_joint,
    build_perceptual,
    evaluation_distances,
    never_trained,
    take_snapshot,
)
from vfmvae.training.adaptive import BALANCED_TERMS, LIMITS, AdaptiveWeight, Balanced
from vfmvae.training.adversary import TERMS_OF, Adversary
from vfmvae.training.averaging_adam import AveragingAdam
from vfmvae.training.companion import NO_AVERAGE, Companion
from vfmvae.training.companion import check_new as check_companion
from vfmvae.training.device import compute_dtype, keep_freed_memory, run_device, set_precision
from vfmvae.training.distributed import first_rank_first, mean_over_ranks, rank, world_size
from vfmvae.training.draws import StandingDraws, StepDraws
from vfmvae.training.ema import EMA, EmaConfig, ema_beta
from vfmvae.training.evaluation import HELD_OUT_IMAGES, Evaluation, evaluate
from vfmvae.training.forward import Snapshot
from vfmvae.training.guard import BufferGuard, StepGuard
from vfmvae.training.job import DataIdentity
from vfmvae.training.joint import NAME as JOINT
from vfmvae.training.joint import check_classes
from vfmvae.training.objective import Weights
from vfmvae.training.optim import (
    OptimizerConfig,
    build_optimizer,
    check_available,
    learning_rate,
    next_optimizer,
    set_learning_rate,
)
from vfmvae.training.rates import parameter_groups
from vfmvae.training.recording import StandingInputs, check_recordable
from vfmvae.training.reduction import reducing, replicated
from vfmvae.training.stages import TERMS, Place, StageConfig
from vfmvae.training.state import TrainingState

REPORTED = (
    *TERMS,
    "total",
    "gradient_norm",
    *(f"{n}_factor" for n in LIMITS),
    *(f"discriminator_{n}" for n in TERMS_OF),
)
"""Names of what a step reports; a companion needs one of its own."""
ALWAYS = WeightSchedule()


class Job:
    """One run in this process: the models, what trains them, and where the run is.

    `state` is what checkpoints hold. After building, `enter_stage` makes the first stage the present one.
    """

    def __init__(self, config: TrainConfig, pretrained: bool = True) -> None:
        """Open the data and build the models, randomly initialised; ValueError for what is not there.

        `pretrained`: False gives frozen networks random values too, where only speed and memory count.
        """
        self.config = config
        self.pretrained = pretrained
        self.plan = config.plan()
        self.device = run_device(config.device)
        self.part_size = config.images_at_once(world_size())
        for stage in config.stages:
            for optimizer in (stage.optimizer, stage.discriminator_optimizer):
                check_available(optimizer, self.device, config.engine.graphs)
        if config.engine.graphs:
            check_recordable(self.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        set_precision(deterministic=config.engine.deterministic)
        resolution = config.tokenizer.resolution
        with first_rank_first():  # it indexes shards and converts parquet files, for all
            self.data = open_data(config.data, "train", resolution, config.seed)
            self.held_out = open_data(config.data, "validation", resolution, config.seed)
        self.data_backend = choose_backend(self.data, config.data_backend, self.device)
        self.faults = [*self.data.faults(), *self.held_out.faults()]  # not yet reported
        self._dtype = compute_dtype(config.dtype, self.device)
        self.forward = build_forward(config, self.device, self._dtype, pretrained)
        self.tokenizer = self.forward.tokenizer
        self.model: nn.Module = self.forward
        self.perceptual = build_perceptual(config, self.device, self._dtype or torch.float32, pretrained)
        self.distances = evaluation_distances(config, self.device, self.perceptual)
        self.adversaries = self._build_adversaries()
        frozen = never_trained(config, self.tokenizer)
        self.initial_hash = None if config.initial is None else weights_hash(config.initial, frozen)
        self.ema = EMA(self.tokenizer, frozen)
        self.guard = self._guard()
        self.buffers = BufferGuard(self.tokenizer)
        self.adaptive = {name: AdaptiveWeight(self.device, limit) for name, limit in LIMITS.items()}
        self.companions: list[Companion] = []
        self.snapshot: Snapshot | None = None
        self.place: Place | None = None
        self.entries = 0  # into stages; what was recorded in one is of no use in the next
        self.standing: StandingInputs | None = None
        self.read_labels: list[Tensor] = []  # of the batch that was read last, by part
        self.stage: StageConfig = config.stages[0]
        self.trained: list[nn.Parameter] = []
        self.playing: list[Adversary] = []
        self.optimizer: torch.optim.Optimizer
        self.state = TrainingState(
            modules={"tokenizer": self.tokenizer, **{a.name: a.game for a in self.adversaries}},
            optimizers={a.name: a.optimizer for a in self.adversaries},
            others={
                "ema": self.ema,
                **{f"adaptive_{name}": weight for name, weight in self.adaptive.items()},
                "tokenizer_guard": self.guard,
                **{f"{a.name}_guard": a.guard for a in self.adversaries},
            },
            frozen=(*(f"tokenizer.{name}" for name in frozen), "projected.discriminator.encoder."),
        )
        self.joint = None
        if config.joint is not None:
            joint, width = config.joint, self.tokenizer.encoder.width
            check_classes(joint.model, len(self.data.classes), config.data or "the set of photographs")
            self.joint = build_joint(config, joint, width, self._dtype)
            self.add_companion(JOINT, self.joint, joint.weight, joint.optimizer, ema=joint.ema)

    # Building

    def _build_adversaries(self) -> list[Adversary]:
        """The discriminators that some stage plays against."""
        adversaries, graphs = [], self.config.engine.graphs
        for name, game, stage in build_games(
            self.config, self.device, self._dtype or torch.float32, self.pretrained
        ):
            parameters = [p for p in game.parameters() if p.requires_grad]
            optimizer = build_optimizer(stage.discriminator_optimizer, parameters, capturable=graphs)
            adversaries.append(Adversary(name, game, replicated(game, self.device), optimizer, self._guard()))
        return adversaries

    def _guard(self) -> StepGuard:
        return StepGuard(self.config.safety, self.device, scaled=self._dtype == torch.float16)

    def check_initial(self) -> None:
        """ValueError where what never trains, and is in no checkpoint, is not what the run began with."""
        now = self.initial_hash
        if now is not None and self.state.numbers.setdefault("initial_weights", now) != now:
            raise ValueError(
                f"initial {self.config.initial} holds other weights, of what this run does not train, than it"
                f" began with; give the same"
            )

    @torch.no_grad()
    def begin_joint(self) -> None:
        """Let the joint model's normalisation begin with the statistics of latents as they are now."""
        if self.joint is None:
            return
        with closing(self.batches(0)) as batches:
            images = to_unit(next(batches)[0])
        self.joint.norm.begin(self.tokenizer.encode(images).mode().float())

    def add_companion(
        self,
        name: str,
        model: nn.Module,
        weight: float,
        optimizer: OptimizerConfig,
        schedule: WeightSchedule = ALWAYS,
        ema: EmaConfig = NO_AVERAGE,
    ) -> None:
        """Train `model` along with the tokenizer (vfmvae.training.companion). Goes before `enter_stage`.

        ValueError if something in the run has that name, or the model trains already.
        """
        check_companion(name, model, weight, {*self.state.modules, "snapshot", *REPORTED}, self.companions)
        model.to(self.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        built = build_optimizer(optimizer, parameters, capturable=self.config.engine.graphs)
        guard = StepGuard(self.config.safety, self.device, scaled=False)  # the tokenizer's scale is taken off
        companion = Companion(
            name,
            replicated(model, self.device),
            weight,
            schedule,
            optimizer,
            built,
            guard,
            EMA(model),
            BufferGuard(model),
            ema,
        )
        self.companions.append(companion)
        self.state.modules[name] = model
        self.state.optimizers[name] = built
        self.state.others |= {f"{name}_guard": companion.guard, f"{name}_ema": companion.average}

    # Stages

    def enter_stage(self, number: int) -> None:
        """Make a stage the present one: what trains, its optimizer, its discriminators, its snapshot.

        Parameters that trained in the stage before keep their moments.
        """
        stage = self.config.stages[number]
        self.model = self.forward  # an earlier wrapper lets go of the gradients first
        for module in (self.tokenizer, *(a.game for a in self.adversaries)):
            module.zero_grad(set_to_none=True)  # or what does not train from now on would keep its gradients
        trained = set_trained(self.tokenizer, stage.trains)
        self.trained = list(trained.values())
        earlier = getattr(self, "optimizer", None)
        groups = parameter_groups(self.tokenizer, stage.trains, stage.rates)
        self.optimizer = next_optimizer(
            stage.optimizer, self.trained, earlier, groups, self.config.engine.graphs
        )
        if isinstance(self.optimizer, AveragingAdam):
            averages = self.ema.of_parameters()
            self.optimizer.follow({parameter: averages[parameter] for parameter in self.trained})
        self.playing = [
            a for a in self.adversaries if any(getattr(stage.losses, t) for t in TERMS_OF[a.name])
        ]
        for a in self.playing:
            a.optimizer = next_optimizer(
                stage.discriminator_optimizer, a.parameters, a.optimizer, capturable=self.config.engine.graphs
            )
            self.state.optimizers[a.name] = a.optimizer
        self.snapshot = None
        if stage.losses.preservation:
            self.snapshot = take_snapshot(self.config, self.tokenizer, stage, self.device)
        self.state.optimizers["tokenizer"] = self.optimizer
        self.state.modules.pop("snapshot", None)
        if self.snapshot is not None:
            self.state.modules["snapshot"] = self.snapshot
        for guard in (self.guard, *(a.guard for a in self.playing)):
            guard.begin_stage()
        self.stage = stage
        self.entries += 1
        self.state.numbers |= {"stage": number, "measured": []}
        if self.config.engine.parallel == "ddp":
            self.model = replicated(self.forward, self.device)

    def check_position(self, step: int, stage: int) -> None:
        """ValueError unless a run that did `step` updates, the last in `stage`, can go on by this plan."""
        self.plan.check_position(step, stage)

    def begin_step(self) -> dict[str, float]:
        """Go to the stage and the learning rates of the present step; returns the rates by name."""
        place = self.place = self.plan.locate(self.state.step)
        if place.stage != self.state.numbers["stage"]:
            self.enter_stage(place.stage)
        progress = self.plan.progress(place)
        rates = {"tokenizer": learning_rate(self.stage.optimizer, progress)}
        set_learning_rate(self.optimizer, rates["tokenizer"])
        if isinstance(self.optimizer, AveragingAdam):
            self.optimizer.set_average_weight(1 - self.ema_beta())
        rates |= {rate.part: rate.factor * rates["tokenizer"] for rate in self.stage.rates}
        for adversary in self.playing:
            rate = learning_rate(self.stage.discriminator_optimizer, progress)
            set_learning_rate(adversary.optimizer, rate)
            rates[f"discriminator_{adversary.name}"] = rate
        for companion in self.companions:
            rates[companion.name] = companion.follow((self.state.step + 0.5) / self.plan.steps)
        return rates

    # What a step asks for

    def weights(self) -> dict[str, float]:
        """The weights of the terms that are on in the present step, and of the companions by name."""
        assert self.place is not None
        of_stage = self.plan.stage_images(self.place)
        of_run = of_stage + sum(stage.images for stage in self.config.stages[: self.place.stage])
        of_companions = {c.name: c.weight_at(of_run) for c in self.companions}
        return {**self.stage.weights(of_stage), **{name: w for name, w in of_companions.items() if w}}

    def batches(self, start: int) -> Generator[list[Tensor], None, None]:
        """This process's images of every step from `start` on: one uint8 [b, 3, R, R] per part."""
        accumulate = self.config.engine.accumulate
        requests = (
            Request((step * world_size() + rank()) * accumulate + part, self.plan.stage_of(step).crops)
            for step in range(start, self.plan.steps)
            for part in range(accumulate)
        )
        backend, workers = self.data_backend, self.config.workers
        loaded = load_batches(self.data, self.part_size, requests, workers, self.device, backend)
        with closing(loaded):
            for first in loaded:
                parts = [first, *(next(loaded) for _ in range(accumulate - 1))]
                self.faults += [fault for part in parts for fault in part["faults"]]
                if self.companions:
                    self.read_labels = [part["label"].to(self.device, non_blocking=True) for part in parts]
                yield [part["image"] for part in parts]

    def labels(self, part: int) -> Tensor | None:
        """Labels int64 [b] of one of this process's parts of the present step, which companions read.

        -1 where an image has none; None where the images did not come from `batches`.
        """
        labels = self.read_labels if self.standing is None else self.standing.labels
        return labels[part] if labels else None

    def data_identity(self) -> DataIdentity | None:
        """Of the training images; None for those that are embedded."""
        if self.config.data is None:
            return None
        keys = self.data.keys_digest() if isinstance(self.data, Images) else ""
        return DataIdentity(self.config.data, len(self.data), keys)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.plan.steps

    @property
    def stage_name(self) -> str:
        return self.stage.name

    @property
    def images(self) -> int:
        """Of the data, held-out ones included."""
        return len(self.data) + len(self.held_out)

    def take_faults(self) -> list[Fault]:
        """What could not be read since the last call."""
        faults, self.faults = self.faults, []
        return faults

    def first_image(self, part: int) -> int:
        """The place of a part's first image in the global batch."""
        return (rank() * self.config.engine.accumulate + part) * self.part_size

    def draws(self, first: int, stream: int) -> StepDraws:
        """Random numbers of this step for the part that begins at image `first` of the global batch."""
        # After a rollback the same numbers would lead to the same trouble.
        seed = self.config.seed + 1_000_003 * self.state.numbers.get("rollbacks", 0)
        count, total = self.part_size, self.config.batch_size
        where = seed, self.state.step, self.device, first, count, total, stream
        if self.standing is None:
            return StepDraws(*where)
        return StandingDraws(self.standing.draws.setdefault((first, stream), {}), *where)

    def blur_sigma(self) -> float:
        """Blur of the discriminators' images in this step, in pixels."""
        assert self.place is not None
        return blur_sigma(self.plan.stage_images(self.place), self.stage.blur_sigma, self.stage.blur_images)

    def blur(self) -> Blur | None:
        """The same as the discriminators take it; None for none."""
        if not (sigma := self.blur_sigma()):
            return None
        wide = torch.full((), sigma, device=self.device) if self.standing is None else self.standing.sigma
        return Blur(wide, reach_of(self.stage.blur_sigma))

    @contextmanager
    def reducing_tokenizer(self, last: bool) -> Iterator[None]:
        """`reducing` for the tokenizer and its companions."""
        with ExitStack() as entered:
            for model in (self.model, *(companion.model for companion in self.companions)):
                entered.enter_context(reducing(model, last))
            yield

    def is_adaptive(self, name: Balanced) -> bool:
        """Whether the present stage has the adaptive weight of this name."""
        losses = self.stage.losses
        return losses.adaptive_alignment if name == "alignment" else losses.adaptive_adversarial

    def measures(self, name: Balanced) -> bool:
        """Whether a step that has its terms measures that weight; the first one of a stage does always."""
        first = name not in self.state.numbers["measured"]
        return self.is_adaptive(name) and (first or self.state.step % self.config.engine.adaptive_every == 0)

    def note_measured(self, weights: Weights) -> None:
        """Goes at the end of a step with terms of these weights."""
        on = {"alignment": "alignment" in weights, "adversarial": any(t in weights for t in BALANCED_TERMS)}
        known = self.state.numbers["measured"]
        known += [name for name in LIMITS if on[name] and self.measures(name) and name not in known]

    def factor(self, name: Balanced, gradients: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The adaptive weight, or 1; measured anew from gradients, times the loss's scale, if given."""
        if not self.is_adaptive(name):
            return torch.ones((), device=self.device)
        if gradients is not None:
            of_reconstruction, of_loss = (gradient / self.guard.scale for gradient in gradients)
            self.adaptive[name].measure(of_reconstruction, of_loss)
        return self.adaptive[name].ratio

    def ema_beta(self) -> float:
        """Share of the averaged weights that the present step keeps."""
        seen = self.state.step * self.config.batch_size
        return ema_beta(self.stage.ema, self.config.batch_size, seen)

    def average(self) -> None:
        """Move the averaged weights towards the present ones, as far as the optimizer has not done it."""
        moved = self.optimizer.averaged if isinstance(self.optimizer, AveragingAdam) else ()
        self.ema.update(self.ema_beta(), moved)
        seen = self.state.step * self.config.batch_size
        for companion in self.companions:
            companion.average.update(ema_beta(companion.ema, self.config.batch_size, seen))

    def skips_in_a_row(self) -> int:
        """How many of the last updates were skipped, of the optimizer that has most; waits."""
        guards = [self.guard, *(a.guard for a in self.playing), *(c.guard for c in self.companions)]
        return int(torch.stack([guard.in_a_row for guard in guards]).amax().item())

    def evaluate(self) -> Evaluation:
        """Measure the averaged weights on held-out images."""
        batch = min(self.part_size, HELD_OUT_IMAGES)
        with self.ema.applied():
            found = evaluate(self.forward, self.held_out, batch, self.distances)
        self.faults += found.faults
        return found

    @torch.no_grad()
    def synchronise_statistics(self) -> None:
        """Make the running means equal in all processes. They are linear, so this need not be every step."""
        mean_over_ranks(self.tokenizer.style.average)
        mean_over_ranks(self.ema.state_dict()["style.average"])
