"""The timm encoders against Hugging Face's models, timm's own forward, and published numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vfmvae.encoders import ENCODERS, EncoderConfig, FrozenEncoder, ViTConfig, build_encoder
from vfmvae.encoders.timm_vit import resize_positions

transformers = pytest.importorskip("transformers")

TINY = ViTConfig(width=32, depth=3, heads=2, patch_size=8, image_size=32, mlp_width=48)
LAYERS = (0, 1, 2, 3, -1)
SIZES = [(32, 32), (40, 24)]  # the native grid, and another that is neither square nor of the same count


def hf_config(config_class: type, **changes: object) -> object:
    return config_class(
        hidden_size=TINY.width,
        num_hidden_layers=TINY.depth,
        num_attention_heads=TINY.heads,
        patch_size=TINY.patch_size,
        image_size=TINY.image_size,
        **changes,
    )


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter matters: what libraries initialise to 0 or 1 gets other values too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.ndim > 1 else 0.4))
    return model.eval()


def images(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def encoder_for(name: str, state: dict[str, Tensor], vit: ViTConfig = TINY) -> FrozenEncoder:
    return build_encoder(EncoderConfig(name, LAYERS, scale_factor=1.0, vit=vit), state)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def block_outputs(
    model: nn.Module, blocks: nn.ModuleList, run: Callable[[], object]
) -> tuple[list[Tensor], object]:
    """What goes into the first block and comes out of each, whatever the library calls its hidden states."""
    seen: list[Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    hooks += [
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        result = run()
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(blocks) + 1
    return seen, result


def saved_state(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The state dict as the library writes it to disk, whose names can differ from those in memory."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def compare(
    encoder: FrozenEncoder, hidden: list[Tensor], last: Tensor, pooled: Tensor, size: tuple[int, int]
) -> None:
    features = encoder(images(*size))
    assert features.grid == (size[0] // 8, size[1] // 8)
    count = features.grid[0] * features.grid[1]
    for ours, theirs in zip(features.layers, [*hidden, last], strict=True):
        assert ours.shape == (2, count, TINY.width)
        assert_same(ours, theirs[:, -count:])
    assert_same(features.pooled, pooled)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["siglip2-large-patch16-512", "siglip-so400m-patch14-384"])
def test_siglip_equals_hugging_face(name: str, size: tuple[int, int]) -> None:
    config = hf_config(transformers.SiglipVisionConfig, intermediate_size=TINY.mlp_width)
    model = randomise(transformers.SiglipVisionModel(config))
    encoder = encoder_for(name, model.state_dict())
    pixels = encoder.prepare(images(*size))
    hidden, out = block_outputs(
        model, model.encoder.layers, lambda: model(pixel_values=pixels, interpolate_pos_encoding=True)
    )
    compare(encoder, hidden, out.last_hidden_state, out.pooler_output, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_equals_hugging_face(
    registers: bool, gated: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    if registers:
        classes = transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel
    else:
        classes = transformers.Dinov2Config, transformers.Dinov2Model
    model = randomise(classes[1](hf_config(classes[0], mlp_ratio=2, use_swiglu_ffn=gated)))
    # The gated MLP is two thirds as wide, rounded up to a multiple of 8: 43 -> 48; the plain one is 64.
    vit = ViTConfig(32, 3, 2, 8, 32, mlp_width=48 if gated else 64)
    name = f"dinov2-{'with-registers-' if registers else ''}{'giant' if gated else 'base'}"
    encoder = encoder_for(name, model.state_dict(), vit)
    pixels = encoder.prepare(images(*size))
    hidden, out = block_outputs(model, model.encoder.layer, lambda: model(pixel_values=pixels))
    compare(encoder, hidden, out.last_hidden_state, out.pooler_output, size)
    from_disk = encoder_for(name, saved_state(model, tmp_path), vit)
    assert_same(from_disk(images(*size)).pooled, out.pooler_output)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "gated"), [("dinov3-vitb16", False), ("dinov3-vith16plus", True)])
def test_dinov3_equals_hugging_face(name: str, gated: bool, size: tuple[int, int], tmp_path: Path) -> None:
    config = hf_config(
        transformers.DINOv3ViTConfig,
        intermediate_size=TINY.mlp_width,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    model = randomise(transformers.DINOv3ViTModel(config))
    encoder = encoder_for(name, model.state_dict())
    pixels = encoder.prepare(images(*size))
    hidden, out = block_outputs(model, model.model.layer, lambda: model(pixel_values=pixels))
    compare(encoder, hidden, out.last_hidden_state, out.pooler_output, size)
    from_disk = encoder_for(name, saved_state(model, tmp_path))
    assert_same(from_disk(images(*size)).pooled, out.pooler_output)


@pytest.mark.parametrize("size", SIZES)
def test_clip_equals_hugging_face(size: tuple[int, int]) -> None:
    config = hf_config(transformers.CLIPVisionConfig, intermediate_size=TINY.mlp_width)
    model = randomise(transformers.CLIPVisionModel(config))
    encoder = encoder_for("clip-vit-large-patch14", model.state_dict())
    pixels = encoder.prepare(images(*size))
    embedded: list[Tensor] = []
    model.pre_layrnorm.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
    hidden, out = block_outputs(
        model, model.encoder.layers, lambda: model(pixel_values=pixels, interpolate_pos_encoding=True)
    )
    hidden[0] = embedded[0]  # layer 0 is before the extra norm
    with torch.no_grad():
        last = model.post_layernorm(hidden[-1])  # there only the class token is normalised
    compare(encoder, hidden, last, out.pooler_output, size)


@pytest.mark.parametrize("size", SIZES)
def test_mae_equals_hugging_face(size: tuple[int, int], tmp_path: Path) -> None:
    config = hf_config(
        transformers.ViTMAEConfig,
        intermediate_size=TINY.mlp_width,
        layer_norm_eps=1e-6,  # of the original publication
        mask_ratio=0.0,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    whole = randomise(transformers.ViTMAEForPreTraining(config))
    model = whole.vit
    encoder = encoder_for("mae-large", whole.state_dict())
    pixels = encoder.prepare(images(*size))
    count = (size[0] // 8) * (size[1] // 8)
    in_order = torch.arange(count).expand(2, -1).float()  # nothing masked, nothing shuffled
    hidden, out = block_outputs(
        model, model.layers, lambda: model(pixels, noise=in_order, interpolate_pos_encoding=True)
    )
    compare(encoder, hidden, out.last_hidden_state, out.last_hidden_state[:, 0], size)
    from_disk = encoder_for("mae-large", saved_state(whole, tmp_path))
    assert_same(from_disk(images(*size)).pooled, out.last_hidden_state[:, 0])


@pytest.mark.parametrize("size", SIZES)
def test_dino_equals_hugging_face(size: tuple[int, int]) -> None:
    config = hf_config(
        transformers.ViTConfig, intermediate_size=TINY.mlp_width, layer_norm_eps=1e-6, qkv_bias=True
    )
    model = randomise(transformers.ViTModel(config, add_pooling_layer=False))
    encoder = encoder_for("dino-small-patch16", model.state_dict())
    pixels = encoder.prepare(images(*size))
    hidden, out = block_outputs(model, model.layers, lambda: model(pixels, interpolate_pos_encoding=True))
    compare(encoder, hidden, out.last_hidden_state, out.last_hidden_state[:, 0], size)


@pytest.mark.parametrize("name", ["eva02-clip-base-patch16-224", "eva02-clip-large-patch14-224"])
def test_eva_clip_equals_timm(name: str) -> None:
    encoder = build_encoder(EncoderConfig(name, LAYERS, 1.0, vit=TINY), weights=None)
    randomise(encoder)
    features = encoder(images(32, 32))
    with torch.no_grad():
        theirs = encoder.trunk.forward_features(encoder.prepare(images(32, 32)))
    assert_same(features.layers[-1], theirs[:, 1:])
    assert_same(features.pooled, theirs[:, 0])
    assert_same(encoder.trunk.norm(features.layers[-2]), theirs[:, 1:])


def test_eva_clip_rotary_follows_the_grid() -> None:
    """A model built for another size is the same model, once its absolute positions are resampled."""
    small = build_encoder(EncoderConfig("eva02-clip-base-patch16-224", (-1,), 1.0, vit=TINY), weights=None)
    randomise(small)
    large_vit = ViTConfig(32, 3, 2, 8, 64, 48)
    large = build_encoder(
        EncoderConfig("eva02-clip-base-patch16-224", (-1,), 1.0, vit=large_vit), weights=None
    )
    state = small.trunk.state_dict()
    positions = state["pos_embed"]
    patches = resize_positions(positions[:, 1:], (4, 4), (8, 8), antialias=False)
    state["pos_embed"] = torch.cat([positions[:, :1], patches], dim=1)
    large.trunk.load_state_dict(state)
    assert_same(
        small(images(64, 64)).pooled, large.trunk.forward_features(large.prepare(images(64, 64)))[:, 0]
    )


def test_positions_are_resampled_as_in_torch_without_antialiasing() -> None:
    positions = torch.randn(1, 36, 5, generator=torch.Generator().manual_seed(0))
    assert resize_positions(positions, (6, 6), (6, 6), antialias=False) is positions
    image = positions.view(1, 6, 6, 5).permute(0, 3, 1, 2)
    plain = nn.functional.interpolate(image, (3, 2), mode="bicubic", align_corners=False)
    assert_same(resize_positions(positions, (6, 6), (3, 2), False), plain.flatten(2).transpose(1, 2))
    smooth = resize_positions(positions, (6, 6), (3, 2), antialias=True)
    assert (smooth - resize_positions(positions, (6, 6), (3, 2), antialias=False)).abs().max() > 0.1


def test_negative_layers_count_from_the_final_norm() -> None:
    config = EncoderConfig("siglip2-base-patch16-224", (-1, -2, -3, -5, 3, 0, 2), 1.0, vit=TINY)
    encoder = randomise(build_encoder(config, weights=None))
    last, minus2, minus3, minus5, three, zero, two = encoder(images(32, 32)).layers
    assert torch.equal(minus2, three) and torch.equal(minus3, two) and torch.equal(minus5, zero)
    assert_same(last, encoder.trunk.norm(three))


def test_mini_is_a_plain_transformer_with_mean_pooling() -> None:
    encoder = randomise(build_encoder(EncoderConfig("mini", (-1,), 1.0), weights=None))
    assert (encoder.width, encoder.depth, encoder.patch_size) == (128, 6, 8)
    features = encoder(images(64, 64))
    # In [-1, 1] with mean = std = 0.5 the pixels are fed as they are.
    expected = encoder.trunk.forward_features(images(64, 64))
    torch.testing.assert_close(features.layers[0], expected, rtol=1e-4, atol=1e-4)
    assert_same(features.pooled, features.layers[0].mean(dim=1))
    state = encoder.trunk.state_dict()
    assert state["pos_embed"].shape == (1, 64, 128) and "norm.weight" in state and "cls_token" not in state
    assert isinstance(encoder.trunk.blocks[0].mlp.act, nn.GELU)


def test_every_name_builds_and_the_sizes_are_published() -> None:
    millions: dict[str, float] = {}
    with torch.device("meta"):
        for name in ENCODERS:
            encoder = build_encoder(EncoderConfig(name, (0, -1)), weights=None)
            millions[name] = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
            assert all(
                parameter.is_meta and not parameter.requires_grad for parameter in encoder.parameters()
            )
            assert encoder.width % 8 == 0 and not encoder.training
    published = {  # of the model cards, where they count the vision encoder alone
        "siglip2-large-patch16-512": 316.7,
        "dinov2-base": 86.6,
        "dinov2-giant": 1136.5,
        "dinov3-vits16": 21.6,
        "dinov3-vits16plus": 28.7,
        "dinov3-vitb16": 85.7,
        "dinov3-vitl16": 303.1,
        "dinov3-vith16plus": 840.6,
        "dinov3-vit7b16": 6716.0,
    }
    assert {name: round(millions[name], 1) for name in published} == published


def test_published_parity_data(parity_dir: Path) -> None:
    folder = parity_dir / "vfm_vae_continuous"
    values = load_file(folder / "io.safetensors")
    prefix = "vfm_encoder.encoder.vision_model."
    generator = load_file(folder / "generator.safetensors")
    state = {name.removeprefix(prefix): value for name, value in generator.items() if name.startswith(prefix)}
    published = json.loads((folder / "config.json").read_text())
    vit = published["vfm_config"]
    config = EncoderConfig(
        "siglip2-large-patch16-512",
        tuple(published["patch_from_layers"]),
        published["scale_factor"],
        vit=ViTConfig(
            width=vit["hidden_size"],
            depth=vit["num_hidden_layers"],
            heads=vit["num_attention_heads"],
            patch_size=vit["patch_size"],
            image_size=vit["image_size"],
            mlp_width=vit["intermediate_size"],
        ),
    )
    features = build_encoder(config, state)(values["image"] * 2 - 1)
    assert features.grid == (8, 8)
    for index, tokens in enumerate(features.layers):
        torch.testing.assert_close(tokens, values[f"feature_{index}"], rtol=0, atol=2e-5)
    torch.testing.assert_close(features.pooled, values["pooled"], rtol=0, atol=2e-5)
