from __future__ import annotations

import pytest
import torch

import vfmvae
from tests.tokenizer.tiny import tiny_tokenizer


def test_names_of_diffusers_autoencoders() -> None:
    tokenizer = tiny_tokenizer().eval()
    vae = vfmvae.diffusers_autoencoder(tokenizer)
    x = torch.rand(1, 3, 64, 64)
    distribution = vae.encode(x).latent_dist
    drawn = distribution.sample(torch.Generator().manual_seed(3))
    expected = tokenizer.encode(x).sample(generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, expected)
    assert torch.equal(vae.decode(drawn).sample, tokenizer.decode(drawn))
    assert torch.equal(vae.decode(drawn, return_dict=False)[0], tokenizer.decode(drawn))
    assert torch.equal(vae.encode(x, return_dict=False)[0].mode(), distribution.mode())
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 16
    assert (vae.dtype, vae.device) == (torch.float32, torch.device("cpu"))


def test_a_real_diffusers_pipeline_generates_through_it() -> None:
    diffusers = pytest.importorskip("diffusers")
    vae = vfmvae.diffusers_autoencoder(tiny_tokenizer().eval())
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, out_channels=16, num_layers=1,
        sample_size=4, patch_size=1, num_embeds_ada_norm=1000, norm_num_groups=1,
    )  # fmt: skip
    pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[1], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
