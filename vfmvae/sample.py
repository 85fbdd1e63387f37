"""Images of classes from a trained diffusion model, for the eye and for evaluation.

    python -m vfmvae.sample runs/diffusion --tokenizer runs/demo --classes 1,5 --count 16
    torchrun --nproc-per-node 8 -m vfmvae.sample runs/diffusion --count 50000 --labels balanced

Writes `samples.npz` with `arr_0` uint8 [N, H, W, 3] and `arr_1` labels int64 [N], as the published evaluators
of generated images read it; `samples.json` with all that decided them; `samples.png` with the first of them.
An image depends on (seed, number), and neither on the batch size nor on the number of processes, beyond
rounding. Processes write to one folder, which all of them must see.

The function `vfmvae.sample` gives latents; see vfmvae.diffusion.sampling.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import vfmvae
from vfmvae.atomic import remove_leftovers, write_atomically
from vfmvae.cli import UsageError, command, parse, usage
from vfmvae.data.latents import LatentBatch
from vfmvae.decode import check_new, write_arrays
from vfmvae.diffusion import DiffusionTransformer
from vfmvae.diffusion.files import load_transformer, tokenizer_hash_of
from vfmvae.diffusion.flow import TimeConfig
from vfmvae.diffusion.guidance import Guidance
from vfmvae.diffusion.sampling import Sampler, Sampling, as_trained, run, sample, sample_noise
from vfmvae.images import to_uint8
from vfmvae.inference import (
    ModelOptions,
    as_picture,
    dtype_name,
    memory_errors,
    open_tokenizer,
    progress,
    say,
    write_picture,
)
from vfmvae.model_files import CONFIG_FILE, MODEL_FILE, find_model
from vfmvae.sample_labels import Protocol, check_even, class_numbers, describe_labels, label_of
from vfmvae.serialization import from_dict, read_json
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.files import tokenizer_hash
from vfmvae.training.device import compute_dtype, pick_device, set_precision
from vfmvae.training.distributed import (
    first_rank_first,
    lost_processes,
    place,
    process_group,
    wait_for_all,
)

ARRAYS, SETTINGS, GRID, SINGLES = "samples.npz", "samples.json", "samples.png", "images"
PIXELS = f".{ARRAYS}.pixels.partial"
"""Where processes put their images until all are there; hidden, and removed with what a kill left."""
GRID_SIDE = 8
CHUNK = 256


@dataclass
class Sample:
    """Images of classes from a trained diffusion model. --tokenizer: that of the training run, if not given.
    Example: python -m vfmvae.sample runs/diffusion --tokenizer runs/demo --classes 1,5 --count 16
    """

    diffusion: tyro.conf.Positional[str]
    """The diffusion model: a training run, a saved model or a Hugging Face hub id."""
    output: Path = Path("samples")
    """Folder for the images; a new one, or an empty one."""
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
    """Decode by another tokenizer than the model was trained with, such as one whose decoder was trained on."""
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


class Models(NamedTuple):
    """What makes images."""

    diffusion: DiffusionTransformer
    guide: DiffusionTransformer | None
    tokenizer: Tokenizer | None
    """None: the diffusion model makes the pixels themselves."""
    shift: float = 1.0
    """Of the times in training, as far as that is known."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents -> images uint8 [B, 3, H, W] on the CPU."""
        latents = self.diffusion.denormalise(latents)
        return to_uint8(latents if self.tokenizer is None else self.tokenizer.decode(latents)).cpu()

    @property
    def resolution(self) -> int:
        """Height and width of the images."""
        downsample = 1 if self.tokenizer is None else self.tokenizer.config.downsample
        return self.diffusion.config.latent_size * downsample


def open_diffusion(name: str, options: Sample, console: Console) -> DiffusionTransformer:
    """A diffusion model on the device, and a line that says so. ValueError where it cannot be used."""
    with usage():
        device = pick_device(options.model.device)
    if device.type == "cuda":
        set_precision(deterministic=True)
    model = load_transformer(name, device).requires_grad_(False)
    model.compute_dtype = compute_dtype(options.model.dtype, device)
    model.cast_weights()
    config = model.config
    say(
        console,
        f"{name}: {config.channels} x {config.latent_size} x {config.latent_size} latents, {config.classes}"
        f" classes, depth {config.depth}, width {config.width}, {device}, {dtype_name(model.dtype)}",
    )
    return model


def check_fit(models: Models) -> None:
    """ValueError unless the models are of the same latents, as far as these can tell."""
    diffusion, guide, tokenizer, _ = models
    channels, side = diffusion.config.channels, diffusion.config.latent_size
    if tokenizer is None:
        if channels != 3:
            raise ValueError(f"the diffusion model makes {channels} channels, and pixels have 3")
    elif channels != tokenizer.config.latent_channels:
        raise ValueError(
            f"the diffusion model makes latents of {channels} channels; this tokenizer has"
            f" {tokenizer.config.latent_channels}: give the one that it was trained with as --tokenizer"
        )
    elif models.resolution % tokenizer.image_multiple:
        raise ValueError(
            f"latents of {side} x {side} would be images of {models.resolution} px, and this tokenizer needs"
            f" multiples of {tokenizer.image_multiple}: give the one that the model was trained with as"
            f" --tokenizer"
        )
    for name in ("latents_mean", "latents_std") if guide is not None else ():
        if not torch.allclose(getattr(guide, name), getattr(diffusion, name), rtol=1e-3, atol=1e-4):
            raise ValueError(f"the guide was trained on other latents: its {name} differs from the model's")


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
            f" --dtype fp32 or less --guidance"
        )
    return models.decode(made.latents)


def write_share(
    models: Models, options: Sample, labels: Sequence[int], pixels: Path, numbers: range, bar: Progress
) -> None:
    """Make the images `numbers` and put them in their places in the file `pixels`, uint8 [N, H, W, 3]."""
    settings = as_trained(options.settings(), models.shift)
    for first in range(numbers.start, numbers.stop, options.model.batch_size):
        batch = range(first, min(first + options.model.batch_size, numbers.stop))
        images = images_of(models, settings, batch, labels[batch.start : batch.stop], options.seed)
        with open(pixels, "r+b") as file:  # written and not mapped: a full disk is an error, and no crash
            file.seek(batch.start * images[0].numel())
            file.write(images.permute(0, 2, 3, 1).contiguous().numpy().data)
        if options.png:
            for number, image in zip(batch, images, strict=True):
                write_picture(options.output / SINGLES / f"{number:06}.png", as_picture(image))
        bar.advance(bar.task_ids[0], len(batch))


@contextmanager
def shared_file(path: Path) -> Iterator[Path]:
    """A file that all processes write to; the first one makes it, and removes it at the end."""
    first = place()[0] == 0
    try:
        with first_rank_first():
            if first:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        yield path
    finally:
        if first:
            path.unlink(missing_ok=True)


def finish(options: Sample, pixels: np.ndarray, labels: Sequence[int], described: dict[str, Any]) -> None:
    """The files of all images, once these are there; the archive comes last."""
    side = min(GRID_SIDE, int(np.ceil(np.sqrt(len(pixels)))))
    write_picture(options.output / GRID, grid(pixels[: side * side], side))
    text = json.dumps(described, indent=2) + "\n"
    write_atomically(options.output / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))
    write_arrays(in_parts(pixels, labels), options.output / ARRAYS, len(pixels))


def in_parts(pixels: np.ndarray, labels: Sequence[int]) -> Iterator[tuple[LatentBatch, Tensor]]:
    """As `vfmvae.decode.write_arrays` takes images: a part in memory at a time."""
    for first in range(0, len(pixels), CHUNK):
        rows = slice(first, first + CHUNK)
        images = torch.from_numpy(np.array(pixels[rows])).permute(0, 3, 1, 2)
        yield {"label": torch.tensor(labels[rows])}, images  # type: ignore[typeddict-item, misc]


def grid(pixels: np.ndarray, columns: int) -> Image.Image:
    """Images uint8 [N, H, W, 3] in rows, left to right."""
    height, width = pixels.shape[1:3]
    sheet = Image.new("RGB", (columns * width, -(-len(pixels) // columns) * height))
    for number, image in enumerate(pixels):
        sheet.paste(Image.fromarray(image), (number % columns * width, number // columns * height))
    return sheet


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


def file_hash(name: str) -> str:
    """SHA-256 of a model's file of weights."""
    digest = hashlib.sha256()
    with open(find_model(name) / MODEL_FILE, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_models(options: Sample, console: Console) -> tuple[Models, str | None]:
    """The models, which fit each other, and the tokenizer's name."""
    diffusion = open_diffusion(options.diffusion, options, console)
    guide = None if options.guide is None else open_diffusion(options.guide, options, console)
    folder = find_model(options.diffusion)
    training = read_json(folder / CONFIG_FILE)
    check_path(options, training)
    shift = training_shift(training, diffusion)
    its_own = training.get("tokenizer")
    if options.model.tokenizer is None and its_own is None and training.get("data") is not None:
        check_fit(models := Models(diffusion, guide, None, shift))  # a run on images without a tokenizer
        return models, None
    chosen = replace(options.model, tokenizer=options.model.tokenizer or its_own)
    name, tokenizer = open_tokenizer(chosen, console)
    check_fit(models := Models(diffusion, guide, tokenizer, shift))
    known = tokenizer_hash_of(folder)
    if known is None:
        say(console, "note: which tokenizer this model was trained with is unknown")
    elif known != tokenizer_hash(tokenizer) and not options.other_tokenizer:
        raise UsageError(
            f"the model was trained on latents of another tokenizer than {name}; give that one as --tokenizer,"
            f" or add --other-tokenizer if only its decoder differs"
        )
    return models, name


def training_shift(training: Mapping[str, Any], model: DiffusionTransformer) -> float:
    """How a training run's last stage shifted its times; 1 for a saved model, which does not say."""
    stages = training.get("stages")
    time = stages[-1].get("time") if isinstance(stages, list) and stages else None
    if not isinstance(time, Mapping):
        return 1.0
    elements = model.config.channels * model.config.latent_size**2
    return from_dict(TimeConfig, time, "config.json: stages: time").shift_for(elements)


def check_path(options: Sample, training: Mapping[str, Any]) -> None:
    """UsageError for the SDE with a run on another path than it is written for."""
    paths = [stage.get("path") for stage in training.get("stages", ()) if isinstance(stage, Mapping)]
    if options.sampler == "sde" and paths[-1:] == ["cosine"]:
        raise UsageError(
            "--sampler sde is for the linear path, and this run learned the cosine path; take heun"
        )


@command
def main() -> None:
    options = parse(Sample, "sample")
    rank, processes = place()
    console = Console(quiet=rank > 0)
    if rank == 0:
        remove_leftovers(options.output)
        check_new(options.output)
    with usage():
        device = pick_device(options.model.device)
    with process_group(device), lost_processes():
        models, tokenizer_name = open_models(options, console)
        chosen = class_numbers(options.classes, models.diffusion.config.classes)
        check_even(options.labels, options.count, len(chosen))
        say(console, describe_labels(options.labels, options.count, len(chosen)))
        labels = [label_of(number, chosen, options.labels, options.seed) for number in range(options.count)]
        side = models.resolution
        share = range(options.count * rank // processes, options.count * (rank + 1) // processes)
        described = describe(options, models, tokenizer_name, chosen) if rank == 0 else {}
        with shared_file(options.output / PIXELS) as file:
            with memory_errors(), progress(console, "sampling", len(share)) as bar:
                write_share(models, options, labels, file, share, bar)
            wait_for_all()
            if rank == 0:
                pixels = np.memmap(file, np.uint8, "r", shape=(options.count, side, side, 3))
                finish(options, pixels, labels, described)
    say(console, f"{options.count} images in {options.output / ARRAYS}, the first in {options.output / GRID}")


class _CallableModule(ModuleType):
    """Importing this module binds it to `vfmvae.sample`, which must go on being the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return sample(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


if __name__ == "__main__":
    main()
