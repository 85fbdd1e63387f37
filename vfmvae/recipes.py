"""Recipes: each function returns the complete configuration of one run.

| recipe | what | expected |
|---|---|---|
| demo | 64 px on the embedded photographs with the `mini` encoder | recognisable images in minutes on a CPU |
| vfm_vae_siglip2_large | the published f16d32 model, four stages | rFID 0.52, PSNR 22.99 (published) |
| joint_demo | the demo on shapes, a diffusion transformer beside it | PSNR 30 dB, samples of plain shapes |
| vfm_vae_repa_e_xl | the published model with SiT-XL/1 trained along (REPA-E) | none published |

and of diffusion models (`python -m vfmvae.train_diffusion`), which need latents or data:

| recipe | what | expected |
|---|---|---|
| diffusion_demo | a small REPA SiT on the pixels of drawn shapes | plain shapes, each class its own |
| vfm_vae_reg_xl | REG SiT-XL/1 on latents of vfm_vae_siglip2_large, 80 epochs | gFID 2.22 (published) |
| vfm_vae_lightningdit_xl | LightningDiT-XL/1 on the same, 64 epochs | gFID 3.80, guided 2.16 (published) |
| vfm_vae_lightningdit_xl_long | the same for 560 epochs | |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vfmvae.config import PerceptualConfig, TrainConfig
from vfmvae.data import Latents
from vfmvae.data.shapes import CLASSES as SHAPES
from vfmvae.diffusion import SIZES, TransformerConfig
from vfmvae.diffusion.flow import TimeConfig
from vfmvae.diffusion.guidance import Guidance
from vfmvae.diffusion.sampling import Sampling
from vfmvae.diffusion_config import DiffusionConfig, EvaluationConfig
from vfmvae.discriminators import ProjectedDiscriminatorConfig
from vfmvae.encoders import EncoderConfig
from vfmvae.tokenizer import BottleneckConfig, DecoderConfig, FusionConfig, TokenizerConfig
from vfmvae.tokenizer.equivariance import EquivarianceConfig
from vfmvae.training.diffusion_stage import DiffusionLosses, DiffusionStageConfig, half_life_of
from vfmvae.training.ema import EmaConfig
from vfmvae.training.engine import EngineConfig
from vfmvae.training.joint import JointConfig
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
        ema=EmaConfig(half_life_images=200),
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
        evaluate_every=500_000,
    )


def joint_demo() -> TrainConfig:
    """The demo on drawn shapes, and a small diffusion transformer along with it, end to end (REPA-E).

    1,400 steps: reconstructions of 30 dB; samples are one plain shape each, whose outline is not yet that of
    its class (2026-11-27, torch 2.14, AMD EPYC).
    """
    alone = demo()
    model = TransformerConfig(
        latent_size=8,
        channels=32,
        width=128,
        depth=4,
        heads=4,
        classes=len(SHAPES),
        qk_norm=True,
        alignment_depth=2,
        alignment_widths=(MINI_WIDTH,),
        projector_width=256,
    )
    joint = JointConfig(
        model=model,
        optimizer=OptimizerConfig(kind="adamw", learning_rate=1e-3, betas=(0.9, 0.95)),
        ema=EmaConfig(half_life_images=400),
    )
    return replace(alone, data="shapes", joint=joint)


def vfm_vae_repa_e_xl() -> TrainConfig:
    """VFM-VAE and SiT-XL/1 end to end, with the losses and rates of REPA-E; give --data.

    REPA-E is published for other tokenizers (gFID 4.05 after 80 epochs, begun with VA-VAE); for this one
    nothing is, and this project has not run it yet.
    """
    model = TransformerConfig(**SIZES["XL"], qk_norm=True, alignment_widths=(SIGLIP2_LARGE,))
    adamw = OptimizerConfig(kind="adamw", betas=(0.9, 0.999))
    stage = StageConfig(
        name="joint",
        images=80 * IMAGENET,
        losses=LossWeights(perceptual=1.0, adversarial=0.1, multiscale_l1=0.0),
        optimizer=adamw,
        discriminator_optimizer=adamw,
        equivariance=NO_EQUIVARIANCE,
    )
    joint = JointConfig(model=model, ema=EmaConfig(half_life_of(0.9999, 256), ramp_up=None))
    engine = EngineConfig(clip_norm=1.0)
    return TrainConfig(
        stages=(stage,),
        joint=joint,
        engine=engine,
        batch_size=256,
        fused=True,
        workers=8,
        evaluate_every=500_000,
    )


IMAGENET = 1_281_167
SIGLIP2_LARGE = 1024
"""Width of the encoder's tokens and of its pooled token."""
MINI_WIDTH = 128


def diffusion_demo() -> DiffusionConfig:
    """A small SiT with a REPA head on `mini`'s features, on the pixels of drawn shapes at 32 px.

    Without a tokenizer the model learns pixels. 2,000 steps give plain shapes of the class that is asked for,
    most of them whole: velocity loss 1.382 before and 0.071 after (2026-11-27, torch 2.14, AMD EPYC).
    Beside the sizes, these things differ from the published recipes because the run has 2,000 small steps: a
    higher learning rate with decay, a short average, rotary positions; and times moved towards noise, since
    pixels have far more in common than latents, so that what a shape is shows through more noise.
    """
    stage = DiffusionStageConfig(
        images=32_000,
        losses=DiffusionLosses(alignment=0.5),
        time=TimeConfig(law="logit-normal", shift=3.0),
        optimizer=OptimizerConfig(
            kind="adamw", learning_rate=2e-3, betas=(0.9, 0.95), warmup=0.05, schedule="cosine"
        ),
        ema=EmaConfig(half_life_images=1_600),
    )
    model = TransformerConfig(
        latent_size=32,
        channels=3,
        patch=4,
        width=128,
        depth=6,
        heads=4,
        classes=len(SHAPES),
        qk_norm=True,
        rope=True,
        alignment_depth=3,
        alignment_widths=(MINI_WIDTH,),
        projector_width=256,
    )
    return DiffusionConfig(
        diffusion=model,
        stages=(stage,),
        data="shapes",
        encoder=EncoderConfig(name="mini", layers=(-1,), scale_factor=2.0),
        evaluation=EvaluationConfig(sampling=Sampling("heun", steps=25, guidance=Guidance(2.0))),
        batch_size=16,
        threads=1,
        checkpoint_every=500,
    )


def diffusion_demo_on(latents: str) -> DiffusionConfig:
    """The demo on a folder of latents: a model of their size and classes, a REPA head where it has tokens.

    ValueError for a folder that cannot be read.
    """
    alone = diffusion_demo()
    opened = Latents(latents, verify=False)
    values = opened.read(0, 1)
    sample = values["latent"] if values["latent"] is not None else values["moments"]
    assert sample is not None
    side, features = sample.shape[-1], values["features"]
    model = replace(
        alone.diffusion,
        latent_size=side,
        channels=opened.mean.numel(),
        patch=2 if side % 2 == 0 and side > 8 else 1,
        classes=len(opened.classes),
        alignment_widths=() if features is None else (features.shape[-1],),
    )
    (stage,) = alone.stages
    losses = DiffusionLosses() if features is None else stage.losses
    stage = replace(stage, losses=losses, time=TimeConfig(law="logit-normal"))
    return replace(alone, diffusion=model, stages=(stage,), data=None, encoder=None, latents=latents)


def vfm_vae_reg_xl() -> DiffusionConfig:
    """REG SiT-XL/1 on VFM-VAE latents: batch 1024, 80 epochs of ImageNet; give --latents.

    The folder needs the encoder's features: `vfmvae encode DATA --tokenizer T --tokens --class-token`.
    Published: gFID 2.22 without guidance after 80 epochs, 1.62 after 640 (1.31 guided). This project has not
    run it yet.
    """
    model = TransformerConfig(
        **SIZES["XL"],
        qk_norm=True,
        class_token_width=SIGLIP2_LARGE,
        alignment_widths=(SIGLIP2_LARGE,),
    )
    losses = DiffusionLosses(alignment=0.5, class_token=0.03)
    stage = DiffusionStageConfig(images=80 * IMAGENET, losses=losses)
    sampling = Sampling("sde", steps=250, guidance=Guidance(2.0, (0.0, 0.8)))
    return _on_imagenet_latents(model, (stage,), sampling)


def vfm_vae_lightningdit_xl() -> DiffusionConfig:
    """LightningDiT-XL/1 on VFM-VAE latents: batch 1024, 64 epochs, log-normal times; give --latents.

    Published: gFID 3.80, and 2.16 guided. This project has not run it yet.
    """
    return _lightningdit((DiffusionStageConfig(images=64 * IMAGENET, losses=LIGHTNINGDIT, time=LOGNORMAL),))


def vfm_vae_lightningdit_xl_long() -> DiffusionConfig:
    """The same for 560 epochs, log-normal times switched off for the last part.

    When is not published for VFM-VAE; taken is LightningDiT's own, after 600 of 1000 thousand updates.
    """
    epochs = 560
    first = DiffusionStageConfig(
        name="lognormal", images=round(0.6 * epochs * IMAGENET), losses=LIGHTNINGDIT, time=LOGNORMAL
    )
    rest = DiffusionStageConfig(name="uniform", images=round(0.4 * epochs * IMAGENET), losses=LIGHTNINGDIT)
    return _lightningdit((first, rest))


LIGHTNINGDIT = DiffusionLosses(cosine=1.0)
LOGNORMAL = TimeConfig(law="lognormal")


def _lightningdit(stages: tuple[DiffusionStageConfig, ...]) -> DiffusionConfig:
    model = TransformerConfig(**SIZES["XL"], norm="rms", qk_norm=True, swiglu=True, rope=True)
    # Its time shift 0.3 and first guided time 0.125 are stated for times where 1 is data.
    guidance = Guidance(6.0, (0.0, 0.875), channels=3)
    return _on_imagenet_latents(model, stages, Sampling("euler", 249, guidance, shift=1 / 0.3))


def _on_imagenet_latents(
    model: TransformerConfig, stages: tuple[DiffusionStageConfig, ...], sampling: Sampling
) -> DiffusionConfig:
    return DiffusionConfig(
        diffusion=model,
        stages=stages,
        evaluation=EvaluationConfig(sampling=sampling),
        latents="latents",
        batch_size=1024,
        fused=True,
        workers=8,
        evaluate_every=10 * IMAGENET,
        checkpoint_every=5000,
    )


DIFFUSION_RECIPES: dict[str, Callable[[], DiffusionConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        diffusion_demo,
        vfm_vae_reg_xl,
        vfm_vae_lightningdit_xl,
        vfm_vae_lightningdit_xl_long,
    )
}
RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (demo, vfm_vae_siglip2_large, joint_demo, vfm_vae_repa_e_xl)
}
