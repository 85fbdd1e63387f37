from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from tests.tokenizer.tiny import DISCRETE, VIT, tiny_config, tiny_tokenizer
from vfmvae.encoders import EncoderConfig, ViTConfig
from vfmvae.images import to_unit
from vfmvae.tokenizer import AlignmentConfig, BottleneckConfig, FusionConfig, Tokenizer, TokenizerConfig


def images(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(batch, 3, height, width) * 2 - 1


def test_full_size_parameter_counts() -> None:
    """The published f16d32 model: encoder 316.7 M, fusion 13.5 M, mapping 0.53 M, decoder 125.7 M."""
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig(), encoder_weights=None)
    millions = {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in tokenizer.named_children()}
    assert millions["encoder"] == pytest.approx(316.7, abs=0.05)
    assert millions["fusion"] + millions["decompress"] + millions["align"] == pytest.approx(13.5, abs=0.05)
    assert millions["style"] == pytest.approx(0.53, abs=0.005)
    assert millions["decoder"] == pytest.approx(125.7, abs=0.05)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (64, 192)])
def test_any_multiple_of_64_goes_round(size: tuple[int, int]) -> None:
    tokenizer = tiny_tokenizer().eval()
    x = images(1, *size)
    features = tokenizer.features(x)
    assert [f.shape for f in features] == [(1, size[0] * size[1] // 64, 32)] * 3
    latents = tokenizer.encode(x).sample()
    assert latents.shape == (1, 8, size[0] // 16, size[1] // 16)
    image, smaller = tokenizer.decode(latents, return_multiscale=True)
    assert image.shape == x.shape
    assert [s.shape[-2:] for s in smaller] == [(size[0] >> k, size[1] >> k) for k in range(1, 6)]
    assert tokenizer.alignment_loss(latents, features).ndim == 0


def test_uint8_and_float_images_are_the_same() -> None:
    tokenizer, x = tiny_tokenizer().eval(), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(tokenizer.encode(x).mean, tokenizer.encode(to_unit(x)).mean)


def test_fused_and_reference_give_equal_losses_and_gradients() -> None:
    tokenizer, x, noise = tiny_tokenizer().double(), images().double(), torch.randn(2, 8, 4, 4).double()
    results = []
    for fused in (False, True):
        tokenizer.fused = fused
        output = tokenizer(x, noise)
        loss = F.l1_loss(output.reconstruction, x) + sum(image.square().mean() for image in output.multiscale)
        loss = loss + tokenizer.alignment_loss(output.latents, output.features) + output.posterior.kl().mean()
        parameters = {n: p for n, p in tokenizer.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        results.append((loss, dict(zip(parameters, gradients, strict=True))))
    (loss, gradients), (fused_loss, fused_gradients) = results
    torch.testing.assert_close(fused_loss, loss, rtol=1e-10, atol=0)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, f"{name} gets no gradient"
        error = (fused_gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_the_encoder_is_frozen() -> None:
    tokenizer = tiny_tokenizer().train()
    assert not tokenizer.encoder.training and tokenizer.decoder.training
    assert not any(p.requires_grad for p in tokenizer.encoder.parameters())
    tokenizer(images()).reconstruction.sum().backward()
    assert all(p.grad is None for p in tokenizer.encoder.parameters())


def test_alignment_compares_projected_latents_with_averaged_last_features() -> None:
    tokenizer, x = tiny_tokenizer(), images()
    features = tokenizer.features(x)
    latents = torch.randn(2, 8, 4, 4)
    prediction, target = tokenizer.alignment_pair(latents, features)
    last = features[2].view(2, 8, 8, 32)
    torch.testing.assert_close(
        target[1, 5], last[1, 2:4, 2:4].mean(dim=(0, 1))
    )  # position 5: row 1, column 1
    torch.testing.assert_close(prediction[1, 5], tokenizer.align.weight @ latents[1, :, 1, 1])


def test_discrete_tokenizer_decodes_from_indices() -> None:
    tokenizer = tiny_tokenizer(tiny_config(bottleneck=DISCRETE)).eval()
    posterior = tokenizer.encode(images())
    assert posterior.indices.shape == (2, 2, 4, 4)
    again = tokenizer.decode_indices(posterior.indices)
    assert torch.equal(tokenizer.decode_indices(posterior.indices.to(torch.int32)), again)
    assert torch.equal(tokenizer.decode(posterior.codes), again)
    torch.testing.assert_close(again, tokenizer.decode(posterior.sample()), atol=1e-4, rtol=1e-4)


def test_indices_that_cannot_be_decoded_are_named() -> None:
    tokenizer = tiny_tokenizer(tiny_config(bottleneck=DISCRETE)).eval()
    with pytest.raises(ValueError, match=r"indices go from 16 to 16; each codebook has the codes 0\.\.15"):
        tokenizer.decode_indices(torch.full((1, 2, 4, 4), 16))
    with pytest.raises(ValueError, match=r"shape \(1, 3, 4, 4\); needed is \[B, 2, h, w\]"):
        tokenizer.decode_indices(torch.zeros(1, 3, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="h and w in multiples of 4"):
        tokenizer.decode_indices(torch.zeros(1, 2, 4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="Gaussian and have no indices; use decode"):
        tiny_tokenizer().decode_indices(torch.zeros(1, 2, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_computes_near_float32_with_float32_parameters(fused: bool) -> None:
    tokenizer, x, noise = tiny_tokenizer().eval(), images(), torch.randn(2, 8, 4, 4)
    tokenizer.fused = fused
    truth = tokenizer.decode(tokenizer.encode(x).sample(noise))
    tokenizer.compute_dtype = torch.bfloat16
    posterior = tokenizer.encode(x)
    assert posterior.mean.dtype == torch.float32
    image = tokenizer.decode(posterior.sample(noise))
    assert image.dtype == torch.float32
    assert (image - truth).norm() / truth.norm() < 0.1
    tokenizer.compute_dtype = None
    assert tokenizer.bfloat16().decode(posterior.sample(noise)).isfinite().all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 1, 64, 64), r"shape \(1, 1, 64, 64\); needed is \[B, 3, H, W\]"),
        (torch.zeros(3, 64, 64), r"needed is \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 64, 80), "64 x 80; this model needs height and width in multiples of 64"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "dtype torch.int64"),
        (torch.full((1, 3, 64, 64), float("nan")), "NaN"),
        (torch.full((1, 3, 64, 64), 255.0), "values up to 255"),
        (np.zeros((1, 3, 64, 64)), r"must be a torch.Tensor, \[B, 3, H, W\].*; this is a numpy.ndarray"),
        ([torch.zeros(3, 64, 64)], "must be a torch.Tensor.*; this is a list"),
        (
            PIL.Image.new("RGB", (64, 64)),
            r"from_numpy\(numpy.array\(picture\)\).*; this is a PIL.Image.Image",
        ),
    ],
)
def test_bad_images_are_named(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer().encode(x)


def test_the_conversion_that_the_message_gives_works() -> None:
    picture = PIL.Image.new("RGB", (64, 128))
    tokenizer = tiny_tokenizer().eval()
    images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    assert tokenizer.encode(images).mean.shape == (1, 8, 8, 4)


def test_bad_latents_are_named() -> None:
    with pytest.raises(ValueError, match="latents must be a torch.Tensor.*; this is a numpy.ndarray"):
        tiny_tokenizer().decode(np.zeros((1, 8, 4, 4)))
    with pytest.raises(ValueError, match="latents have dtype torch.int64"):
        tiny_tokenizer().decode(torch.zeros(1, 8, 4, 4, dtype=torch.int64))
    for shape in [(1, 4, 4, 4), (1, 8, 4, 6), (8, 4, 4), (1, 8, 0, 4)]:
        with pytest.raises(
            ValueError, match=r"needed is \[B, 8, h, w\] with B at least 1, and h and w in multiples of 4"
        ):
            tiny_tokenizer().decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample": 12}, "downsample is 12"),
        ({"resolution": 100}, "resolution is 100; it must be a multiple of 64"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"fusion": FusionConfig(layer_widths=(8,))}, "1 entries for 3 encoder layers"),
        ({"latent_channels": "8"}, 'latent_channels is "8"; needed is a whole number'),
        ({"resolution": None}, "resolution is null; needed is a whole number"),
        ({"decoder": {"style_width": 1.5}}, "decoder.style_width is 1.5; needed is a whole number"),
        ({"decoder": {"blur": "no"}}, 'decoder.blur is "no"; needed is true or false'),
        ({"decoder": {"latent_activation": "relu"}}, "decoder.latent_activation is .*one of leaky_relu, "),
        ({"alignment": 0.5}, "alignment is 0.5; needed is an object with fields"),
    ],
)
def test_bad_values_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


def test_tokens_must_divide_into_latent_positions() -> None:
    encoder = EncoderConfig(name="mini", layers=(0, 1, -1), scale_factor=0.75, vit=VIT)
    with pytest.raises(
        ValueError, match="gives 1.5 tokens per latent position.*scale_factor 0.5 or a multiple"
    ):
        Tokenizer(tiny_config(encoder=encoder), encoder_weights=None)


def test_alignment_needs_the_last_layer() -> None:
    config = tiny_config()
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, layers=(0, 1, 2)))
    tokenizer, x = tiny_tokenizer(config), images()
    with pytest.raises(ValueError, match=r"layers \(0, 1, 2\) lacks -1"):
        tokenizer.alignment_loss(torch.zeros(2, 8, 4, 4), tokenizer.features(x))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (EncoderConfig, {"layers": "0,12,-1"}, 'encoder.layers is "0,12,-1"; needed is a list'),
        (EncoderConfig, {"scale_factor": "2"}, 'encoder.scale_factor is "2"; needed is a number'),
        (ViTConfig, dict(dataclasses.asdict(VIT), depth=2.5), "encoder.vit.depth is 2.5"),
        (FusionConfig, {"layer_widths": 64}, "fusion.layer_widths is 64; needed is a list"),
        (BottleneckConfig, {"codes": "4"}, 'bottleneck.codes is "4"; needed is a whole number'),
        (AlignmentConfig, {"cosine_margin": None}, "alignment.cosine_margin is null; needed is a number"),
    ],
)
def test_every_part_holds_its_values_to_their_types(part: type, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f[:2],
            r"the shapes \[\(2, 64, 32\), \(2, 64, 32\)\]; needed is one \[2, 64, 32\] for each",
        ),
        (lambda f: [*f, f[0]], r"needed is one \[2, 64, 32\] for each of encoder.layers \(0, 1, -1\)"),
        (lambda f: [], r"the shapes \[\]"),
        (lambda f: f[0], r"the shapes \[\(64, 32\)"),
        (lambda f: [x[:, :-1] for x in f], r"\(2, 63, 32\)"),
        (lambda f: [*f[:2], f[2][..., :16]], r"\(2, 64, 16\)\]; needed is one"),
        (lambda f: [f[0][:1], *f[1:]], r"the shapes \[\(1, 64, 32\), \(2, 64, 32\)"),
        (lambda f: [x.numpy() for x in f], "features must be a torch.Tensor.*; this is a numpy.ndarray"),
    ],
)
def test_features_that_do_not_fit_are_named(change: Callable, message: str) -> None:
    tokenizer = tiny_tokenizer()
    features = change(tokenizer.features(images()))
    with pytest.raises(ValueError, match=message):
        tokenizer.alignment_loss(torch.zeros(2, 8, 4, 4), features)
    with pytest.raises(ValueError, match="^features "):
        tokenizer.fuse(features, (4, 4))


def test_features_of_other_images_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    features = tokenizer.features(images())
    with pytest.raises(ValueError, match=r"needed is one \[1, 64, 32\]"):
        tokenizer.alignment_loss(torch.zeros(1, 8, 4, 4), features)
    with pytest.raises(ValueError, match=r"needed is one \[2, 128, 32\]"):
        tokenizer.alignment_loss(torch.zeros(2, 8, 4, 8), features)
    with pytest.raises(ValueError, match=r"latents have shape \(2, 4, 4, 4\); needed is \[B, 8, h, w\]"):
        tokenizer.alignment_loss(torch.zeros(2, 4, 4, 4), features)


def test_what_a_tokenizer_is_built_from_is_said() -> None:
    for path in ("runs/demo", Path("runs/demo")):
        with pytest.raises(ValueError, match="to load 'runs/demo', use vfmvae.load"):
            Tokenizer(path)
    with pytest.raises(ValueError, match="built from a TokenizerConfig, not from a dict"):
        Tokenizer({"resolution": 64})


def test_fused_is_true_or_false() -> None:
    for name in ("gemm", "reference", None, 1):
        with pytest.raises(ValueError, match=f"fused is {name!r}; a tokenizer takes True or False"):
            Tokenizer(tiny_config(), encoder_weights=None, fused=name)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="fused is 'gemm'"):
        tokenizer.fused = "gemm"
    assert tokenizer.fused is True
