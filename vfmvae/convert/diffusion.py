"""Published diffusion transformers (SiT, REPA, REG, LightningDiT) become a DiffusionTransformer.

Parameters keep their published names, but for REG's class token. The fixed tables that the published models
store are compared with ours before they are dropped. Original SiT and LightningDiT were trained with t = 1 as
data, which the config records (`published_time`).

Statistics of the latents: mean and std of a `latents_stats` file, std over LightningDiT's
`latent_multiplier`. Without such a file the mean is 0 and the std 1 / multiplier, and where the config has
none either, SiT, REPA and REG with 4 channels have 0.18215: they are published on latents of the Stable
Diffusion autoencoder times that. A config that says that latents were normalised needs the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmvae.convert.diffusion_config import Published, Source, published_config
from vfmvae.deferred import fill, without_parameters
from vfmvae.diffusion import DiffusionTransformer

SD_VAE_SCALE = 0.18215
SD_VAE_CHANNELS = 4
TABLE_TOLERANCE = 1e-4
RENAMED = {"class_token_embedder.proj.": "cls_projectors2.", "class_token_embedder.norm.": "wg_norm."}
STATISTICS = ("latents_mean", "latents_std")
NULL_CLASS = "y_embedder.embedding_table.weight"


def convert(
    source: Source,
    state: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    statistics: tuple[Tensor, Tensor] | None = None,
    where: str | Path = "checkpoint",
) -> DiffusionTransformer:
    """A published model's parameters and arguments -> DiffusionTransformer with the same numbers.

    Args:
        source: whose model it is.
        state: its state dict, with the published names.
        arguments: published arguments, see vfmvae.convert.diffusion_config.
        statistics: mean and std [C] of the latents in training.
        where: the checkpoint's file, for errors.

    Returns it in eval mode, parameters float32. Raises ValueError naming every parameter that is missing, has
    no place, another shape or values that are not finite; a table that is not ours; an argument that does not
    fit.
    """
    published = published_config(source, arguments, state)
    with without_parameters():
        model = DiffusionTransformer(published.config)
    try:
        values = _values(_without_tables(state, model), model)
        mean, std = _statistics(source, published, statistics)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    fill(model, {**values, "latents_mean": mean, "latents_std": std}, "cpu")
    return model.eval()


def _without_tables(state: Mapping[str, Tensor], model: DiffusionTransformer) -> dict[str, Tensor]:
    """What is left without the fixed tables, each of which must be what our model computes."""
    tables = {"pos_embed": model.positions[None]}
    if model.config.rope:
        tables |= {"feat_rope.freqs_cos": model.rotary_cos, "feat_rope.freqs_sin": model.rotary_sin}
    for name, ours in tables.items():
        theirs = state.get(name)
        if theirs is None:  # a file without them: they are no parameters
            continue
        if theirs.shape != ours.shape:
            raise ValueError(
                f"{name} is {list(theirs.shape)} in the checkpoint, and the arguments give"
                f" {list(ours.shape)}; check input_size ({model.config.latent_size}), patch_size"
                f" ({model.config.patch}) and the widths"
            )
        # Rounded alike, for checkpoints in half precision.
        difference = (theirs.float() - ours.to(theirs.dtype).float()).abs().max().item()
        if not difference <= TABLE_TOLERANCE:  # NaN too
            raise ValueError(
                f"{name} differs by {difference:.2g} from the fixed table that this model uses, so that it"
                f" would compute something else; it is not a published model"
            )
    return {name: tensor for name, tensor in state.items() if name not in tables}


def _values(state: Mapping[str, Tensor], model: DiffusionTransformer) -> dict[str, Tensor]:
    """A value for each parameter; all that is missing or left over is one error, in published names."""
    target = {_published_name(name): name for name in model.state_dict() if name not in STATISTICS}
    own = model.state_dict()
    missing, extra = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    if missing or extra:
        raise ValueError(
            f"checkpoint and arguments do not belong together: the arguments call for {_some(missing)} more,"
            f" and have no place for {_some(extra)}"
        )
    if state[NULL_CLASS].shape[:1] == (model.config.classes,):
        raise ValueError(
            f"{NULL_CLASS} has {model.config.classes} rows, one for each class and none for the null class"
            f" (class_dropout_prob 0); only models that were trained with one are supported"
        )
    for name, ours in target.items():
        tensor, needed = state[name], own[ours].shape
        if tensor.shape != needed:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint, the arguments give"
                f" {tuple(needed)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds values that are not finite: the checkpoint is of a failed training"
            )
    return {ours: state[name] for name, ours in target.items()}


def _published_name(name: str) -> str:
    for ours, theirs in RENAMED.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def _statistics(
    source: Source, published: Published, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Mean and std [C] of the latents, see the module's docstring."""
    channels, multiplier = published.config.channels, published.latent_multiplier
    if given is None:
        if published.latent_norm:
            raise ValueError(
                "its latents were normalised (latent_norm: true), by statistics that it does not hold; give"
                " them with --statistics latents_stats.pt"
            )
        if multiplier is None and source != "lightningdit" and channels == SD_VAE_CHANNELS:
            multiplier = SD_VAE_SCALE
        return torch.zeros(channels), torch.ones(channels) / (multiplier or 1.0)
    if published.latent_norm is False:
        raise ValueError(
            "its latents were not normalised (latent_norm: false); leave the statistics of --statistics out"
        )
    mean, std = given
    if mean.shape != (channels,) or std.shape != (channels,):
        raise ValueError(
            f"the statistics are of {len(mean)} channels, and the model's latents have {channels}"
        )
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError("the statistics hold values that are not finite, or stds that are not above 0")
    return mean, std / (multiplier or 1.0)


def _some(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit]) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} others"
