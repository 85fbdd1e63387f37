"""The diffusion models of convergence.py: trained as one, measured one by one.

All runs have the same architecture and latents of the same size, so their parameters are stacked and
`torch.func.vmap` runs them together: one model with an axis more, R runs. What a seed draws (weights, images,
noise, times) is the same for every tokenizer, with and without REPA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from convergence_models import Kind
from torch import Tensor

from vfmvae.diffusion.config import TransformerConfig
from vfmvae.diffusion.flow import path_point
from vfmvae.diffusion.transformer import DiffusionTransformer
from vfmvae.losses.diffusion import token_alignment_loss, velocity_loss
from vfmvae.metrics.similarity import cknna, clamp_and_normalise

REPA_WEIGHT = 0.5
LABEL_DROPOUT = 0.1
EMA_SHARE = 0.05
"""Half-life of the average of weights, as a share of the steps so far."""
FEATURE_TIME = 0.5  # at which blocks are compared with the encoder


class Run(NamedTuple):
    """One diffusion model."""

    kind: Kind
    repa: bool
    seed: int


@dataclass(frozen=True)
class Latents:
    """What the runs train on: a pool's normalised latents by tokenizer, labels and the encoder's tokens."""

    of: dict[Kind, Tensor]  # [N, C, h, w] each
    labels: Tensor  # int64 [N]
    targets: Tensor  # [N, tokens, width]


class Stack:
    """The models of `runs` with their optimizer and the averages of their weights."""

    def __init__(
        self, config: TransformerConfig, runs: Sequence[Run], device: torch.device, rate: float
    ) -> None:
        self.runs = list(runs)
        self.model = DiffusionTransformer(config, fused=False).to(
            device
        )  # vmap sees through plain torch only
        states = [initial_state(config, run.seed) for run in runs]
        self.parameters = {
            name: torch.stack([state[name] for state in states]).to(device).requires_grad_()
            for name, _ in self.model.named_parameters()
        }
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
        )
        self.repa = torch.tensor([REPA_WEIGHT * run.repa for run in runs], device=device)
        self.steps = 0

    def update(self, x: Tensor, velocity: Tensor, t: Tensor, labels: Tensor, targets: Tensor) -> None:
        """A step of every run; x and velocity [R, B, C, h, w], t and labels [R, B], targets [R, B, T, D]."""
        gradients = torch.func.vmap(torch.func.grad(self._loss))(
            self.parameters, x, velocity, t, labels, targets, self.repa
        )
        norm = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()
        scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)  # each run's gradient is clipped to length 1
        for name, gradient in gradients.items():
            self.parameters[name].grad = gradient * scale.view(-1, *[1] * (gradient.ndim - 1))
        self.optimizer.step()
        self.steps += 1
        moved = 1 - 0.5 ** (1 / max(EMA_SHARE * self.steps, 1e-6))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averages.values()), [p.detach() for p in self.parameters.values()], moved
            )

    def _loss(
        self,
        parameters: dict[str, Tensor],
        x: Tensor,
        velocity: Tensor,
        t: Tensor,
        labels: Tensor,
        targets: Tensor,
        repa: Tensor,
    ) -> Tensor:
        out = torch.func.functional_call(self.model, parameters, (x, t, labels))
        aligned = token_alignment_loss(out.projected[0], targets)
        return velocity_loss(out.velocity, velocity) + repa * aligned

    def averaged(self, number: int) -> DiffusionTransformer:
        """Run `number` with its averaged weights; the same module every time."""
        state = {name: average[number] for name, average in self.averages.items()}
        self.model.load_state_dict(state, strict=False)
        return self.model.eval()


def initial_state(config: TransformerConfig, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiffusionTransformer(config, fused=False).state_dict()


def train_runs(
    stack: Stack,
    latents: Latents,
    batch_size: int,
    evaluate_at: Sequence[int],
    measure: Callable[[int], None],
    advance: Callable[[], None],
) -> None:
    """Train all runs to the last of `evaluate_at`; `measure` is called with each of these steps."""
    device = latents.labels.device
    seeds = {run.seed: torch.Generator(device).manual_seed(run.seed) for run in stack.runs}
    shape = next(iter(latents.of.values())).shape
    null = stack.model.config.classes
    rates = torch.optim.lr_scheduler.LambdaLR(
        stack.optimizer, lambda step: min(1.0, (step + 1) / max(1, evaluate_at[-1] // 20))
    )
    for step in range(1, evaluate_at[-1] + 1):
        chosen, noise, times, dropped = {}, {}, {}, {}
        for seed, generator in seeds.items():
            chosen[seed] = torch.randint(shape[0], (batch_size,), generator=generator, device=device)
            noise[seed] = torch.randn(batch_size, *shape[1:], generator=generator, device=device)
            times[seed] = torch.rand(batch_size, generator=generator, device=device)
            dropped[seed] = torch.rand(batch_size, generator=generator, device=device) < LABEL_DROPOUT
        points = [
            path_point(latents.of[run.kind][chosen[run.seed]], noise[run.seed], times[run.seed])
            for run in stack.runs
        ]
        labels = {
            seed: latents.labels[place].masked_fill(dropped[seed], null) for seed, place in chosen.items()
        }
        stack.update(
            torch.stack([point.x for point in points]),
            torch.stack([point.velocity for point in points]),
            torch.stack([times[run.seed] for run in stack.runs]),
            torch.stack([labels[run.seed] for run in stack.runs]),
            torch.stack([latents.targets[chosen[run.seed]] for run in stack.runs]),
        )
        rates.step()
        advance()
        if step in evaluate_at:
            measure(step)


@torch.no_grad()
def block_alignment(model: DiffusionTransformer, latents: Tensor, encoder: Tensor, k: int) -> list[float]:
    """CKNNA of each block's mean token with the encoder's, [N, D]: t = 0.5, null class, one noise for all."""
    generator = torch.Generator(latents.device).manual_seed(2)
    blocks: list[list[Tensor]] = []
    for part in latents.split(256):
        noise = torch.randn(part.shape, generator=generator, device=part.device)
        t = torch.full((len(part),), FEATURE_TIME, device=part.device)
        null = torch.full((len(part),), model.config.classes, device=part.device)
        tokens = model.features(path_point(part, noise, t).x, t, null)
        blocks.append([block.mean(dim=1) for block in tokens])
    return [alignment(torch.cat(block), encoder, k) for block in zip(*blocks, strict=True)]


def alignment(features: Tensor, encoder: Tensor, k: int) -> float:
    """CKNNA by the published protocol."""
    return cknna(clamp_and_normalise(features.double()), clamp_and_normalise(encoder.double()), k)


# How much sooner ------------------------------------------------------------------------------------------


class Reach(NamedTuple):
    """Steps of the first over steps of the second, to the same distance."""

    ratio: float
    kind: Literal["measured", "at least", "less than", "unresolved"]

    def __str__(self) -> str:
        return f"{'' if self.kind == 'measured' else self.kind + ' '}{self.ratio:.2f}"


def steps_to_reach(steps: Sequence[int], first: Sequence[float], second: Sequence[float]) -> Reach:
    """How many times sooner the second curve comes down to where the first ends.

    Steps that the first needs (all of them, or fewer where it was there before) over those of the second,
    both interpolated linearly between measurements. A second curve below at its first measurement gives a
    lower bound; one that never comes there an upper bound, and so does a first curve that was there at its
    first measurement. If both were, nothing is known. ValueError for curves of other lengths.
    """
    if not len(steps) == len(first) == len(second) >= 1:
        raise ValueError(
            f"curves of {len(first)} and {len(second)} points for {len(steps)} steps; each needs one"
        )
    goal = first[-1]
    of_first, of_second = _crossing(steps, first, goal), _crossing(steps, second, goal)
    assert of_first is not None, "a curve reaches its own end"
    early, second_early = first[0] <= goal, second[0] <= goal
    ratio = of_first / (steps[-1] if of_second is None else of_second)
    if early and second_early:
        return Reach(ratio, "unresolved")
    if early or of_second is None:
        return Reach(ratio, "less than")
    return Reach(ratio, "at least" if second_early else "measured")


def _crossing(steps: Sequence[int], values: Sequence[float], goal: float) -> float | None:
    """The first step at which a curve is at `goal` or below."""
    if values[0] <= goal:
        return float(steps[0])
    for number in range(1, len(steps)):
        if values[number] <= goal:
            share = (values[number - 1] - goal) / (values[number - 1] - values[number])
            return steps[number - 1] + share * (steps[number] - steps[number - 1])
    return None


def median_of(reached: Sequence[Reach]) -> Reach:
    """The middle one of an odd number of seeds, a bound if that is one; of an even number the lower."""
    return sorted(reached, key=lambda reach: reach.ratio)[(len(reached) - 1) // 2]


def balanced_labels(count: int, classes: int, device: torch.device) -> Tensor:
    """Every class as often as every other: [count]."""
    return torch.arange(count, device=device) % classes


def sample_noise(count: int, config: TransformerConfig, device: torch.device) -> Tensor:
    """The same for every run and step."""
    generator = torch.Generator(device).manual_seed(3)
    size = (config.channels, config.latent_size, config.latent_size)
    return torch.randn(count, *size, generator=generator, device=device)


def normalised(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N, C, h, w] with mean 0 and deviation 1 per channel; mean and deviation [C, 1, 1]."""
    numbers = latents.double()
    mean = numbers.mean(dim=(0, 2, 3), keepdim=True)[0].float()
    std = numbers.std(dim=(0, 2, 3), keepdim=True)[0].float()
    return (latents - mean) / std, mean, std
