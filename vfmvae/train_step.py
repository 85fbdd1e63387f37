"""One training step: the discriminators' update, then the tokenizer's, from one forward.

    output = forward(images)                        the graph stays
    discriminators learn from output, detached      discriminator_step
    tokenizer learns through the kept graph         generator_step

The tokenizer's weights do not change in between, nor does a discriminator's frozen backbone, so what they
compute need not be computed again for the second part; only the random draws are shared
(`engine.share_forward` restores independent ones). Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vfmvae.images import to_unit
from vfmvae.tokenizer.equivariance import EQUIVARIANCE_UNIFORMS, Equivariance, draw_equivariance
from vfmvae.train_job import Job
from vfmvae.training.adaptive import (
    BALANCED_TERMS,
    Balanced,
    DeferredLoss,
    deferred_adversarial,
    deferred_alignment,
)
from vfmvae.training.adversary import TERMS_OF, Adversary
from vfmvae.training.draws import StepDraws
from vfmvae.training.forward import StepOutput
from vfmvae.training.guard import clipped_update
from vfmvae.training.job import StepResult
from vfmvae.training.objective import (
    Weights,
    alignment_gradients,
    cut,
    decoder_backward,
    encoder_backward,
    gradients_at,
    image_losses,
    latent_losses,
    pair_at,
    weighted_sum,
)
from vfmvae.training.optim import scale_gradients
from vfmvae.training.reduction import reduce_unsharded, reducing, settle_unused

TOKENIZER, DISCRIMINATOR, GENERATOR, SECOND_FORWARD, SECOND_LOOK, COMPANION = range(6)
"""Streams of random draws: users of one step that do not know how often the others draw. The first companion
has the last of these, the others those that follow."""


class Part(NamedTuple):
    """A share of the batch that one process computes at once."""

    images: Tensor  # [b, 3, R, R] in [-1, 1]
    first: int  # its place in the global batch
    number: int = 0  # among this process's parts
    parts: int = 1  # how many these are


class Begun(NamedTuple):
    """What the discriminators' update has computed that the tokenizer's can use."""

    output: StepOutput
    leaves: list[Tensor]  # the images, where the losses' graphs begin
    looks: dict[str, list[Tensor]]  # what each discriminator looks at, by a graph from the leaves


def training_step(job: Job, batch: Sequence[Tensor], weights: Weights) -> StepResult:
    """One update of everything that trains.

    Args:
        batch: this process's images of the step, uint8 [b, 3, R, R] each: one part, or several to accumulate.
        weights: of the terms that are on in this step.
    """
    result = update_all(job, batch, weights)
    conclude(job, weights)
    return result


def conclude(job: Job, weights: Weights) -> None:
    """What follows the updates of a step."""
    job.average()
    job.note_measured(weights)


def update_all(job: Job, batch: Sequence[Tensor], weights: Weights) -> StepResult:
    """The updates of a step: all of it that happens on the device alone (vfmvae.train_graphs)."""
    # Before the forward: the last step's gradients need no room beside this one's activations.
    for optimizer in (job.optimizer, *(c.optimizer for c in job.companions)):
        optimizer.zero_grad(set_to_none=True)
    for buffers in (job.buffers, *(c.buffers for c in job.companions)):
        buffers.keep()
    parts = [
        Part(to_unit(images), job.first_image(number), number, len(batch))
        for number, images in enumerate(batch)
    ]
    losses: dict[str, Tensor] = {}
    skipped: dict[str, Tensor] = {}
    begun = None
    if job.playing:
        if job.config.engine.share_forward and len(parts) == 1:
            begun = begin(job, parts[0], weights)
            targets = [begun.output.targets]
            fakes = {name: [[x.detach() for x in look]] for name, look in begun.looks.items()}
        else:
            fakes, targets = discriminator_views(job, parts, weights)
        for adversary in job.playing:
            loss, skip = discriminator_step(job, adversary, parts, fakes[adversary.name], targets, weights)
            losses[f"discriminator_{adversary.name}"] = loss
            skipped[f"discriminator_{adversary.name}"] = skip
    of_tokenizer, skips = generator_step(job, parts, weights, begun)
    return StepResult({**of_tokenizer, **losses}, {**skipped, **skips})


def begin(job: Job, part: Part, weights: Weights) -> Begun:
    """The forward that both updates use."""
    output = forward(job, part, weights, TOKENIZER)
    leaves = cut(output.images)
    return Begun(output, leaves, {a.name: look(job, a, leaves[0], part, weights) for a in job.playing})


def look(job: Job, adversary: Adversary, image: Tensor, part: Part, weights: Weights) -> list[Tensor]:
    """What a discriminator looks at, of a reconstruction; without a graph where no term of this step asks."""
    with torch.set_grad_enabled(
        torch.is_grad_enabled() and any(term in weights for term in TERMS_OF[adversary.name])
    ):
        return adversary.game.look(image, job.draws(part.first, GENERATOR), job.blur())


def forward(job: Job, part: Part, weights: Weights, stream: int, average: bool = True) -> StepOutput:
    """The tokenizer's forward of one part, with the draws of a stream.

    `average`: the part counts in the tokenizer's running statistics, once in a step.
    """
    draws = job.draws(part.first, stream)
    change = drawn_equivariance(job, draws)
    noise = draws.seed()
    snapshot = job.snapshot if "preservation" in weights else None
    with job.tokenizer.averaging(part.number, part.parts if average else 0):
        return job.model(part.images, noise, change, "alignment" in weights, snapshot)


def drawn_equivariance(job: Job, draws: StepDraws) -> Equivariance:
    """What a step does to latents or images: the first that a forward draws."""
    return draw_equivariance(job.stage.equivariance, draws.decisions(EQUIVARIANCE_UNIFORMS))


@torch.no_grad()
def discriminator_views(
    job: Job, parts: Sequence[Part], weights: Weights
) -> tuple[dict[str, list[list[Tensor]]], list[Tensor]]:
    """What each discriminator looks at of every part, and the targets, from a forward without a graph.

    Its draws are those of the tokenizer's update, unless that is not to be shared.
    """
    shared = job.config.engine.share_forward
    fakes: dict[str, list[list[Tensor]]] = {adversary.name: [] for adversary in job.playing}
    targets = []
    for part in parts:
        output = forward(job, part, {}, TOKENIZER if shared else SECOND_FORWARD, average=False)
        targets.append(output.targets)
        for adversary in job.playing:
            draws = job.draws(part.first, GENERATOR if shared else SECOND_LOOK)
            fakes[adversary.name].append(adversary.game.look(output.images[0], draws, job.blur()))
    return fakes, targets


def discriminator_step(
    job: Job,
    adversary: Adversary,
    parts: Sequence[Part],
    fakes: Sequence[list[Tensor]],
    targets: Sequence[Tensor],
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    """One update of a discriminator from targets (real) and what it looks at of reconstructions (fake);
    returns its loss, and 1.0 if the update was skipped.
    """
    adversary.optimizer.zero_grad(set_to_none=True)
    adversary.game.prepare()
    losses = []
    for number, (part, fake, real) in enumerate(zip(parts, fakes, targets, strict=True)):
        with reducing(adversary.model, last=number == len(parts) - 1):
            loss = adversary.model(real, fake, job.draws(part.first, DISCRIMINATOR), job.blur(), weights)
            (loss * (adversary.guard.scale / len(parts))).backward()
        losses.append(loss.detach())
    loss = torch.stack(losses).mean()
    skip, _ = clipped_update(
        adversary.optimizer, adversary.parameters, adversary.guard, loss, job.config.engine.clip_norm
    )
    return loss, skip


def generator_step(
    job: Job, parts: Sequence[Part], weights: Weights, begun: Begun | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One update of the tokenizer and its companions; returns its losses, and which updates were skipped.

    `begun`: the forward of the only part, where the discriminators used it already.
    """
    for adversary in job.playing:
        adversary.game.follow()
    deferred = deferred_losses(job, weights) if len(parts) > 1 else {}
    found = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with job.reducing_tokenizer(last):
            present = begin(job, part, weights) if begun is None else begun
            found.append(generator_backward(job, part, present, weights, deferred))
            if last:
                settle_unused(job.model, job.trained)
    for name, kept in deferred.items():
        kept.add_to_gradients(job.factor(name, kept.gradients()))
    reduce_unsharded(job.model, job.trained)

    losses = {name: torch.stack([f[name] for f in found]).mean() for name in found[0]}
    plain = {name: loss for name, loss in losses.items() if name in weights and name != "alignment"}
    total = weighted_sum(plain, balanced_weights(job, weights))
    if total is None:  # schedules may leave a step without terms
        total = torch.zeros((), device=job.device)
    if job.is_adaptive("adversarial") and any(term in losses for term in BALANCED_TERMS):
        losses["adversarial_factor"] = job.factor("adversarial").clone()
    if "alignment" in losses:
        losses["alignment_factor"] = weights["alignment"] * job.factor("alignment")
        total = total + losses["alignment_factor"] * losses["alignment"]
    skipped = {}
    for companion in job.companions:
        # Its losses went backward with the tokenizer's, and carry that scale, which the next line may move.
        scale_gradients(companion.parameters, job.guard.scale.reciprocal())
        loss = losses[f"{companion.name}_own"]
        clip_norm = job.config.engine.clip_norm
        skip, _ = clipped_update(companion.optimizer, companion.parameters, companion.guard, loss, clip_norm)
        companion.buffers.restore(skip)
        skipped[companion.name] = skip
    skip, norm = clipped_update(job.optimizer, job.trained, job.guard, total, job.config.engine.clip_norm)
    job.buffers.restore(skip)
    return {**losses, "total": total, "gradient_norm": norm}, {**skipped, "tokenizer": skip}


def generator_backward(
    job: Job,
    part: Part,
    begun: Begun,
    weights: Weights,
    deferred: Mapping[Balanced, DeferredLoss],
) -> dict[str, Tensor]:
    """Backward of one part's losses, of which the update takes the mean over parts; returns the losses.

    `deferred`: losses whose weight depends on the other parts; their gradients are kept apart there.
    """
    scale = job.guard.scale / part.parts
    output, leaves, looks = begun
    of_images = image_losses(leaves, output.targets, weights, job.perceptual)
    at_images = gradients_at(leaves, weighted_sum(of_images, weights), scale)

    adversarial: dict[str, Tensor] = {}
    for adversary in job.playing:
        seen = looks[adversary.name]
        adversarial |= adversary.game.generator_losses(seen, output.targets, job.blur(), weights)
    at_image = None
    if adversarial:
        pair = leaves[0], at_images[0]
        at_image = adversarial_gradient(job, output, pair, adversarial, weights, scale, deferred)

    aligned = output.alignment is not None
    at_leaf = decoder_backward(output, at_images, at_image, aligned and job.measures("alignment"))
    of_latents = latent_losses(output, weights)
    losses = {**of_images, **adversarial, **of_latents}
    if output.alignment is not None:
        losses["alignment"] = output.alignment
        if "alignment" in deferred:
            assert at_leaf is not None
            deferred["alignment"].add(output, output.alignment, scale.to(output.alignment.dtype))
            deferred["alignment"].add_reconstruction(output.latents, at_leaf)
        else:
            gradients = None
            if at_leaf is not None:
                gradients = alignment_gradients(output, job.tokenizer.last_fusion_weight, at_leaf, scale)
            factor = weights["alignment"] * job.factor("alignment", gradients)
            if output.alignment.requires_grad:
                (scale * factor * output.alignment).backward()
    for stream, companion in enumerate(job.companions, start=COMPANION):
        weight = weights.get(companion.name)
        draws, labels = job.draws(part.first, stream), job.labels(part.number)
        losses |= companion.backward(output, draws, labels, weight, scale)
    encoder_backward(output, weighted_sum(of_latents, weights), scale)
    return {name: loss.detach() for name, loss in losses.items()}


def adversarial_gradient(
    job: Job,
    output: StepOutput,
    reconstruction: tuple[Tensor, Tensor],
    losses: Mapping[str, Tensor],
    weights: Weights,
    scale: Tensor,
    deferred: Mapping[Balanced, DeferredLoss],
) -> Tensor | None:
    """Gradient of the adversarial losses at the reconstruction, each with its weight; None if all are kept
    apart.

    `reconstruction`: where the losses' graphs begin, and the gradient of the image losses there.
    """
    leaf, of_images = reconstruction
    shared = BALANCED_TERMS if job.is_adaptive("adversarial") else ()
    adaptive = {name: loss for name, loss in losses.items() if name in shared}
    fixed = {name: loss for name, loss in losses.items() if name not in shared}
    found = []
    if adaptive:
        (gradient,) = gradients_at([leaf], weighted_sum(adaptive, weights), scale, retain=bool(fixed))
        image = output.images[0]
        if "adversarial" in deferred:
            deferred["adversarial"].add(output, image, gradient)
            deferred["adversarial"].add_reconstruction(image, of_images)
        else:
            pair = None
            if job.measures("adversarial"):
                pair = pair_at(job.tokenizer.last_decoder_weight, image, (of_images, gradient))
            found.append(job.factor("adversarial", pair) * gradient)
    if fixed:
        found += gradients_at([leaf], weighted_sum(fixed, weights), scale)
    return torch.stack(found).sum(dim=0) if found else None


def deferred_losses(job: Job, weights: Weights) -> dict[Balanced, DeferredLoss]:
    """What to keep apart while a batch is accumulated: losses whose adaptive weight this step measures."""
    kept: dict[Balanced, DeferredLoss] = {}
    if "alignment" in weights and job.measures("alignment"):
        kept["alignment"] = deferred_alignment(job.tokenizer, weights["alignment"])
    if job.measures("adversarial") and any(term in weights for term in BALANCED_TERMS):
        kept["adversarial"] = deferred_adversarial(job.tokenizer)
    return kept


def balanced_weights(job: Job, weights: Weights) -> Weights:
    """The weights of a step with the adaptive one of the adversarial losses in them."""
    if not job.is_adaptive("adversarial"):
        return weights
    factor = job.factor("adversarial")
    return {name: weight * factor if name in BALANCED_TERMS else weight for name, weight in weights.items()}
