"""How large everything is that convergence.py trains, for a GPU and for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from vfmvae.tokenizer import DecoderConfig


@dataclass(frozen=True)
class Budget:
    """Sizes of everything."""

    images: int  # that are drawn; the reference of the distance too
    held_out: int  # for CKNNA and reconstruction
    places: int  # 128 px scenes for the encoder's training
    encoder_depth: int
    encoder_steps: int
    encoder_batch: int
    classifier_width: int
    classifier_steps: int
    latent_channels: int
    downsample: int
    fusion_width: int
    decoder: DecoderConfig
    tokenizer_steps: int
    tokenizer_batch: int
    patch: int  # of the diffusion models: latent positions along an axis of a token
    width: int
    depth: int
    heads: int
    alignment_depth: int
    rate: float
    batch: int
    evaluate_at: tuple[int, ...]  # steps
    samples: int
    sampling_steps: int
    seeds: tuple[int, ...] = (0, 1, 2)
    neighbours: int = 10


BUDGETS = {
    "cpu": Budget(
        images=2048,
        held_out=300,
        places=768,
        encoder_depth=3,
        encoder_steps=60,
        encoder_batch=24,
        classifier_width=12,
        classifier_steps=400,
        latent_channels=8,
        downsample=8,
        fusion_width=16,
        decoder=DecoderConfig(
            channel_base=1024,
            channel_max=32,
            num_res_blocks=0,
            extra_convnext=False,
            latent_widths=(32, 32, 32, 32),
            attention_blocks=(),
            attention_depths=(),
            style_width=32,
        ),
        tokenizer_steps=220,
        tokenizer_batch=8,
        patch=2,
        width=64,
        depth=3,
        heads=4,
        alignment_depth=1,
        rate=2e-3,
        batch=32,
        evaluate_at=(40, 80, 150),
        samples=150,
        sampling_steps=8,
    ),
    "gpu": Budget(
        images=16384,
        held_out=2000,
        places=6144,
        encoder_depth=6,
        encoder_steps=1500,
        encoder_batch=128,
        classifier_width=32,
        classifier_steps=1500,
        latent_channels=32,
        downsample=8,
        fusion_width=32,
        decoder=DecoderConfig(
            channel_base=4096,
            channel_max=64,
            num_res_blocks=1,
            extra_convnext=False,
            latent_widths=(256, 64, 64, 32),
            attention_blocks=(0, 1),
            attention_depths=(1, 1),
            style_width=64,
        ),
        tokenizer_steps=1200,
        tokenizer_batch=64,
        patch=1,
        width=256,
        depth=6,
        heads=8,
        alignment_depth=2,
        rate=5e-4,
        batch=64,
        evaluate_at=(125, 250, 500, 1000, 1500, 2000),
        samples=1500,
        sampling_steps=25,
    ),
}
