"""Recipes: each function returns the complete configuration of one run.

| recipe | what | expected |
|---|---|---|
| demo | 64 px on the embedded photographs with the `mini` encoder | recognisable images in minutes on a CPU |
| vfm_vae_siglip2_large | stage 0 of the published f16d32 model | rFID 0.52 after all four stages |
"""

from __future__ import annotations

from collections.abc import Callable

from vfmvae.config import LossConfig, TrainConfig
from vfmvae.encoders import EncoderConfig
from vfmvae.tokenizer import BottleneckConfig, DecoderConfig, FusionConfig, TokenizerConfig
from vfmvae.training.optim import OptimizerConfig


def demo() -> TrainConfig:
    """A small VFM-VAE at 64 px: the whole architecture, sized for a laptop CPU.

    Latents are [32, 8, 8]. Beside the sizes, three things differ from the published recipe because the run
    has hundreds of steps, not tens of thousands: a higher learning rate with decay, latents that start with
    little noise, and a weak alignment.
    """
    tokenizer = TokenizerConfig(
        encoder=EncoderConfig(name="mini", layers=(0, 3, -1), scale_factor=1.0),
        fusion=FusionConfig(layer_widths=(32, 32, 32), decompress_factor=4),
        bottleneck=BottleneckConfig(initial_logvar=-6.0),
        decoder=DecoderConfig(
            channel_base=4096,
            channel_max=64,
            num_res_blocks=1,
            latent_widths=(64, 64, 64, 32),
            attention_depths=(1, 1, 1),
            style_width=64,
        ),
        resolution=64,
        downsample=8,
    )
    return TrainConfig(
        tokenizer=tokenizer,
        losses=LossConfig(alignment=0.1),
        optimizer=OptimizerConfig(learning_rate=4e-3, betas=(0.9, 0.99), warmup=0.05, schedule="cosine"),
        batch_size=8,
        steps=700,
    )


def vfm_vae_siglip2_large() -> TrainConfig:
    """VFM-VAE f16d32 over SigLIP2-L, stage 0 (strong alignment): 20 M images at batch 512; give --data.

    Not available yet: LPIPS and adversarial losses (refused at the start), equivariance regularisation, EMA,
    the end of the multi-scale loss after 5 M images, and the three later stages.
    Published result of all four stages on ImageNet 256: rFID 0.52, PSNR 22.99, SSIM 0.593, LPIPS 0.221.
    """
    return TrainConfig(losses=LossConfig(lpips=10.0, adversarial=1.0))


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (demo, vfm_vae_siglip2_large)
}
