"""The training step as VFM-VAE publishes it (arXiv 2510.18457), written out: what ours is measured against.

The tokenizer runs once for the discriminator and once for itself; the adaptive weight takes two gradient
passes of its own; modulation goes by per-sample weights (`fused=False`), in NCHW. Precision is the published
one: encoder in bfloat16 on CUDA, decoder blocks above 32 px in the low precision, all else float32. Where the
publication does not say how something is computed, the faster way is taken, and what costs time without being
part of the mathematics is left out: losses are not pulled to the host, frozen weights are not averaged.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vfmvae.config import TrainConfig
from vfmvae.images import to_unit
from vfmvae.losses.alignment import adaptive_weight
from vfmvae.losses.perceptual import LPIPS, SCALE, SHIFT, PerceptualNetwork
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.bottleneck import Posterior
from vfmvae.tokenizer.equivariance import EQUIVARIANCE_UNIFORMS
from vfmvae.train_job import Job
from vfmvae.train_step import DISCRIMINATOR, GENERATOR, TOKENIZER
from vfmvae.training.ema import ema_beta
from vfmvae.training.objective import image_losses, weighted_sum
from vfmvae.training.optim import OptimizerConfig

FP32_PIXELS = 32
"""Largest image whose decoder block is float32."""


class PublishedStep:
    """A job with reference operations, and its step. The stage has an adaptive alignment weight and a KL
    loss, and no equivariance regularisation.
    """

    def __init__(self, config: TrainConfig, pretrained: bool = True) -> None:
        """`pretrained`: as for Job."""
        self.job = Job(replace(config, fused=False, dtype="fp32"), pretrained)
        self.low = torch.float32
        self.job.enter_stage(0)
        stage = self.job.stage
        self.job.optimizer = _adam(stage.optimizer, self.job.trained)
        for adversary in self.job.playing:
            adversary.optimizer = _adam(stage.discriminator_optimizer, adversary.parameters)
        if isinstance(self.job.perceptual, LPIPS):
            self.job.perceptual.to(memory_format=torch.contiguous_format)

    def __call__(self, images: Tensor, low: torch.dtype) -> dict[str, Tensor]:
        """One update of everything from images [B, 3, R, R] uint8; returns the losses.

        `low`: dtype of the decoder's blocks above 32 px.
        """
        self.low = low
        self.job.begin_step()
        images = to_unit(images).contiguous()
        losses = self.discriminator_step(images) | self.tokenizer_step(images)
        self.average()
        self.job.state.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def discriminator_step(self, images: Tensor) -> dict[str, Tensor]:
        job, losses = self.job, {}
        with torch.no_grad():
            fake = self.forward(images)[0][0]
        for adversary in job.playing:
            adversary.optimizer.zero_grad()
            adversary.game.prepare()
            seen = adversary.game.look(fake, job.draws(0, GENERATOR), job.blur())
            loss = adversary.game(images, seen, job.draws(0, DISCRIMINATOR), job.blur(), job.weights())
            loss.backward()
            adversary.optimizer.step()
            losses[f"discriminator_{adversary.name}"] = loss
        return losses

    def tokenizer_step(self, images: Tensor) -> dict[str, Tensor]:
        job, weights = self.job, self.job.weights()
        job.optimizer.zero_grad()
        decoded, posterior, alignment = self.forward(images)
        perceptual = None if job.perceptual is None else PlainPerceptual(job.perceptual)
        of_images = image_losses(decoded, images, weights, perceptual)
        others = {"kl": posterior.kl().mean()}
        learning = [p for adversary in job.playing for p in adversary.parameters]
        for parameter in learning:
            parameter.requires_grad_(False)
        for adversary in job.playing:
            adversary.game.follow()
            seen = adversary.game.look(decoded[0], job.draws(0, GENERATOR), job.blur())
            others |= adversary.game.generator_losses(seen, images, job.blur(), weights)
        reconstruction, other = weighted_sum(of_images, weights), weighted_sum(others, weights)
        assert reconstruction is not None and other is not None
        ratio = adaptive_weight(reconstruction, alignment, job.tokenizer.last_fusion_weight)
        total = reconstruction + other + weights["alignment"] * ratio * alignment
        total.backward()
        job.optimizer.step()
        for parameter in learning:
            parameter.requires_grad_(True)
        return {**of_images, **others, "alignment": alignment, "total": total}

    def forward(self, images: Tensor) -> tuple[list[Tensor], Posterior, Tensor]:
        """Images -> reconstructions, largest first; posterior; alignment loss."""
        tokenizer = self.job.tokenizer
        side = images.shape[-1] // tokenizer.config.downsample
        draws = self.job.draws(0, TOKENIZER)
        draws.decisions(EQUIVARIANCE_UNIFORMS)  # of the step's draws the noise is the second
        features = tokenizer.encoder(images).layers
        posterior = tokenizer.fuse(features, (side, side))
        assert isinstance(posterior, Posterior)
        latents = posterior.sample(draws.seed())
        return self.decode(tokenizer, latents), posterior, tokenizer.alignment_loss(latents, features)

    def decode(self, tokenizer: Tokenizer, latents: Tensor, multiscale: bool = True) -> list[Tensor]:
        """Latents -> images, largest first; without `multiscale` that one alone."""
        z_map = tokenizer.decompressed(latents).contiguous()
        style = tokenizer.style(z_map)
        x: Tensor | None = None
        skip: Tensor | None = None
        images = []
        for index, block in enumerate(tokenizer.decoder.blocks):
            pixels = tokenizer.config.resolution >> (len(tokenizer.decoder.blocks) - 1 - index)
            if pixels > FP32_PIXELS:
                assert x is not None and skip is not None
                x, skip, z_map = x.to(self.low), skip.to(self.low), z_map.to(self.low)
            x, skip = block(x, skip, z_map, style)
            if multiscale or pixels == tokenizer.config.resolution:
                images.append(block.to_rgb(skip, style))
        return images[::-1]

    @torch.no_grad()
    def average(self) -> None:
        job = self.job
        batch = job.config.batch_size
        beta, averages = ema_beta(job.stage.ema, batch, job.state.step * batch), job.ema.state_dict()
        for name, parameter in job.tokenizer.named_parameters():
            if name in averages:
                averages[name].lerp_(parameter, 1 - beta)


class PlainPerceptual(nn.Module):
    """The perceptual distance [B] by reference operations; LPIPS without channels-last memory."""

    def __init__(self, network: PerceptualNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            of_target = self.features(target)
        return self.network.distance(self.features(prediction), of_target, fused=False)

    def features(self, images: Tensor) -> list[Tensor]:
        if not isinstance(self.network, LPIPS):
            return self.network.features(images)
        shift, scale = (images.new_tensor(values).view(3, 1, 1) for values in (SHIFT, SCALE))
        return self.network.vgg((images - shift) / scale)


def _adam(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own choice of loop: one operation per parameter on the CPU, over lists on CUDA."""
    return torch.optim.Adam(parameters, config.learning_rate, config.betas, config.eps)
