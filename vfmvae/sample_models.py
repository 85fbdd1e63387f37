"""The models of `vfmvae sample`: opened, on one device, and of the same latents as far as they can tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from vfmvae.cli import UsageError, usage
from vfmvae.diffusion import DiffusionTransformer
from vfmvae.diffusion.files import load_transformer, tokenizer_hash_of
from vfmvae.diffusion.flow import TimeConfig
from vfmvae.images import to_uint8
from vfmvae.inference import ModelOptions, dtype_name, open_tokenizer, say
from vfmvae.model_files import CONFIG_FILE, find_model
from vfmvae.serialization import from_dict, read_json
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.files import tokenizer_hash
from vfmvae.training.device import compute_dtype, pick_device, prepare_inference
from vfmvae.training.joint import NAME as JOINT


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


def open_models(
    name: str, guide: str | None, options: ModelOptions, other_tokenizer: bool, console: Console
) -> tuple[Models, str | None]:
    """The models, which fit each other, and the tokenizer's name.

    Args:
        name, guide: the diffusion model and one to guide away from.
        other_tokenizer: whether the tokenizer may be another one than the model was trained with.

    Raises ValueError or UsageError where one cannot be used.
    """
    diffusion = _open_diffusion(name, options, console)
    guiding = None if guide is None else _open_diffusion(guide, options, console)
    folder = find_model(name)
    if guide is not None:
        check_guide(folder, find_model(guide), other_tokenizer)
    training = read_json(folder / CONFIG_FILE)
    shift = training_shift(training, diffusion)
    its_own = training.get("tokenizer") or tokenizer_beside(folder)
    if options.tokenizer is None and its_own is None and training.get("data") is not None:
        check_fit(models := Models(diffusion, guiding, None, shift))  # a run on images without a tokenizer
        return models, None
    chosen = replace(options, tokenizer=options.tokenizer or its_own)
    named, tokenizer = open_tokenizer(chosen, console)
    check_fit(models := Models(diffusion, guiding, tokenizer, shift))
    known = tokenizer_hash_of(folder)
    if known is None:
        say(console, "note: which tokenizer this model was trained with is unknown")
    elif known != tokenizer_hash(tokenizer) and not other_tokenizer:
        raise UsageError(
            f"the model was trained on latents of another tokenizer than {named}; give that one as"
            f" --tokenizer, or add --other-tokenizer if only its decoder differs"
        )
    return models, named


def _open_diffusion(name: str, options: ModelOptions, console: Console) -> DiffusionTransformer:
    """A diffusion model on the device, and a line that says so. ValueError where it cannot be used."""
    with usage():
        device = pick_device(options.device)
    prepare_inference(device)
    model = load_transformer(name, device).requires_grad_(False)
    model.compute_dtype = compute_dtype(options.dtype, device)
    model.cast_weights()
    config = model.config
    say(
        console,
        f"{name}: {config.channels} x {config.latent_size} x {config.latent_size} latents, {config.classes}"
        f" classes, depth {config.depth}, width {config.width}, {device}, {dtype_name(model.dtype)}",
    )
    return model


def tokenizer_beside(folder: Path) -> str | None:
    """Where the model of an end-to-end run has its tokenizer: the folder of the run, which holds its own."""
    run = folder.resolve().parent
    is_joint = folder.name == JOINT and tokenizer_hash_of(folder) is not None
    return str(run) if is_joint and (run / CONFIG_FILE).is_file() else None


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


def check_guide(model: Path, guide: Path, other_tokenizer: bool) -> None:
    """ValueError or UsageError where two models say that they learned other latents, or another path.

    Converted ones do not say.
    """
    hashes = {tokenizer_hash_of(folder) for folder in (model, guide)}
    if len(hashes - {None}) > 1 and not other_tokenizer:
        raise UsageError(
            "the guide was trained on latents of another tokenizer than the model; add --other-tokenizer if"
            " only their decoders differ"
        )
    paths = {last_path(folder) for folder in (model, guide)}
    if len(paths - {None}) > 1:
        raise ValueError(
            f"the guide learned another path than the model ({last_path(guide)}, {last_path(model)}): the"
            f" difference of their velocities means nothing"
        )


def training_shift(training: Mapping[str, Any], model: DiffusionTransformer) -> float:
    """How a training run's last stage shifted its times; 1 for a converted model, which does not say."""
    stages = training.get("stages")
    time = stages[-1].get("time") if isinstance(stages, list) and stages else None
    if not isinstance(time, Mapping):
        return 1.0
    elements = model.config.channels * model.config.latent_size**2
    return from_dict(TimeConfig, time, "config.json: stages: time").shift_for(elements)


def check_path(name: str) -> None:
    """UsageError for the SDE with a model of another path than it is written for."""
    if last_path(find_model(name)) == "cosine":
        raise UsageError(
            "--sampler sde is for the linear path, and this run learned the cosine path; take heun"
        )


def last_path(folder: Path) -> str | None:
    """Of a run's last stage; None for a converted model, which does not say."""
    stages = read_json(folder / CONFIG_FILE).get("stages", ())
    paths = [stage.get("path") for stage in stages if isinstance(stage, Mapping)]
    return paths[-1] if paths else None
