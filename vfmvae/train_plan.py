"""What a run would do, without doing it: stages, trained parameters, memory, the first batch's shapes.

Models are built on the meta device, which knows shapes and no values, so the full-size model takes seconds
and no memory on any machine. What is wrong with a configuration in any of its stages is found here too.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from torch import Tensor

from vfmvae.config import TrainConfig
from vfmvae.data import Images, open_data
from vfmvae.data.transforms import CropConfig
from vfmvae.model_files import MODEL_FILE, find_model, fitting_weights
from vfmvae.tokenizer.equivariance import EquivarianceConfig
from vfmvae.train_memory import MetaRun, StageMemory
from vfmvae.train_networks import naming_initial
from vfmvae.training.forward import StepOutput
from vfmvae.training.joint import check_classes
from vfmvae.training.stages import TERMS, StageConfig, TermSchedule

GIB = 2**30


def describe(config: TrainConfig, console: Console) -> None:
    """Print the plan of a run; ValueError for data, a batch or a stage that cannot be."""
    plan, images_at_once = config.plan(), config.images_at_once()
    data = open_data(config.data, "train", config.tokenizer.resolution, config.seed)
    images = data.batch(0, 1)["image"]
    run, memories, outputs = MetaRun(config), list[StageMemory](), list[StepOutput]()
    if config.initial is not None:
        with naming_initial(config.initial):
            fitting_weights(run.tokenizer, find_model(config.initial) / MODEL_FILE)
    for number, (stage, updates) in enumerate(zip(config.stages, plan.lengths, strict=True)):
        memory, output = run.enter_stage(number)
        trained = sum(p.numel() for p in run.tokenizer.parameters() if p.requires_grad)
        _say(console, f"stage {stage.name}: {stage.images:,} images, {updates:,} updates")
        _say(console, f"  trains  {' '.join(stage.trains)} ({trained / 1e6:.1f} M parameters)")
        _say(console, f"  losses  {losses(stage, config)}")
        for line in unusual(stage):
            _say(console, f"  {line}")
        _say(console, f"  equivariance  {equivariance(stage.equivariance)}")
        _say(console, f"  memory  {_of_one_image(memory)}")
        memories.append(memory)
        outputs.append(output)
    if config.joint is not None:
        model = config.joint.model
        check_classes(model, len(data.classes), config.data or "the set of photographs")
        _say(
            console,
            f"joint diffusion transformer: {model.depth} blocks of width {model.width}, {model.tokens}"
            f" tokens, alignment weight {config.joint.weight:g}; memory counts its weights, not its graph",
        )
    total = sum(p.numel() for p in run.tokenizer.parameters())
    _say(
        console,
        f"{total / 1e6:.1f} M parameters in all, {plan.steps:,} updates of {config.batch_size} images",
    )
    if isinstance(data, Images):
        _say(console, f"data: {len(data):,} images of {len(data.classes):,} classes in {config.data}")
    else:
        _say(console, f"data: {config.data or 'the embedded photographs, a few; --data PATH for others'}")
    for warning in config.warnings():
        _say(console, f"warning: {warning}")
    shapes(outputs[0], [config.batch_size, *images.shape[1:]], config, console)
    most_memory(memories, images_at_once, run, console)


def losses(stage: StageConfig, config: TrainConfig) -> str:
    """The terms of a stage that this tokenizer has, with their weights and schedules."""
    absent = {"kl"} if config.tokenizer.bottleneck.kind == "discrete" else {"quantization", "entropy"}
    schedules = {schedule.term: schedule for schedule in stage.schedules}
    shown = []
    for term in TERMS:
        weight = getattr(stage.losses, term)
        if weight and term not in absent:
            shown.append(f"{term} {weight:g}{_when(schedules.get(term))}")
    return ", ".join(shown)


def unusual(stage: StageConfig) -> Iterator[str]:
    """What a stage has that most do not, a line each."""
    if stage.rates:
        yield f"rates   {', '.join(f'{rate.part} x {rate.factor:g}' for rate in stage.rates)}"
    if stage.crops != CropConfig():
        smallest, largest = stage.crops.side
        yield f"crops   {smallest:g} to {largest:g} of the short side, mirrored with {stage.crops.flip:g}"


def _when(schedule: TermSchedule | None) -> str:
    if schedule is None:
        return ""
    parts = [f"from {schedule.start:,}"] if schedule.start else []
    parts += [f"rising over {schedule.ramp:,}"] if schedule.ramp else []
    parts += [f"until {schedule.end:,}"] if schedule.end is not None else []
    return f" ({' '.join(parts)} images)" if parts else ""


def equivariance(config: EquivarianceConfig) -> str:
    """What is drawn, and how often of all steps."""
    parts = []
    of_latents, of_images = config.latent_probability, config.image_probability
    if of_latents:
        parts.append(
            f"{of_latents:.3g} of the steps: latents and targets scaled by {_any_of(config.latent_scales)},"
            f" turned by {_any_of(config.rotations)} degrees"
        )
    if of_images and of_latents < 1:
        share = (1 - of_latents) * of_images
        parts.append(f"{share:.3g} of the steps: images shrunk by {_any_of(config.image_scales)}")
    return "; ".join(parts) or "none"


def _any_of(values: tuple[float, ...]) -> str:
    *most, last = (f"{value:g}" for value in values)
    return f"{', '.join(most)} or {last}" if most else last


def shapes(output: StepOutput, images: list[int], config: TrainConfig, console: Console) -> None:
    """Print the shapes of a first batch that equivariance leaves as it is."""
    _say(console, f"first batch: images {images} uint8, latents {_shape(output.latents, config)},")
    _say(console, f"  features {', '.join(_shape(f, config) for f in output.encoded.layers)}")
    _say(console, f"  reconstructions {', '.join(_shape(i, config) for i in output.images)}")


def _shape(tensor: Tensor, config: TrainConfig) -> str:
    return str([config.batch_size, *tensor.shape[1:]])


def most_memory(memories: list[StageMemory], images: int, run: MetaRun, console: Console) -> None:
    """Print the largest of the stages' estimates, for one process that takes the whole batch."""
    engine, stages = run.config.engine, run.config.stages
    number = max(range(len(memories)), key=lambda n: memories[n].total(images))
    memory = memories[number]
    parts = f" (engine.accumulate {engine.accumulate})" if engine.accumulate > 1 else ""
    gpu = (
        " (as on a GPU; --device cpu counts float32)"
        if run.config.device == "auto" == run.config.dtype
        else ""
    )
    again = ", decoder blocks computed again (engine.recompute)" if engine.recompute else ""
    _say(
        console,
        f"memory, estimated: most in stage {stages[number].name}, {memory.total(images) / GIB:.1f} GiB in one"
        f" process that computes {images} images at once{parts}: {memory.fixed / GIB:.1f} GiB for weights,"
        f" gradients, moments and averages, and {memory.per_image / GIB:.2f} GiB per image for graphs in"
        f" {str(run.dtype).removeprefix('torch.')}{gpu}{again}; fused operations need less",
    )


def _of_one_image(memory: StageMemory) -> str:
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.graphs.items())
    return f"{memory.fixed / GIB:.1f} GiB, and {memory.per_image / GIB:.2f} GiB per image ({parts})"


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
