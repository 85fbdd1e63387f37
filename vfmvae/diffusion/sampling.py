"""Latents from noise, with a trained diffusion transformer: `sample`; `run` gives the class token too.

Every random number of a sample is a function of (seed, number of the sample), see `sample_noise`, so the size
of a batch and the number of processes change nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vfmvae.diffusion.flow import check_shift
from vfmvae.diffusion.guidance import Guidance, GuidedVelocity, guided_velocity
from vfmvae.diffusion.samplers import dopri5, euler, euler_maruyama, heun, time_grid
from vfmvae.serialization import check_fields

if TYPE_CHECKING:
    from vfmvae.diffusion.transformer import DiffusionTransformer

Sampler = Literal["euler", "heun", "dopri5", "sde"]

LATENTS, CLASS_TOKEN, FIRST_STEP = 0, 1, 2
"""Draws of a sample: its two initial noises, then one for each step of the SDE."""


@dataclass(frozen=True)
class Sampling:
    """How latents are made of noise; see docs/sampling.md for the published settings."""

    sampler: Sampler = "euler"
    """Methods for the ODE: euler, heun, dopri5; for the SDE: sde, Euler-Maruyama, on the linear path only."""
    steps: int = 250
    """dopri5 chooses its own."""
    guidance: Guidance = field(default_factory=Guidance)
    """How much classes, or a better model, are exaggerated."""
    shift: float = 1.0
    """s of t' = s t / (1 + (s - 1) t) for the times of the steps; 1: evenly spaced."""

    def __post_init__(self) -> None:
        check_fields(self, "sampling")
        if self.steps < 1:
            raise ValueError(f"sampling.steps is {self.steps}; it must be at least 1")
        check_shift(self.shift, "sampling.shift")
        if self.sampler == "dopri5" and self.shift != 1:
            raise ValueError(f"sampling.shift is {self.shift}; sampler 'dopri5' chooses its own times")


def as_trained(settings: Sampling, shift: float) -> Sampling:
    """Settings for a model whose times in training were shifted by `shift`, which its grid is then too.

    Shifts multiply, and settings come with one of their own. dopri5 chooses its times itself.
    """
    return settings if settings.sampler == "dopri5" else replace(settings, shift=shift * settings.shift)


class Sample(NamedTuple):
    """Latents [B, C, h, w], and the class token [B, K] of a model that has one; float32."""

    latents: Tensor
    class_token: Tensor | None


def sample(
    model: DiffusionTransformer,
    noise: Tensor,
    labels: Tensor,
    sampler: Sampler = "euler",
    steps: int = 250,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    null_label: int | None = None,
    *,
    class_token_noise: Tensor | None = None,
    class_token_guidance: float | None = None,
    guidance_channels: int | None = None,
    guide: DiffusionTransformer | None = None,
    shift: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Latents [B, C, h, w] in float32, as the model was trained on them; see `Sampling` and `run`.

        noise = sample_noise(seed, range(8), (32, 16, 16)).to(device)
        latents = vfmvae.sample(model, noise, labels, "heun", steps=50, guidance=1.5)

    Args, beside those of `run` and the fields of `Sampling`:
        guidance, guidance_interval, guidance_channels, class_token_guidance: the fields of `Guidance`.
    """
    how = Guidance(guidance, guidance_interval, guidance_channels, class_token_guidance)
    return run(
        Sampling(sampler, steps, how, shift),
        model,
        noise,
        labels,
        null_label=null_label,
        class_token_noise=class_token_noise,
        guide=guide,
        seed=seed,
        numbers=numbers,
    ).latents


@torch.no_grad()
def run(
    settings: Sampling,
    model: DiffusionTransformer,
    noise: Tensor,
    labels: Tensor,
    *,
    null_label: int | None = None,
    class_token_noise: Tensor | None = None,
    guide: DiffusionTransformer | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Sample:
    """Latents, and the class token of a model that has one.

    The state is float64; the models compute in their own dtype, in eval mode, and are left as they were.

    Args:
        noise: standard normal [B, C, h, w] on the model's device.
        labels: int64 [B] on the same device.
        null_label: what classifier-free guidance guides away from; None: the model's null class.
        class_token_noise: standard normal [B, K]; None: drawn from `seed` where the model needs it.
        guide: a weaker model of the same latents to guide away from, in place of the null class.
        seed, numbers: with number i the SDE's noise for sample i is drawn; None: 0 to B - 1.

    Raises ValueError for shapes, labels or settings that do not fit the model.
    """
    numbers = range(len(noise)) if numbers is None else numbers
    null_label = model.config.classes if null_label is None else null_label
    _check(model, noise, labels, null_label, numbers, settings.guidance, guide)
    width = model.config.class_token_width
    if width is None and class_token_noise is not None:
        raise ValueError("class_token_noise is given, and this model has no class token")
    if width is not None and class_token_noise is None:
        class_token_noise = sample_noise(seed, numbers, (width,), CLASS_TOKEN)
    token = None if class_token_noise is None else class_token_noise.to(noise.device)

    with _evaluating(model, *([] if guide is None else [guide])):
        if settings.sampler != "dopri5":
            velocity = guided_velocity(model, labels, null_label, settings.guidance, guide)
            return _solve(settings, velocity, noise, token, seed, numbers)
        # Its steps follow the errors of a whole batch: alone, a sample does not depend on its neighbours.
        alone = []
        for i in range(len(noise)):
            one = slice(i, i + 1)
            velocity = guided_velocity(model, labels[one], null_label, settings.guidance, guide)
            its_token = None if token is None else token[one]
            alone.append(_solve(settings, velocity, noise[one], its_token, seed, numbers[one]))
    tokens = [made.class_token for made in alone if made.class_token is not None]
    return Sample(torch.cat([made.latents for made in alone]), torch.cat(tokens) if tokens else None)


def sample_noise(seed: int, numbers: Sequence[int], shape: Sequence[int], draw: int = LATENTS) -> Tensor:
    """Standard normal numbers [len(numbers), *shape], float32 on the CPU: the same for every device.

    Each sample has a counter of its own in numpy's Philox (Salmon et al., SC 2011); `draw` is a word of it.

    Raises ValueError for negative numbers.
    """
    if min(seed, draw, *numbers, 0) < 0:
        raise ValueError(f"seed {seed} and the samples' numbers name random numbers; none may be negative")
    noise = np.empty((len(numbers), *shape), dtype=np.float32)
    for row, number in zip(noise, numbers, strict=True):
        counter = np.array([0, draw, 0, number], dtype=np.uint64)  # drawing advances the first word
        generator = np.random.Generator(np.random.Philox(counter=counter, key=seed))
        generator.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def _solve(
    settings: Sampling,
    velocity: GuidedVelocity,
    noise: Tensor,
    token: Tensor | None,
    seed: int,
    numbers: Sequence[int],
) -> Sample:
    """One batch, with latents and class token as one flat state [B, N]."""
    shape, elements = noise.shape, noise[0].numel()

    def split(state: Tensor) -> tuple[Tensor, Tensor | None]:
        return state[:, :elements].view(shape), None if token is None else state[:, elements:]

    def joined(latents: Tensor, class_token: Tensor | None) -> Tensor:
        flat = latents.flatten(1)
        return flat if class_token is None else torch.cat([flat, class_token], dim=1)

    def flow(state: Tensor, t: float, start: float) -> Tensor:
        return joined(*velocity(*split(state), t, start))

    def fresh(step: int) -> Tensor:
        drawn = sample_noise(seed, numbers, state.shape[1:], FIRST_STEP + step)
        if noise.is_cuda:  # drawn while the device computes, which the copy does not wait for either
            drawn = drawn.pin_memory()
        return drawn.to(noise.device, non_blocking=True)

    state = joined(noise.double(), None if token is None else token.double())
    if settings.sampler == "dopri5":
        inside = {end for end in settings.guidance.interval if 0 < end < 1}
        state = dopri5(flow, state, [1.0, *sorted(inside, reverse=True), 0.0])
    else:
        times = time_grid(settings.steps, settings.shift, stochastic=settings.sampler == "sde")
        if settings.sampler == "sde":
            state = euler_maruyama(flow, state, times, fresh)
        else:
            state = (heun if settings.sampler == "heun" else euler)(flow, state, times)
    latents, class_token = split(state)
    return Sample(latents.float(), None if class_token is None else class_token.float())


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every part is in the mode that it was in."""
    training = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _check(
    model: DiffusionTransformer,
    noise: Tensor,
    labels: Tensor,
    null_label: int,
    numbers: Sequence[int],
    guidance: Guidance,
    guide: DiffusionTransformer | None,
) -> None:
    """ValueError for what the model would not say, or say too late."""
    if labels.shape != noise.shape[:1] or len(numbers) != len(noise):
        raise ValueError(
            f"noise {tuple(noise.shape)}, labels {tuple(labels.shape)} and {len(numbers)} numbers of samples"
            f" do not fit; each sample has one of each"
        )
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}; needed are whole numbers")
    classes = model.config.classes
    lowest, highest = (int(label) for label in torch.aminmax(labels)) if len(labels) else (0, 0)
    for label in (lowest, highest, null_label):
        if not 0 <= label <= classes:
            raise ValueError(
                f"label {label} does not exist; this model has 0 to {classes - 1}, and {classes} is its null"
                f" class"
            )
    if guidance.channels is not None and guidance.channels > noise.shape[1]:
        raise ValueError(
            f"guidance.channels is {guidance.channels}; the latents have {noise.shape[1]} channels"
        )
    if guidance.class_token_scale is not None and model.config.class_token_width is None:
        raise ValueError("guidance.class_token_scale is given, and this model has no class token")
    ours = (model.config.channels, model.config.latent_size, model.config.class_token_width)
    if guide is not None:
        theirs = (guide.config.channels, guide.config.latent_size, guide.config.class_token_width)
        if ours != theirs:
            raise ValueError(
                f"the guide has (channels, latent size, class token width) {theirs}, the model {ours};"
                f" they must be the same"
            )
        if guide.config.classes < classes:
            raise ValueError(f"the guide has {guide.config.classes} classes, the model {classes}")
