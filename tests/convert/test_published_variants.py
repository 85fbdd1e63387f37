"""Converted tokenizers against the published form, for arguments that differ from the released model's.

Each variant is a random checkpoint (published_state) whose numbers come from an independent implementation
(published_form): the reference path in float64 to rounding, the fused path in float32 to 1e-4.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.convert import published_form as published
from tests.convert.published_state import random_state
from vfmvae.convert.vfm_vae import convert
from vfmvae.tokenizer import Tokenizer

Arguments = dict[str, Any]


def arguments(patch_size: int = 16, pretrained_at: int = 48, **changes: Any) -> Arguments:
    """Published arguments of a tiny model at 128 px: latent [8,8,8], block widths 32, 32, 32, 16, 8, 4.

    At 64 px, where the first block starts from one position, its normalisations would hide its inputs.
    """
    tiny = {
        "vfm_name": "siglip2-tiny",
        "vfm_config": {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "image_size": pretrained_at,
            "intermediate_size": 64,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "patch_size": patch_size,
        },
        "scale_factor": 2.0,
        "patch_from_layers": [0, 2, -1],
        "patch_in_dimensions": [32, 32, 32],
        "patch_out_dimensions": [16, 16, 16],
        "compression_mode": "continuous",
        "how_to_compress": "attnproj",
        "how_to_decompress": "attnproj",
        "decompress_factor": 4,
        "attnproj_quant_layers": 1,
        "attnproj_post_quant_layers": 1,
        "resolution_compression_factor": 16,
        "z_dimension": 8,
        "z_pooled_resolution": 1,
        "z_dim_for_mapping_mlp_output": 24,
        "use_kl_loss": True,
        "use_vf_loss": True,
        "distmat_margin": 0.0,
        "cos_margin": 0.0,
        "distmat_weight": 1.0,
        "cos_weight": 1.0,
        "concat_z_block_indices": [0, 1, 2, 3],
        "concat_z_mapped_dims": [32, 16, 8, 4],
        "how_to_process_concat_z": "unshuffle",
        "activation_for_concat_z": "lrelu",
        "attn_block_indices": [0, 1, 2],
        "attn_depths": [1, 1, 1],
        "use_self_attn": True,
        "use_cross_attn": False,
        "use_convnext": True,
        "use_gaussian_blur": True,
        "add_additional_convnext": True,
        "num_blocks": 6,
        "img_resolution": 128,
        "legacy": False,
        "use_multiscale_output": True,
        "synthesis_kwargs": {
            "channel_base": 1024,
            "channel_max": 32,
            "num_res_blocks": 1,
            "architecture": "skip",
        },
    }
    unknown = changes.keys() - tiny.keys() - DISCRETE.keys()
    assert not unknown, f"not published arguments: {unknown}"
    return {**tiny, **changes}


DISCRETE = {
    "compression_mode": "discrete",
    "vocab_width": 16,
    "vocab_size": 48,
    "num_codebooks": 1,
    "vocab_beta": 0.25,
    "use_entropy_loss": True,
    "entropy_temp": 0.01,
}

# What differs from the tiny model above, and the image size.
VARIANTS: dict[str, tuple[Arguments, tuple[int, int]]] = {
    "deep_stacks": (
        arguments(attnproj_quant_layers=2, attnproj_post_quant_layers=2, activation_for_concat_z="silu"),
        (128, 128),
    ),
    "layers_in_another_order": (  # the VF loss looks at layer -1, wherever it stands
        arguments(patch_from_layers=[-1, 3, -3, -2], patch_in_dimensions=[32] * 4,
                  patch_out_dimensions=[8, 16, 12, 4], distmat_margin=0.25, cos_margin=0.5,
                  distmat_weight=0.7, cos_weight=1.3),
        (192, 128),
    ),
    "pooled_head_means": (  # widths that no number of heads divides into: heads are averaged, then pooled
        arguments(scale_factor=1, patch_out_dimensions=[8, 20, 16], use_vf_loss=False),
        (192, 128),
    ),
    "widening_compression": (
        arguments(pretrained_at=256, patch_out_dimensions=[64, 32, 40], attnproj_quant_layers=2,
                  attn_depths=[2, 1, 1]),
        (128, 128),
    ),
    "convolutions_without_blur": (
        arguments(how_to_compress="conv", how_to_decompress="conv", use_gaussian_blur=False,
                  activation_for_concat_z="gelu", patch_out_dimensions=[8, 16, 4]),
        (128, 192),
    ),
    "latent_8_patch_8": (
        arguments(patch_size=8, pretrained_at=256, scale_factor=1, resolution_compression_factor=8,
                  how_to_compress="conv", add_additional_convnext=False),
        (192, 128),
    ),
    "latent_8_late_attention": (
        arguments(resolution_compression_factor=8, concat_z_block_indices=[0, 2, 3, 4],
                  concat_z_mapped_dims=[16, 1, 8, 4, 4], attn_block_indices=[1, 3], attn_depths=[2, 2]),
        (128, 128),
    ),
    "latent_32_smaller_images": (
        arguments(scale_factor=0.5, resolution_compression_factor=32, how_to_decompress="conv",
                  concat_z_block_indices=[0, 2], use_self_attn=False),
        (128, 192),
    ),
    "latent_32_everywhere": (
        arguments(resolution_compression_factor=32, concat_z_block_indices=[0, 1, 2, 3, 4, 5],
                  concat_z_mapped_dims=[64, 8, 8, 4, 4, 4],
                  synthesis_kwargs={"channel_base": 1024, "channel_max": 32, "num_res_blocks": 2}),
        (128, 128),
    ),
    "noise_at_its_size": (
        arguments(legacy=True, img_resolution=256, add_additional_convnext=False),
        (256, 256),
    ),
    "noise_resized": (arguments(legacy=True), (128, 192)),
    "one_codebook": (arguments(**DISCRETE), (128, 128)),
    "codebooks_of_convolutions": (
        arguments(**{**DISCRETE, "num_codebooks": 4, "vocab_beta": 0.5, "entropy_temp": 0.1},
                  how_to_compress="conv", how_to_decompress="conv"),
        (192, 128),
    ),
}  # fmt: skip


class Case(NamedTuple):
    """A checkpoint, and what its published form computes in float64."""

    arguments: Arguments
    state: dict[str, Tensor]  # as stored, float32
    images: Tensor
    maps: list[Tensor]
    compressed: Tensor
    noise: Tensor
    posterior: published.Gaussian | published.Quantised
    latents: Tensor
    decompressed: Tensor
    style: Tensor
    decoded: list[Tensor]


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest) -> Case:
    options, size = VARIANTS[request.param]
    generator = torch.Generator().manual_seed(1)
    batch = 2 if size == (128, 128) else 1
    images = torch.rand(batch, 3, *size, dtype=torch.float64, generator=generator) * 2 - 1
    stored = random_state(options)
    state = {name: x.double() for name, x in stored.items()}
    with torch.no_grad():
        maps = published.features(state, options, images)
        compressed = published.compress(state, options, maps)
        noise = torch.randn(compressed.chunk(2, dim=1)[0].shape, dtype=torch.float64, generator=generator)
        if options["compression_mode"] == "discrete":
            posterior = published.quantise(state, options, compressed)
            latents = posterior.latents
        else:
            posterior = published.gaussian(compressed)
            latents = posterior.sample(noise)
        decompressed = published.decompress(state, options, latents)
        style = published.style(state, decompressed)
        decoded = published.decode(state, options, latents)
    return Case(
        options, stored, images, maps, compressed, noise, posterior, latents, decompressed, style, decoded
    )


def assert_close(ours: Tensor, truth: Tensor, limit: float, what: str) -> None:
    assert ours.shape == truth.shape, f"{what}: {tuple(ours.shape)}, published {tuple(truth.shape)}"
    error = (ours.double() - truth).abs().max() / truth.abs().max().clamp_min(1)
    assert error <= limit, f"{what}: differs by {error:.3g} of its largest value, allowed {limit:g}"


def check(case: Case, tokenizer: Tokenizer, limit: float, single: float) -> None:
    """Compares every stage, each from the published inputs, with the published form.

    Args:
        limit: for what is computed in the tokenizer's dtype.
        single: for what is computed in float32 always: features and the matching of codes.
    """
    dtype = tokenizer.dtype
    features = tokenizer.features(case.images.to(dtype))
    for layer, ours, truth in zip(case.arguments["patch_from_layers"], features, case.maps, strict=True):
        assert_close(ours, truth.flatten(2).mT, single, f"features of layer {layer}")
    features = [x.flatten(2).mT.to(dtype) for x in case.maps]

    truth = case.posterior
    posterior = tokenizer.fuse(features, tuple(case.latents.shape[2:]))
    if isinstance(truth, published.Quantised):
        assert torch.equal(posterior.indices, truth.indices)
        assert_close(posterior.codes, truth.latents, single, "codes")
        assert_close(posterior.sample(), truth.latents, single, "latents")
        assert_close(posterior.quantization_loss, truth.quantization_loss, single, "quantisation loss")
        assert_close(posterior.entropy_loss, truth.entropy_loss, single, "entropy loss")
    else:
        assert_close(posterior.mean, truth.mean, limit, "mean")
        assert_close(posterior.logvar, truth.logvar, limit, "log variance")
        assert_close(posterior.sample(case.noise.to(dtype)), case.latents, limit, "sample")
        assert_close(posterior.kl().mean(), truth.kl, limit, "KL")
        clamped = tokenizer.bottleneck(20 * case.compressed.to(dtype)).logvar
        assert_close(clamped, published.gaussian(20 * case.compressed).logvar, limit, "clamped log variance")

    latents = case.latents.to(dtype)
    assert_close(tokenizer.decompressed(latents), case.decompressed, limit, "decompressed map")
    assert_close(tokenizer.style(case.decompressed.to(dtype)), case.style, limit, "style")
    truncated = published.style({k: x.double() for k, x in case.state.items()}, case.decompressed, 0.3)
    assert_close(tokenizer.style(case.decompressed.to(dtype), 0.3), truncated, limit, "truncated style")
    largest, smaller = tokenizer.decode(latents, return_multiscale=True)
    for ours, image in zip([largest, *smaller], case.decoded, strict=True):
        assert_close(ours, image, limit, f"image of {image.shape[-1]} px")


@torch.no_grad()
def test_reference_equals_published_form(case: Case) -> None:
    tokenizer = convert(case.state, case.arguments).double()
    tokenizer.fused = False
    check(case, tokenizer, limit=1e-9, single=1e-5)


@torch.no_grad()
def test_fused_equals_published_form(case: Case) -> None:
    tokenizer = convert(case.state, case.arguments)
    tokenizer.fused = True
    check(case, tokenizer, limit=1e-4, single=1e-5)


@torch.no_grad()
def test_images_to_posterior_in_one_call(case: Case) -> None:
    posterior = convert(case.state, case.arguments).encode(case.images.float())
    if isinstance(case.posterior, published.Quantised):
        assert torch.equal(posterior.indices, case.posterior.indices)
    else:
        assert_close(posterior.mean, case.posterior.mean, 1e-4, "mean")
        assert_close(posterior.logvar, case.posterior.logvar, 1e-4, "log variance")


@pytest.mark.parametrize("case", ["one_codebook", "codebooks_of_convolutions"], indirect=True)
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_the_quantiser(case: Case, fused: bool) -> None:
    tokenizer = convert(case.state, case.arguments)
    tokenizer.fused = fused
    state = {name: x.double().requires_grad_() for name, x in case.state.items()}
    ours_in, truth_in = case.compressed.float().requires_grad_(), case.compressed.clone().requires_grad_()
    ours, truth = tokenizer.bottleneck(ours_in), published.quantise(state, case.arguments, truth_in)
    weight = torch.randn_like(truth.latents)
    for posterior, latents in ((ours, ours.sample()), (truth, truth.latents)):
        loss = (weight * latents).sum() + 10 * posterior.quantization_loss + posterior.entropy_loss
        loss.backward()
    assert_close(ours_in.grad, truth_in.grad, 1e-4, "gradient of the compressed map")
    for i, book in enumerate(tokenizer.bottleneck.codebooks):
        name = f"ldm_adapter.quantizer.codebooks.{i}"
        truth_grad = state[f"{name}.codebook.weight"].grad
        assert_close(book.weight.grad, truth_grad, 1e-4, f"gradient of codebook {i}")
        assert torch.equal(book.usage, case.state[f"{name}.vocab_usage"])


@pytest.mark.parametrize(
    "case", [name for name, (options, _) in VARIANTS.items() if options["use_vf_loss"]], indirect=True
)
@pytest.mark.parametrize(
    ("fused", "dtype", "limit"), [(False, torch.float64, 1e-9), (True, torch.float32, 1e-4)]
)
def test_vf_loss_and_gradient(case: Case, fused: bool, dtype: torch.dtype, limit: float) -> None:
    tokenizer = convert(case.state, case.arguments).to(dtype)
    tokenizer.fused = fused
    state = {name: x.double() for name, x in case.state.items()}
    ours_in, truth_in = (case.latents.to(t, copy=True).requires_grad_() for t in (dtype, torch.float64))
    ours = tokenizer.alignment_loss(ours_in, [x.flatten(2).mT.to(dtype) for x in case.maps])
    truth = published.vf_loss(state, case.arguments, truth_in, case.maps)
    assert_close(ours.detach(), truth.detach(), limit, "VF loss")
    ours.backward()
    truth.backward()
    size = truth_in.grad.abs().max()
    assert_close(ours_in.grad / size, truth_in.grad / size, limit, "gradient of the latents")


def test_published_form_equals_published_outputs(parity_dir: Path) -> None:
    """The yardstick itself, on the recorded outputs of the published implementation."""
    folder = parity_dir / "vfm_vae_continuous"
    options = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "generator.safetensors")
    recorded = load_file(folder / "io.safetensors")
    drawn = random_state(options)
    assert {k: x.shape for k, x in drawn.items()} == {k: x.shape for k, x in state.items()}
    assert all(torch.equal(drawn[k], state[k]) for k in state if k.endswith(("blur_weight", "zero_k_bias")))

    maps = published.features(state, options, recorded["image"] * 2 - 1)
    for i, features in enumerate(maps):
        assert_close(features.flatten(2).mT, recorded[f"feature_{i}"], 2e-5, f"features {i}")
    moments = published.compress(state, options, maps)
    posterior = published.gaussian(moments)
    latents = posterior.sample(recorded["eps"])
    assert_close(moments, recorded["moments"], 2e-5, "moments")
    assert_close(posterior.kl, recorded["kl_loss"].squeeze(), 2e-5, "KL")
    vf_loss = published.vf_loss(state, options, latents, maps)
    assert_close(vf_loss, recorded["vf_loss"].squeeze(), 2e-5, "VF loss")
    decompressed = published.decompress(state, options, latents)
    assert_close(decompressed, recorded["z_decompressed"], 2e-5, "decompressed map")
    assert_close(published.style(state, decompressed), recorded["ws"][:, 0], 2e-5, "style")
    images = [recorded["reconstruction"], *(recorded[f"multiscale_{i}"] for i in range(5))]
    for ours, image in zip(published.decode(state, options, latents), images, strict=True):
        assert_close(ours, image, 1e-4, f"image of {image.shape[-1]} px")
