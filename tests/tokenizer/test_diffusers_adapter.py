"""The adapter has the surface of diffusers' own autoencoder, and pipelines run through it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import pytest
import torch

import vfmvae
from tests.tokenizer.tiny import DISCRETE, tiny_config, tiny_tokenizer


def images(batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 64, 64) * 2 - 1


def test_names_of_diffusers_autoencoders() -> None:
    tokenizer, x = tiny_tokenizer().eval(), images()
    vae = vfmvae.diffusers_autoencoder(tokenizer)
    distribution = vae.encode(x).latent_dist
    drawn = distribution.sample(torch.Generator().manual_seed(3))
    expected = tokenizer.encode(x).sample(generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, expected)
    assert torch.equal(vae.decode(drawn).sample, tokenizer.decode(drawn))
    assert torch.equal(vae.decode(drawn, return_dict=False)[0], tokenizer.decode(drawn))
    assert torch.equal(vae.encode(x, return_dict=False)[0].mode(), distribution.mode())
    assert (vae.dtype, vae.device) == (torch.float32, torch.device("cpu"))


def test_the_distribution_is_that_of_diffusers() -> None:
    module = pytest.importorskip("diffusers.models.autoencoders.vae")
    tokenizer, x = tiny_tokenizer().eval(), images(2)
    ours = vfmvae.diffusers_autoencoder(tokenizer).encode(x).latent_dist
    theirs = module.DiagonalGaussianDistribution(tokenizer.encode(x).moments)
    for name in ("parameters", "mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.kl(), theirs.kl())
    assert torch.equal(ours.mode(), theirs.mode())
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    torch.testing.assert_close(ours.sample(generators[0]), theirs.sample(generators[1]))


def test_methods_take_what_those_of_diffusers_take() -> None:
    theirs = pytest.importorskip("diffusers").AutoencoderKL
    ours = type(vfmvae.diffusers_autoencoder(tiny_tokenizer()))
    for name in ("forward", "encode", "decode"):
        assert list(inspect.signature(getattr(ours, name)).parameters) == [
            *inspect.signature(getattr(theirs, name)).parameters
        ], name


def test_the_config_is_attributes_and_a_mapping() -> None:
    config = vfmvae.diffusers_autoencoder(tiny_tokenizer()).config
    assert config.latent_channels == config["latent_channels"] == config.get("latent_channels") == 8
    assert isinstance(config, Mapping) and "scaling_factor" in config and "quant" not in config
    assert config.get("quant", 5) == 5 and dict(config)["sample_size"] == 64
    assert 2 ** (len(config.block_out_channels) - 1) == 16
    assert len(config) == len(list(config)) == len({**config})
    with pytest.raises(KeyError):
        config["quant"]
    with pytest.raises(AttributeError):
        config.scaling_factor = 2.0


@pytest.mark.parametrize("downsample", [8, 32, 64])
def test_pipelines_find_the_downsampling(downsample: int) -> None:
    config = tiny_config(downsample=downsample)
    vae = vfmvae.diffusers_autoencoder(tiny_tokenizer(config))
    assert 2 ** (len(vae.config.block_out_channels) - 1) == downsample


def test_forward_takes_the_mode_or_a_sample() -> None:
    tokenizer, x = tiny_tokenizer().eval(), images()
    vae = vfmvae.diffusers_autoencoder(tokenizer)
    posterior = tokenizer.encode(x)
    assert torch.equal(vae(x).sample, tokenizer.decode(posterior.mode()))
    latents = posterior.sample(generator=torch.Generator().manual_seed(1))
    (image,) = vae(x, sample_posterior=True, return_dict=False, generator=torch.Generator().manual_seed(1))
    assert torch.equal(image, tokenizer.decode(latents))


@pytest.mark.parametrize("discrete", [False, True])
def test_slicing_takes_one_image_at_a_time_and_changes_nothing(
    discrete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer(tiny_config(bottleneck=DISCRETE) if discrete else None).double().eval()
    vae, x = vfmvae.diffusers_autoencoder(tokenizer), images(3).double()
    whole = vae.encode(x).latent_dist.mode()
    image = vae.decode(whole).sample
    sizes: list[int] = []
    for name in ("encode", "decode"):
        method = getattr(tokenizer, name)
        monkeypatch.setattr(tokenizer, name, lambda t, m=method: sizes.append(len(t)) or m(t))
    vae.enable_slicing()
    torch.testing.assert_close(vae.encode(x).latent_dist.mode(), whole)
    torch.testing.assert_close(vae.decode(whole).sample, image)
    assert sizes == [1] * 6
    vae.disable_slicing()
    vae.decode(whole)
    assert sizes[6:] == [3]


def test_tiling_is_refused_with_the_reason() -> None:
    vae = vfmvae.diffusers_autoencoder(tiny_tokenizer())
    with pytest.raises(NotImplementedError, match=r"style and attention see the whole.*enable_slicing\(\)"):
        vae.enable_tiling()
    vae.disable_tiling()
    assert vae.use_tiling is False


def test_discrete_latents_have_no_moments() -> None:
    tokenizer = tiny_tokenizer(tiny_config(bottleneck=DISCRETE)).eval()
    distribution = vfmvae.diffusers_autoencoder(tokenizer).encode(images()).latent_dist
    assert torch.equal(distribution.sample(torch.Generator()), distribution.mode())
    assert not hasattr(distribution, "mean") and not hasattr(distribution, "kl")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_out(dtype: torch.dtype) -> None:
    tokenizer, x = tiny_tokenizer().eval(), images()
    truth = tokenizer.decode(tokenizer.encode(x).mode())
    vae = vfmvae.diffusers_autoencoder(tokenizer).to(dtype)
    distribution = vae.encode(x.to(dtype)).latent_dist
    image = vae.decode(distribution.mode()).sample
    for tensor in (distribution.mean, distribution.std, distribution.sample(), distribution.mode(), image):
        assert tensor.dtype == vae.dtype == dtype
    assert distribution.kl().dtype == torch.float32
    assert (image.float() - truth).norm() / truth.norm() < 0.1


def test_a_class_conditional_pipeline_generates_through_it() -> None:
    diffusers = pytest.importorskip("diffusers")
    vae = vfmvae.diffusers_autoencoder(tiny_tokenizer().eval())
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, out_channels=16, num_layers=1,
        sample_size=4, patch_size=1, num_embeds_ada_norm=1000, norm_num_groups=1,
    )  # fmt: skip
    pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(class_labels=[1], num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3)


def test_an_image_to_image_pipeline_runs_in_bfloat16() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=8, out_channels=8, block_out_channels=(8,), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        vae=vfmvae.diffusers_autoencoder(tiny_tokenizer().eval()), unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), text_encoder=None,
        tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(torch.bfloat16)  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()
    prompt = torch.zeros(2, 2, 8, dtype=torch.bfloat16)
    pictures = pipeline(
        image=images(2) / 2 + 0.5, prompt_embeds=prompt, negative_prompt_embeds=prompt, strength=0.5,
        num_inference_steps=2, output_type="np",
    ).images  # fmt: skip
    assert pictures.shape == (2, 64, 64, 3)
