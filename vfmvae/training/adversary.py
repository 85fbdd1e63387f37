"""Discriminators in training: each has its losses, its optimizer and its guard.

A game is a module whose forward is the discriminator's own loss, so that DDP can wrap it; the tokenizer's
side of it is `generator_losses`. Both take what `look` makes of the generated images: what does not depend on
the discriminator's parameters need not be computed for each. Images are [B, 3, H, W], about [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vfmvae.discriminators import AUGMENT_UNIFORMS, PatchDiscriminator, ProjectedDiscriminator
from vfmvae.discriminators.blur import Blur, gaussian_blur
from vfmvae.losses.adversarial import (
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    lsgan_discriminator_loss,
    lsgan_generator_loss,
    r1_penalty,
)
from vfmvae.training.draws import StepDraws
from vfmvae.training.guard import StepGuard
from vfmvae.training.objective import Weights


class ProjectedAdversary(nn.Module):
    """The hinge game on a frozen backbone's features."""

    def __init__(self, discriminator: ProjectedDiscriminator) -> None:
        super().__init__()
        # In training mode spectral norms would be iterated in every pass. They are as often as in the
        # published step, which has three, however many passes this one takes: `prepare`, `follow`.
        self.discriminator = discriminator.eval()

    def prepare(self) -> None:
        """Before the discriminator's passes of a step: two iterations of the spectral norms, one for the pass
        of real images and one for that of generated ones.
        """
        for _ in range(2):
            self.discriminator.iterate_spectral_norms()

    def follow(self) -> None:
        """After the discriminator's update, before the tokenizer's pass: the third iteration."""
        self.discriminator.iterate_spectral_norms()

    def forward(
        self,
        real: Tensor,
        fake: Sequence[Tensor],
        draws: StepDraws,
        blur: Blur | None,
        weights: Weights,
    ) -> Tensor:
        """The discriminator's loss, a scalar. `blur`: of what it sees; `fake`: of `look`."""
        penalised = "r1" in weights
        if penalised:
            real = real.detach().requires_grad_()
        looked = self.look(real, draws, blur, double_backward=penalised)
        both = [torch.cat(pair) for pair in zip(looked, fake, strict=True)]
        of_real, of_fake = self.discriminator.judge(both, batches=2).chunk(2)
        loss = hinge_discriminator_loss(of_real, of_fake)
        return loss + weights["r1"] * r1_penalty(real, of_real) if penalised else loss

    def generator_losses(
        self, fake: Sequence[Tensor], real: Tensor, blur: Blur | None, weights: Weights
    ) -> dict[str, Tensor]:
        """The terms that ask the tokenizer to pass for real, by name; unweighted scalars."""
        if "adversarial" not in weights:
            return {}
        return {"adversarial": hinge_generator_loss(self.discriminator.judge(fake))}

    def look(
        self, images: Tensor, draws: StepDraws, blur: Blur | None, double_backward: bool = False
    ) -> list[Tensor]:
        """The backbone's features of images blurred, then augmented by draws of their own.

        `double_backward`: the gradient at the images will be differentiated again.
        """
        crop, uniforms = draws.uniform_of_batch(3), draws.uniform((AUGMENT_UNIFORMS,))
        return self.discriminator.features(
            blurred(images, blur), uniforms, crop, double_backward=double_backward
        )


class PatchAdversary(nn.Module):
    """The least-squares game on patches at three scales, and its feature matching."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def prepare(self) -> None:
        """Nothing to do before a step."""

    def follow(self) -> None:
        """Nor after the update."""

    def forward(
        self,
        real: Tensor,
        fake: Sequence[Tensor],
        draws: StepDraws,
        blur: Blur | None,
        weights: Weights,
    ) -> Tensor:
        """The discriminator's loss, a scalar. `fake`: of `look`."""
        of_real, of_fake = self.discriminator(blurred(real, blur)), self.discriminator(*fake)
        return lsgan_discriminator_loss([o.logits for o in of_real], [o.logits for o in of_fake])

    def generator_losses(
        self, fake: Sequence[Tensor], real: Tensor, blur: Blur | None, weights: Weights
    ) -> dict[str, Tensor]:
        """The terms that ask the tokenizer to pass for real, by name; unweighted scalars."""
        losses = {}
        of_fake = self.discriminator(*fake)
        if "patch_adversarial" in weights:
            losses["patch_adversarial"] = lsgan_generator_loss([o.logits for o in of_fake])
        if "feature_matching" in weights:
            with torch.no_grad():
                of_real = self.discriminator(blurred(real, blur))
            losses["feature_matching"] = feature_matching_loss(
                [o.features for o in of_fake], [o.features for o in of_real]
            )
        return losses

    def look(self, images: Tensor, draws: StepDraws, blur: Blur | None) -> list[Tensor]:
        """The images, blurred; nothing is drawn."""
        return [blurred(images, blur)]


def blurred(images: Tensor, blur: Blur | None) -> Tensor:
    return images if blur is None else gaussian_blur(images, *blur)


TERMS_OF = {"projected": ("adversarial",), "patch": ("patch_adversarial", "feature_matching")}
"""Which terms of a stage each adversary gives; a stage without them leaves it alone."""


@dataclass
class Adversary:
    """One discriminator of a run, by its name in `TERMS_OF`."""

    name: str
    game: ProjectedAdversary | PatchAdversary
    model: nn.Module
    """`game`, wrapped for the run's processes; called for the discriminator's loss."""
    optimizer: torch.optim.Optimizer
    guard: StepGuard

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.game.parameters() if p.requires_grad]
