"""What a run would do, without doing it: stages, trained parameters, memory, the first batch's shapes.

Models are built on the meta device, which knows shapes and no values, so the full-size model takes seconds
and no memory on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from torch import Tensor, nn

from vfmvae.config import TrainConfig
from vfmvae.data import open_data
from vfmvae.data.transforms import CropConfig
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.equivariance import Equivariance
from vfmvae.tokenizer.parts import set_trained
from vfmvae.training.forward import StepOutput, TrainingForward
from vfmvae.training.stages import TERMS, StageConfig, TermSchedule

GIB = 2**30


def describe(config: TrainConfig, console: Console) -> None:
    """Print the plan of a run; ValueError for data or a stage that cannot be."""
    plan = config.plan()
    with torch.device("meta"):
        tokenizer = Tokenizer(config.tokenizer, encoder_weights=None, fused=False).train()
    tokenizer.compute_dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
    for stage, updates in zip(config.stages, plan.lengths, strict=True):
        trained = sum(p.numel() for p in set_trained(tokenizer, stage.trains).values())
        console.print(f"stage {stage.name}: {stage.images:,} images, {updates:,} updates", highlight=False)
        console.print(
            f"  trains  {' '.join(stage.trains)} ({trained / 1e6:.1f} M parameters)", highlight=False
        )
        console.print(f"  losses  {losses(stage, config)}", highlight=False, soft_wrap=True)
        for line in unusual(stage):
            console.print(f"  {line}", highlight=False, soft_wrap=True)
    total = sum(p.numel() for p in tokenizer.parameters())
    console.print(
        f"{total / 1e6:.1f} M parameters in all, {plan.steps:,} updates of {config.batch_size} images"
    )

    images = open_data(config.data, "train", config.tokenizer.resolution, config.seed).batch(0, 1)["image"]
    shape = (config.batch_size, *images.shape[1:])
    stage = config.stages[0]
    set_trained(tokenizer, stage.trains)
    output, saved = measured_forward(tokenizer, images.shape[1:], bool(stage.losses.alignment))
    console.print(f"first batch: images {list(shape)} uint8, latents {_shape(output.latents, config)},")
    console.print(f"  features {', '.join(_shape(f, config) for f in output.features)}")
    console.print(f"  reconstructions {', '.join(_shape(i, config) for i in output.images)}")
    memory(tokenizer, saved, config, console)


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


def measured_forward(tokenizer: Tokenizer, shape: tuple[int, ...], align: bool) -> tuple[StepOutput, int]:
    """The forward of one image on the meta device, and the bytes that its graph keeps."""
    forward = TrainingForward(tokenizer)
    side = shape[-1] // tokenizer.config.downsample
    with torch.device("meta"), saved_bytes(tokenizer) as kept:
        noise = torch.empty(1, tokenizer.config.latent_channels, side, side)
        output = forward(torch.empty(1, *shape), noise, Equivariance(), align)
    return output, sum(kept.values())


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """While entered, collect what graphs keep for the backward pass: bytes by storage, without parameters."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or another tensor takes the same address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def memory(tokenizer: Tokenizer, saved_per_image: int, config: TrainConfig, console: Console) -> None:
    """Print an estimate for one process that takes the whole batch, and what one image adds to it."""
    all_bytes = sum(p.numel() * 4 for p in tokenizer.parameters())
    trained = {id(p): p for stage in config.stages for p in set_trained(tokenizer, stage.trains).values()}
    per_weight = 4 * 4  # gradient, two moments, average
    fixed = all_bytes + per_weight * sum(p.numel() for p in trained.values())
    images = config.batch_size // config.engine.accumulate
    console.print(
        f"memory, estimated: {fixed / GIB:.1f} GiB for weights, gradients, moments and averages, and"
        f" {saved_per_image / GIB:.2f} GiB per image for the tokenizer's graph, so"
        f" {(fixed + images * saved_per_image) / GIB:.1f} GiB for {images} images in one process"
        f" (reference operations; discriminators and the perceptual network come on top)",
        soft_wrap=True,
        highlight=False,
    )


def _shape(tensor: Tensor, config: TrainConfig) -> str:
    return str([config.batch_size, *tensor.shape[1:]])
