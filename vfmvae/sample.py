"""Images of classes from a trained diffusion model, for the eye and for evaluation.

    python -m vfmvae.sample runs/diffusion --tokenizer runs/demo --classes 1,5 --count 16
    torchrun --nproc-per-node 8 -m vfmvae.sample runs/diffusion --count 50000 --labels balanced

Writes `samples.npz` with `arr_0` uint8 [N, H, W, 3] and `arr_1` labels int64 [N], as the published evaluators
of generated images read it; `samples.json` with all that decided them; `samples.png` with the first of them.
An image depends on (seed, number), and neither on the batch size nor on the number of processes, beyond
rounding. Processes write to one folder, which all of them must see. After a stop or a kill the same command
makes the images that are missing.

The function `vfmvae.sample` gives latents; see vfmvae.diffusion.sampling.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import vfmvae
from vfmvae.cli import command, parse, usage
from vfmvae.diffusion.guidance import Guidance
from vfmvae.diffusion.sampling import Sampler, Sampling, as_trained, run, sample, sample_noise
from vfmvae.inference import (
    ModelOptions,
    as_picture,
    dtype_name,
    memory_errors,
    progress,
    say,
    write_picture,
)
from vfmvae.model_files import file_hash
from vfmvae.sample_files import ARRAYS, GRID, SINGLES, ImagesUnderWay, begin, check_folder, finish
from vfmvae.sample_labels import Protocol, check_even, class_numbers, describe_labels, label_of
from vfmvae.sample_models import Models, check_path, open_models
from vfmvae.tokenizer.files import tokenizer_hash
from vfmvae.training.device import pick_device
from vfmvae.training.distributed import first_rank_first, lost_processes, place, process_group, wait_for_all
from vfmvae.training.run_lock import run_lock


@dataclass
class Sample:
    """Images of classes from a trained diffusion model. --tokenizer: that of the training run, if not given.
    Example: python -m vfmvae.sample runs/diffusion --tokenizer runs/demo --classes 1,5 --count 16
    """

    diffusion: tyro.conf.Positional[str]
    """The diffusion model: a training run, a saved model or a Hugging Face hub id."""
    output: Path = Path("samples")
    """Folder for the images: a new one, an empty one, or one where the same images were begun."""
    count: int = 16
    """Images in all."""
    classes: str = "all"
    """Numbers of classes with commas between them, such as 1,5,7; or all."""
    labels: Protocol = "random"
    """Draw the class of each image, or make exactly as many images of each class."""
    sampler: Sampler = "euler"
    """Methods for the ODE: euler, heun, dopri5; for the SDE: sde."""
    steps: int | None = None
    """If not given, 250; dopri5 chooses its own, for one image at a time."""
    guidance: float = 1.0
    """How much classes are exaggerated; 1: not at all."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Only steps that begin at these times are guided; 1 is noise."""
    guidance_channels: int | None = None
    """Guide only the first so many channels of the latents (LightningDiT: 3)."""
    class_token_guidance: float | None = None
    """Guidance of the class token of a model that has one (REG); if not given, the same."""
    guide: str | None = None
    """A weaker model to guide away from, in place of the null class (AutoGuidance)."""
    shift: float = 1.0
    """s of t' = s t / (1 + (s - 1) t) for the times of the steps; above 1 more of them at high noise. Where a
    run shifted its times in training, on top of that."""
    seed: int = 0
    """Start of every random draw."""
    other_tokenizer: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Decode by another tokenizer than the model was trained with, say one whose decoder was trained on."""
    png: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write every image as a PNG too."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        if self.sampler == "dopri5" and self.steps is not None:
            raise ValueError(f"steps is {self.steps}; sampler 'dopri5' chooses its own")
        guided = self.guidance != 1 or self.class_token_guidance not in (None, 1)
        if self.guide is not None and not guided:
            raise ValueError("guide does nothing with guidance 1; give --guidance above 1")
        self.settings()
        if self.classes != "all" and not all(part.strip().isdecimal() for part in self.classes.split(",")):
            raise ValueError(f"classes is {self.classes!r}; it must be numbers such as 1,5,7, or all")

    def settings(self) -> Sampling:
        """How latents are sampled."""
        guidance = Guidance(
            self.guidance, self.guidance_interval, self.guidance_channels, self.class_token_guidance
        )
        return Sampling(self.sampler, 250 if self.steps is None else self.steps, guidance, self.shift)


@torch.no_grad()
def images_of(
    models: Models, settings: Sampling, numbers: Sequence[int], labels: Sequence[int], seed: int
) -> Tensor:
    """uint8 [B, 3, H, W] on the CPU. FloatingPointError names an image whose latents are not finite."""
    diffusion, config = models.diffusion, models.diffusion.config
    device = diffusion.latents_mean.device
    shape = (config.channels, config.latent_size, config.latent_size)
    made = run(
        settings,
        diffusion,
        sample_noise(seed, numbers, shape).to(device),
        torch.tensor(labels, device=device),
        guide=models.guide,
        seed=seed,
        numbers=numbers,
    )
    bad = (~made.latents.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"the latents of image {numbers[bad[0]]} (class {labels[bad[0]]}) are not finite; try"
            f" --dtype fp32 or less --guidance, with another --output"
        )
    return models.decode(made.latents)


def write_missing(
    models: Models,
    options: Sample,
    labels: Sequence[int],
    numbers: Sequence[int],
    under_way: ImagesUnderWay,
    bar: Progress,
) -> None:
    """Make the images `numbers` of all `labels`, and put them where those of all processes lie."""
    settings = as_trained(options.settings(), models.shift)
    for first in range(0, len(numbers), options.model.batch_size):
        batch = numbers[first : first + options.model.batch_size]
        images = images_of(models, settings, batch, [labels[number] for number in batch], options.seed)
        if options.png:
            for number, image in zip(batch, images, strict=True):
                write_picture(options.output / SINGLES / f"{number:06}.png", as_picture(image))
        under_way.write(batch, images)
        bar.advance(bar.task_ids[0], len(batch))


def describe(
    options: Sample, models: Models, tokenizer_name: str | None, chosen: Sequence[int]
) -> dict[str, Any]:
    """All that decides the images, for samples.json."""
    settings = asdict(as_trained(options.settings(), models.shift))
    if options.sampler == "dopri5":
        settings["steps"] = None
    return {
        "vfmvae": vfmvae.__version__,
        "images": options.count,
        "resolution": models.resolution,
        "model": options.diffusion,
        "model_sha256": file_hash(options.diffusion),
        "guide": options.guide,
        "guide_sha256": None if options.guide is None else file_hash(options.guide),
        "tokenizer": tokenizer_name,
        "tokenizer_hash": None if models.tokenizer is None else tokenizer_hash(models.tokenizer),
        "sampling": settings,
        "labels": describe_labels(options.labels, options.count, len(chosen)),
        "label_protocol": options.labels,
        "classes": "all" if options.classes == "all" else list(chosen),
        "seed": options.seed,
        "dtype": dtype_name(models.diffusion.dtype),
        "tokenizer_dtype": None if models.tokenizer is None else dtype_name(models.tokenizer.dtype),
        "device": str(models.diffusion.latents_mean.device.type),
    }


@contextmanager
def kept(under_way: ImagesUnderWay, console: Console) -> Iterator[None]:
    """Where what is inside fails, say how many images are kept, or remove the file if there are none."""
    try:
        yield
    except BaseException as error:
        there = under_way.count - len(under_way.missing())
        if there:
            again = "" if isinstance(error, FloatingPointError) else "; the same command goes on"
            say(console, f"{there} of {under_way.count} images are kept{again}")
        elif place()[0] == 0:
            under_way.remove()
        raise


@contextmanager
def alone_in(folder: Path, console: Console) -> Iterator[None]:
    """No other command may write to the folder meanwhile; of several processes the first one sees to it."""
    if place()[0] > 0:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder as --output")
    with run_lock(folder, lambda warning: say(console, warning), "samples", "--output"):
        check_folder(folder)
        yield


@command
def main() -> None:
    options = parse(Sample, "sample")
    rank, processes = place()
    console = Console(quiet=rank > 0)
    with usage():
        device = pick_device(options.model.device)
    with alone_in(options.output, console), process_group(device), lost_processes():
        models, tokenizer_name = open_models(
            options.diffusion, options.guide, options.model, options.other_tokenizer, console
        )
        if options.sampler == "sde":
            check_path(options.diffusion)
        chosen = class_numbers(options.classes, models.diffusion.config.classes)
        check_even(options.labels, options.count, len(chosen))
        say(console, describe_labels(options.labels, options.count, len(chosen)))
        labels = [label_of(number, chosen, options.labels, options.seed) for number in range(options.count)]
        described = describe(options, models, tokenizer_name, chosen) if rank == 0 else {}
        with first_rank_first():
            if rank == 0:
                decides = {**described, "png": options.png}
                if lost := begin(options.output, decides, options.count, models.resolution):
                    say(console, lost)
        under_way = ImagesUnderWay(options.output, options.count, models.resolution)
        with kept(under_way, console):
            missing = under_way.missing()
            wait_for_all()  # until everybody knows what is missing
            if len(missing) < options.count:
                say(console, f"{options.count - len(missing)} images are there already")
            share = missing[len(missing) * rank // processes : len(missing) * (rank + 1) // processes]
            with memory_errors(), progress(console, "sampling", len(share)) as bar:
                write_missing(models, options, labels, share, under_way, bar)
            wait_for_all()
            if rank == 0:
                finish(options.output, under_way, labels, described)
    say(console, f"{options.count} images in {options.output / ARRAYS}, the first in {options.output / GRID}")


class _CallableModule(ModuleType):
    """Importing this module binds it to `vfmvae.sample`, which must go on being the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return sample(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


if __name__ == "__main__":
    main()
