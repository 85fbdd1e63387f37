"""What decides, on the device and without waiting for it, whether an update may happen.

A step whose gradients are not finite, or far larger than lately, changes nothing; the guard counts it. Under
fp16 the same verdict moves the scale of the loss (Micikevicius et al. 2018, arXiv 1710.03740).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vfmvae.serialization import check_fields
from vfmvae.training.distributed import mean_over_ranks
from vfmvae.training.optim import gradient_norm, scale_gradients


@dataclass(frozen=True)
class SafetyConfig:
    """When a step is skipped, and when the run goes back."""

    explosion: float = 100.0
    """A gradient norm above this multiple of its running mean skips the step; 0: only non-finite ones do."""
    max_skips: int = 20
    """After so many skipped steps in a row the run goes back to its last checkpoint."""
    max_rollbacks: int = 3
    """After so many returns without a new checkpoint in between the run ends with an error."""

    def __post_init__(self) -> None:
        check_fields(self, "safety")
        if self.explosion < 0 or 0 < self.explosion <= 1:
            raise ValueError(f"safety.explosion is {self.explosion}; it must be 0, or above 1")
        if self.max_skips < 1 or self.max_rollbacks < 0:
            raise ValueError(
                f"safety.max_skips is {self.max_skips} and max_rollbacks {self.max_rollbacks};"
                f" they must be at least 1 and 0"
            )


class StepGuard:
    """Watches the gradients of one optimizer.

    All its numbers are tensors on the device: `skipped` (in all), `in_a_row`, `scale` (of the loss, 1 unless
    fp16).
    """

    FIRST_SCALE = 2.0**16  # of fp16
    WARMUP = 100  # steps before the running mean is trusted
    MEAN_WEIGHT = 0.02  # of the newest norm in the running mean
    MEAN_GROWTH = 1.1  # of the running mean with a step that was skipped for its size
    GROWTH_STEPS = 2000  # good steps after which the scale doubles

    def __init__(self, config: SafetyConfig, device: torch.device, scaled: bool) -> None:
        """`scaled`: gradients come multiplied by `scale`, as fp16 needs."""
        self._explosion = config.explosion
        self.scaled = scaled
        self._numbers = {
            name: torch.tensor(value, device=device)
            for name, value in {
                "scale": self.FIRST_SCALE if scaled else 1.0,
                "mean_norm": 0.0,
                "good": 0.0,
                "good_at_scale": 0.0,
                "skipped": 0.0,
                "in_a_row": 0.0,
            }.items()
        }

    @property
    def scale(self) -> Tensor:
        return self._numbers["scale"]

    @property
    def skipped(self) -> Tensor:
        return self._numbers["skipped"]

    @property
    def in_a_row(self) -> Tensor:
        return self._numbers["in_a_row"]

    @torch.no_grad()
    def judge(self, norm: Tensor, loss: Tensor) -> Tensor:
        """Take the gradients' norm (without the scale) and the loss; 1.0 to skip this step, else 0.0.

        Every rank must give the same norm; one computed after gradients were reduced is the same.
        """
        numbers = self._numbers
        bad = broken = ~(norm.isfinite() & loss.isfinite())
        if self._explosion:
            trusted = numbers["good"] >= self.WARMUP
            bad = bad | (trusted & (norm > self._explosion * numbers["mean_norm"]))
        # A discriminator that has won has no gradients for a while, which says nothing of those to come.
        good = ~bad & (norm > 0)
        weight = torch.where(numbers["good"] == 0, 1.0, self.MEAN_WEIGHT)
        before = numbers["mean_norm"]
        mean = before.lerp(norm.float().nan_to_num(), weight)
        # Where gradients stay as large as that they have not exploded: the loss is another one.
        mean = torch.where(bad & ~broken, before * self.MEAN_GROWTH, mean)
        before.copy_(torch.where(good | (bad & ~broken), mean, before))
        numbers["good"] += good
        numbers["skipped"] += bad
        numbers["in_a_row"].add_(1.0).mul_(bad)
        if self.scaled:
            self._move_scale(bad)
        return bad.float()

    def _move_scale(self, bad: Tensor) -> None:
        """Halve the scale after a bad step, double it after many good ones."""
        steps = self._numbers["good_at_scale"]
        steps.add_(1.0).mul_(~bad)
        grows = steps >= self.GROWTH_STEPS
        self.scale.mul_(torch.where(bad, 0.5, torch.where(grows, 2.0, 1.0)))
        steps.mul_(~grows)

    def begin_stage(self) -> None:
        """Forget how large gradients were: another stage has other losses."""
        for name in ("mean_norm", "good"):
            self._numbers[name].zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return self._numbers

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave; the scale only from fp16 to fp16, which begins anew otherwise."""
        for name, number in self._numbers.items():
            number.copy_(state[name])
        if self.scaled:
            self.scale.copy_(torch.where(self.scale == 1.0, self.FIRST_SCALE, self.scale))
        else:
            self.scale.fill_(1.0)


def guarded_update(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """`optimizer.step()` unless `skip` is 1.0.

    torch's fused optimizers read the flag on the device; for others this waits for it.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()


def clipped_update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    guard: StepGuard,
    loss: Tensor,
    clip_norm: float,
) -> tuple[Tensor, Tensor]:
    """One optimizer step from the gradients there are, unless the guard objects.

    Returns 1.0 if it did, else 0.0, and the norm of the gradients.
    """
    loss = loss.clone()
    mean_over_ranks(loss)
    norm = gradient_norm(parameters) / guard.scale
    skip = guard.judge(norm, loss)
    if clip_norm or guard.scaled:
        factor = guard.scale.reciprocal()
        scale_gradients(
            parameters, factor * (clip_norm / (norm + 1e-6)).clamp(max=1.0) if clip_norm else factor
        )
    guarded_update(optimizer, skip)
    return skip, norm


class BufferGuard:
    """Keeps a module's floating-point buffers (running means) as they were before a step that is skipped."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._buffers = [b for b in module.buffers() if b.is_floating_point()]
        self._before = [b.clone() for b in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the buffers before a step."""
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    @torch.no_grad()
    def restore(self, skip: Tensor) -> None:
        """Put them back if `skip` is 1.0."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skip.bool(), before, buffer))
