"""Recipes: each function returns the complete configuration of one run.

| recipe | what | expected |
|---|---|---|
| demo | 64 px on the embedded photographs with the `mini` encoder | recognisable images in minutes on a CPU |
| vfm_vae_siglip2_large | the published f16d32 model, four stages | rFID 0.52, PSNR 22.99 (published) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vfmvae.config import PerceptualConfig, TrainConfig
from vfmvae.discriminators import ProjectedDiscriminatorConfig
from vfmvae.encoders import EncoderConfig
from vfmvae.tokenizer import BottleneckConfig, DecoderConfig, FusionConfig, TokenizerConfig
from vfmvae.tokenizer.equivariance import EquivarianceConfig
from vfmvae.training.ema import EmaConfig
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.stages import LossWeights, StageConfig, TermSchedule

NO_EQUIVARIANCE = EquivarianceConfig(latent_probability=0.0, image_probability=0.0)


def demo() -> TrainConfig:
    """A small VFM-VAE at 64 px: the whole architecture, sized for a laptop CPU.

    Latents are [32, 8, 8]. First plain reconstruction, then a shorter stage that sharpens with a perceptual
    and an adversarial loss, both on `mini`'s features. Beside the sizes, these things differ from the
    published recipe because the run has hundreds of steps, not tens of thousands: higher learning rates with
    decay, latents that start with little noise, a weak alignment, a short average of weights, and no
    equivariance regularisation (which at 64 px could only rotate).
    """
    tokenizer = TokenizerConfig(
        encoder=EncoderConfig(name="mini", layers=(0, 3, -1), scale_factor=1.0),
        fusion=FusionConfig(layer_widths=(32, 32, 32), decompress_factor=4),
        bottleneck=BottleneckConfig(initial_logvar=-6.0),
        decoder=DecoderConfig(
            channel_base=4096,
            channel_max=64,
            num_res_blocks=1,
            latent_widths=(256, 64, 64, 32),
            attention_depths=(1, 1, 1),
            style_width=64,
        ),
        resolution=64,
        downsample=8,
    )
    fast = OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.99), warmup=0.05, schedule="cosine")
    reconstruct = StageConfig(
        name="reconstruct",
        images=4_800,
        losses=LossWeights(alignment=0.1),
        optimizer=fast,
        equivariance=NO_EQUIVARIANCE,
    )
    sharpen = replace(
        reconstruct,
        name="sharpen",
        images=800,
        losses=LossWeights(alignment=0.1, perceptual=0.5, adversarial=0.05),
        optimizer=replace(fast, learning_rate=1.5e-3),
    )
    return TrainConfig(
        tokenizer=tokenizer,
        stages=(reconstruct, sharpen),
        discriminator=ProjectedDiscriminatorConfig(backbone="mini", layers=(0, 2, 4, 6)),
        perceptual=PerceptualConfig(network="mini"),
        ema=EmaConfig(half_life_images=200),
        batch_size=4,
        threads=1,
        checkpoint_every=250,
    )


def vfm_vae_siglip2_large() -> TrainConfig:
    """VFM-VAE f16d32 over SigLIP2-L: 44 M images at batch 512 in four stages; give --data.

    Published result on ImageNet 256 after all stages: rFID 0.52, PSNR 22.99, SSIM 0.593, LPIPS 0.221. This
    project has not run it yet.
    """
    strong = StageConfig(
        name="strong-alignment",
        images=20_000_000,
        losses=LossWeights(perceptual=10.0, adversarial=1.0, alignment=5.0),
        schedules=(TermSchedule(term="multiscale_l1", end=5_000_000),),
    )
    weak = StageConfig(
        name="weak-alignment",
        images=20_000_000,
        losses=LossWeights(multiscale_l1=0.0, perceptual=10.0, adversarial=1.0, alignment=1.0),
    )
    slow = OptimizerConfig(learning_rate=5e-5)
    ssim = StageConfig(
        name="ssim",
        images=1_000_000,
        trains=("style", "decompress", "decoder"),
        losses=LossWeights(
            multiscale_l1=0.0, perceptual=2.0, ssim=1.0, kl=0.0, alignment=0.0, adversarial=1.0
        ),
        optimizer=slow,
        discriminator_optimizer=slow,
    )
    patch = StageConfig(
        name="patchgan",
        images=3_000_000,
        trains=("decoder>32",),
        losses=LossWeights(
            l1=0.0,
            multiscale_l1=0.0,
            kl=0.0,
            alignment=0.0,
            adversarial=1.0,
            patch_adversarial=1.0,
            feature_matching=10.0,
        ),
        optimizer=slow,
        discriminator_optimizer=slow,
        equivariance=NO_EQUIVARIANCE,
    )
    return TrainConfig(
        stages=(strong, weak, ssim, patch),
        fused=True,
        workers=8,
        evaluate_every=1000,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (demo, vfm_vae_siglip2_large)
}
