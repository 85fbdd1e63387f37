"""Weights from files, directories, state dicts and the hub, and what is said when they cannot be had."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vfmvae import weights
from vfmvae.encoders import EncoderConfig, FrozenEncoder, ViTConfig, build_encoder
from vfmvae.encoders.hf_weights import convert_clip, convert_siglip

TINY = ViTConfig(width=16, depth=2, heads=2, patch_size=8, image_size=32, mlp_width=24)


def config(name: str, vit: ViTConfig = TINY, source: Path | None = None) -> EncoderConfig:
    return EncoderConfig(name, (-1,), 1.0, str(source) if source else None, vit)


def random_encoder(name: str = "siglip2-base-patch16-224", vit: ViTConfig = TINY) -> FrozenEncoder:
    encoder = build_encoder(config(name, vit), weights=None)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return encoder


def timm_state(encoder: FrozenEncoder) -> dict[str, Tensor]:
    return {name.removeprefix("trunk."): value.clone() for name, value in encoder.state_dict().items()}


def assert_loaded(encoder: FrozenEncoder, original: FrozenEncoder) -> None:
    for name, value in original.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name


def hf_siglip_state(encoder: FrozenEncoder, prefix: str) -> dict[str, Tensor]:
    """The encoder's weights under the names that Hugging Face gives them, written out independently."""
    timm = timm_state(encoder)
    state = {
        "embeddings.position_embedding.weight": timm["pos_embed"][0],
        "head.probe": timm["attn_pool.latent"],
        "embeddings.patch_embedding.weight": timm["patch_embed.proj.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"embeddings.patch_embedding.{kind}"] = timm[f"patch_embed.proj.{kind}"]
        state[f"post_layernorm.{kind}"] = timm[f"norm.{kind}"]
        state[f"head.layernorm.{kind}"] = timm[f"attn_pool.norm.{kind}"]
        state[f"head.attention.out_proj.{kind}"] = timm[f"attn_pool.proj.{kind}"]
        packed = [timm[f"attn_pool.q.{kind}"], timm[f"attn_pool.kv.{kind}"]]
        state[f"head.attention.in_proj_{kind}"] = torch.cat(packed)
        for layer in ("fc1", "fc2"):
            state[f"head.mlp.{layer}.{kind}"] = timm[f"attn_pool.mlp.{layer}.{kind}"]
        for index in range(2):
            theirs, ours = f"encoder.layers.{index}.", f"blocks.{index}."
            for letter, part in zip("qkv", timm[f"{ours}attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{theirs}self_attn.{letter}_proj.{kind}"] = part
            state[f"{theirs}self_attn.out_proj.{kind}"] = timm[f"{ours}attn.proj.{kind}"]
            for number in ("1", "2"):
                state[f"{theirs}layer_norm{number}.{kind}"] = timm[f"{ours}norm{number}.{kind}"]
                state[f"{theirs}mlp.fc{number}.{kind}"] = timm[f"{ours}mlp.fc{number}.{kind}"]
    return {prefix + name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "vision_model.", "vision_model.vision_model."])
def test_siglip_state_dicts_under_any_prefix(prefix: str) -> None:
    original = random_encoder()
    state = hf_siglip_state(original, prefix)
    assert convert_siglip(state).keys() == timm_state(original).keys()
    assert_loaded(build_encoder(config("siglip2-base-patch16-224"), state), original)


def test_the_rest_of_a_whole_model_is_left_out_and_strangers_are_named() -> None:
    original = random_encoder()
    state = hf_siglip_state(original, "vision_model.")
    state |= {"text_model.embeddings.token_embedding.weight": torch.zeros(3), "logit_scale": torch.zeros(1)}
    assert_loaded(build_encoder(config("siglip2-base-patch16-224"), state), original)
    state["vision_model.encoder.layers.1.mlp.fc3.weight"] = torch.zeros(1)
    state["audio_model.weight"] = torch.zeros(1)
    del (
        state["vision_model.post_layernorm.bias"],
        state["vision_model.encoder.layers.0.self_attn.k_proj.bias"],
    )
    with pytest.raises(ValueError) as error:
        build_encoder(config("siglip2-base-patch16-224"), state)
    missing, unknown = str(error.value).split("unknown: ")
    assert (
        "siglip2-base-patch16-224" in missing
        and "norm.bias" in missing
        and "blocks.0.attn.qkv.bias" in missing
    )
    assert "vision_model.encoder.layers.1.mlp.fc3.weight" in unknown and "audio_model.weight" in unknown
    assert "blocks.0.attn.q.bias" in unknown


def test_a_state_dict_of_another_format_is_not_mistaken() -> None:
    assert convert_siglip(timm_state(random_encoder())) is None
    assert convert_clip({"cls_token": torch.zeros(1)}) is None


@pytest.mark.parametrize(
    "name", ["siglip2-base-patch16-224", "dinov2-giant", "dinov3-vitb16", "eva02-clip-base-patch16-224"]
)
def test_own_state_dict_and_timm_state_dict(name: str) -> None:
    original = random_encoder(name)
    assert_loaded(build_encoder(config(name), original.state_dict()), original)
    timm = timm_state(original) | {"head.weight": torch.zeros(5, 16)}  # a classifier is not the encoder
    assert_loaded(build_encoder(config(name), timm), original)


def test_original_dinov2_with_registers() -> None:
    """The publication's names; its position of the class token goes into the token itself."""
    original = random_encoder("dinov2-with-registers-base")
    state = timm_state(original)
    position = torch.full((1, 1, 16), 0.25)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 16)
    loaded = build_encoder(config("dinov2-with-registers-base"), {"model": state}["model"])
    for name, value in original.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)


def test_original_openai_clip() -> None:
    original = random_encoder("clip-vit-base-patch16")
    state: dict[str, Tensor] = {"visual.proj": torch.zeros(16, 8), "logit_scale": torch.zeros(())}
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    names |= {
        "blocks": "transformer.resblocks",
        "norm_pre": "ln_pre",
        "patch_embed.proj": "conv1",
        "attn.qkv.": "attn.in_proj_",
    }
    for name, value in timm_state(original).items():
        theirs = "ln_post" + name[4:] if name.startswith("norm.") else name
        for ours, word in names.items():
            theirs = theirs.replace(ours, word)
        theirs = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}.get(theirs, theirs)
        state[f"visual.{theirs}"] = value.flatten() if theirs == "class_embedding" else value.squeeze(0)
    assert_loaded(build_encoder(config("clip-vit-base-patch16"), state), original)


def test_positions_of_another_grid_are_resampled() -> None:
    large = random_encoder(vit=ViTConfig(16, 2, 2, 8, 64, 24))
    loaded = build_encoder(config("siglip2-base-patch16-224"), hf_siglip_state(large, ""))
    image = large.trunk.pos_embed.view(1, 8, 8, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, (4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(
        loaded.trunk.pos_embed, expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6
    )


def test_weights_of_another_model_are_refused() -> None:
    other = random_encoder(vit=ViTConfig(16, 2, 2, 4, 32, 24))
    with pytest.raises(ValueError, match="patch size of 4 where 8 is needed"):
        build_encoder(config("siglip2-base-patch16-224"), timm_state(other))
    wide = random_encoder(vit=ViTConfig(16, 2, 2, 8, 32, 32))
    with pytest.raises(ValueError, match=r"mlp.fc1.weight is \[32, 16\], needed \[24, 16\]"):
        build_encoder(config("siglip2-base-patch16-224"), timm_state(wide))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin", "mine.safetensors"]
)
@pytest.mark.parametrize("as_directory", [False, True])
def test_files_and_directories(tmp_path: Path, file: str, as_directory: bool) -> None:
    original = random_encoder()
    state = hf_siglip_state(original, "vision_model.")
    if file.endswith(".safetensors"):
        save_file(state, tmp_path / file)
    else:
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / file)
    (tmp_path / "config.json").write_text("{}")
    source = tmp_path if as_directory else tmp_path / file
    assert_loaded(build_encoder(config("siglip2-base-patch16-224"), source), original)
    assert_loaded(build_encoder(config("siglip2-base-patch16-224", source=source)), original)


def test_shards_are_read_by_need(tmp_path: Path) -> None:
    save_file({"visual.a": torch.ones(1)}, tmp_path / "1.safetensors")
    index = {"visual.a": "1.safetensors", "language.b": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert weights.read_weights(tmp_path, only="visual.").keys() == {"visual.a"}
    with pytest.raises(ValueError, match="2.safetensors, which is not beside it"):
        weights.read_weights(tmp_path)


class Stranger:
    """What a pickle may hold beside tensors."""


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing.safetensors does not exist"):
        weights.read_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="holds no weights; looked for model.safetensors"):
        weights.read_weights(tmp_path)

    with (tmp_path / "pickle.pth").open("wb") as file:
        pickle.dump({"a": Stranger()}, file, protocol=2)
    torch.save({"a": Stranger()}, tmp_path / "archive.pth")
    for name in ("pickle.pth", "archive.pth"):
        with pytest.raises(
            ValueError, match=rf"{name} was refused: it holds more than tensors \(.*Stranger\)"
        ):
            weights.read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict but list"):
        weights.read_weights(tmp_path / "list.pth")
    torch.save({"a": torch.ones(1), "step": 3}, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match="not tensors: step"):
        weights.read_weights(tmp_path / "mixed.pth")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy.pth"])
def test_cut_files_are_truncated_wherever_they_end(tmp_path: Path, kind: str) -> None:
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    state = {"a.weight": torch.ones(60), "b": torch.ones(3, 5)}
    if kind == "safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "pth")
    content = whole.read_bytes()
    for part in [*range(64), *range(64, len(content), 13), len(content) - 1]:
        cut.write_bytes(content[:part])
        with pytest.raises(ValueError) as error:
            weights.read_weights(cut)
        assert str(cut) in str(error.value) and "truncated or damaged" in str(error.value), part
        if kind != "legacy.pth":  # where a name in a pickle can end early, and is a name as well
            assert f"({part} bytes) is truncated or damaged" in str(error.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy.pth"])
def test_changed_bytes_never_raise_anything_else(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"changed.{kind}"
    state = {"a.weight": torch.ones(6), "b": torch.ones(3, 5)}
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "pth")
    content = file.read_bytes()
    found = 0
    for place in range(0, len(content), 3):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            weights.read_weights(file)  # a changed value is no error that a reader could see
        except ValueError as error:
            assert str(file) in str(error)
            found += 1
    assert found > 20


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a hub behind a port where nobody listens."""
    monkeypatch.setattr(weights.hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(weights.hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights.hub, "HF_HUB_OFFLINE", False)
    return tmp_path


def test_an_unreachable_hub_is_one_sentence(unreachable_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(repository: str, name: str) -> str:
        raise AssertionError("the hub's client is not asked: it would retry for half a minute")

    monkeypatch.setattr(weights, "hf_hub_download", never)
    with pytest.raises(ValueError) as error:
        weights.read_hub_weights("nobody/nothing-of-this-name", "some-encoder")
    for part in (
        "some-encoder",
        "nobody/nothing-of-this-name",
        str(unreachable_hub),
        "127.0.0.1",
        "as weights",
    ):
        assert part in str(error.value)


def test_offline_mode_asks_nobody(unreachable_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="some-encoder.*HF_HUB_OFFLINE"):
        weights.read_hub_weights("nobody/nothing", "some-encoder")


def test_a_cached_repository_needs_no_network(unreachable_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = unreachable_hub / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file)
    monkeypatch.setattr(
        weights, "try_to_load_from_cache", lambda _, name: str(file) if name == file.name else None
    )
    assert weights.read_hub_weights("some/where", "some-encoder").keys() == {"a"}


def test_models_without_published_weights_and_the_meta_device() -> None:
    with pytest.raises(ValueError, match="dimensions of its own has no published weights"):
        build_encoder(config("siglip2-base-patch16-224"))
    with torch.device("meta"), pytest.raises(ValueError, match="meta device holds no weights"):
        build_encoder(config("siglip2-base-patch16-224"), {})
