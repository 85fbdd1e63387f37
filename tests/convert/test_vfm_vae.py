"""The published fixture through the converter, and what the converter refuses."""

from __future__ import annotations

import functools
import json
import math
import pickle
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vfmvae
from tests.convert.published_state import random_state
from tests.convert.test_published_variants import arguments as tiny_arguments
from tests.helpers import ROOT
from vfmvae.convert.files import read_arguments, read_generator
from vfmvae.convert.vfm_vae import convert
from vfmvae.convert.vfm_vae_config import check_encoder_widths, tokenizer_config
from vfmvae.tokenizer import TokenizerConfig

State = dict[str, Tensor]


@functools.cache
def _fixture(folder: Path) -> tuple[State, dict[str, Any], State]:
    arguments = json.loads((folder / "config.json").read_text())
    return load_file(folder / "generator.safetensors"), arguments, load_file(folder / "io.safetensors")


@pytest.fixture
def published(parity_dir: Path) -> tuple[State, dict[str, Any], State]:
    """Parameters, arguments, inputs and outputs of the published implementation; free to change."""
    state, arguments, io = _fixture(parity_dir / "vfm_vae_continuous")
    return dict(state), dict(arguments), io


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_every_intermediate_equals_the_published_one(published: tuple, fused: bool) -> None:
    state, arguments, io = published
    tokenizer = convert(state, arguments)
    tokenizer.fused = fused
    images = io["image"] * 2 - 1  # the published range is [0, 1]
    features = tokenizer.features(images)
    posterior = tokenizer.encode(images)
    latents = posterior.sample(io["eps"])
    prediction, target = tokenizer.alignment_pair(latents, features)
    z_map = tokenizer.decompressed(latents)
    image, smaller = tokenizer.decode(latents, return_multiscale=True)
    ours = {
        **{f"feature_{i}": f for i, f in enumerate(features)},
        "pooled": tokenizer.encoder(images).pooled,
        "moments": posterior.moments,
        "z": latents,
        "kl_loss": posterior.kl().mean()[None],
        "vf_projected": prediction.transpose(1, 2).unflatten(2, (4, 4)),
        "vf_target": target.transpose(1, 2).unflatten(2, (4, 4)),
        "vf_loss": tokenizer.alignment_loss(latents, features)[None],
        "z_decompressed": z_map,
        "ws": tokenizer.style(z_map)[:, None].expand(-1, tokenizer.config.decoder.num_styles(), -1),
        "reconstruction": image,
        **{f"multiscale_{i}": s for i, s in enumerate(smaller)},
    }
    assert set(ours) == set(io) - {"image", "eps"}
    for name, tensor in ours.items():
        limit = 1e-4 if name.startswith(("reconstruction", "multiscale")) else 2e-5
        torch.testing.assert_close(
            tensor, io[name], atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_command_line_writes_a_folder_that_loads(parity_dir: Path, tmp_path: Path) -> None:
    source = parity_dir / "vfm_vae_continuous"
    done = _command(
        "--checkpoint",
        source / "generator.safetensors",
        "--config",
        source / "config.json",
        "--output",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    io = load_file(source / "io.safetensors")
    image = vfmvae.load(tmp_path / "out").decode(io["z"])
    torch.testing.assert_close(image, io["reconstruction"], atol=1e-4, rtol=0)


def test_command_line_mistakes_are_one_line(parity_dir: Path, tmp_path: Path) -> None:
    source = parity_dir / "vfm_vae_continuous"
    whole = (source / "generator.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    for checkpoint, message in (
        (tmp_path / "half.safetensors", "truncated or damaged"),
        (tmp_path / "none.pth", "does not exist"),
    ):
        done = _command(
            "--checkpoint", checkpoint, "--config", source / "config.json", "--output", tmp_path / "out"
        )
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vfmvae.convert", "--from", "vfm-vae", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_unknown_and_missing_parameters_are_named(published: tuple) -> None:
    state, arguments, _ = published
    with pytest.raises(ValueError, match=r"no place for \['mapping.other', 'synthesis.new.weight'\]"):
        convert(state | {"synthesis.new.weight": torch.zeros(1), "mapping.other": torch.zeros(1)}, arguments)
    del state["mapping.x_avg"]
    with pytest.raises(ValueError, match=r"call for \['style.average'\] more"):
        convert(state, arguments)


def test_all_that_is_missing_or_left_over_is_one_error_with_the_file() -> None:
    options = tiny_arguments()
    state = random_state(options)
    missing = (
        "synthesis.blocks.0.seperate_upsample_conv.blur_weight",
        "synthesis.blocks.5.last_upsample_conv.blur_weight",
        "mapping.x_avg",
    )
    for name in missing:
        del state[name]
    del state[
        next(name for name in state if name.startswith("vfm_encoder.") and name.endswith("q_proj.bias"))
    ]
    state |= {"synthesis.new.weight": torch.zeros(1), "synthesis.blocks.9.conv0.gamma": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"^net\.pth: ") as error:
        convert(state, options, Path("net.pth"))
    for name in (*missing[:2], "style.average", "synthesis.new.weight", "decoder.blocks.9.layers.0.gamma"):
        assert repr(name) in str(error.value)
    assert "do not fit the encoder siglip2-large-patch16-512" in str(error.value)


@pytest.mark.parametrize("name", ["mapping.mlp.fc0.weight", "vfm_encoder.*k_proj.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    options = tiny_arguments()
    state = random_state(options)
    key = next(key for key in state if fnmatch(key, name))
    state[key].view(-1)[-1] = value
    with pytest.raises(ValueError, match=r"net\.pth: .* holds values that are not finite"):
        convert(state, options, "net.pth")


def test_the_command_says_what_it_converted(tmp_path: Path) -> None:
    options = tiny_arguments()
    save_file(random_state(options), tmp_path / "net.safetensors")
    (tmp_path / "c.json").write_text(json.dumps(options))
    files = ("--checkpoint", tmp_path / "net.safetensors", "--config", tmp_path / "c.json")
    done = _command(*files, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("siglip2-large-patch16-512 with 3 blocks of width 32\n")


def test_constants_are_checked_before_they_are_dropped(published: tuple) -> None:
    state, arguments, _ = published
    key = "ldm_adapter.post_quant.blocks.0.attn.zero_k_bias"
    with pytest.raises(ValueError, match="zero_k_bias is not zero"):
        convert(state | {key: state[key] + 1}, arguments)
    key = "synthesis.blocks.3.seperate_upsample_conv.blur_weight"
    with pytest.raises(ValueError, match="blur_weight is not the binomial blur"):
        convert(state | {key: state[key] * 2}, arguments)


def test_blur_filters_must_be_there_exactly_where_they_are_applied(published: tuple) -> None:
    state, arguments, _ = published
    with pytest.raises(ValueError, match=r"no place for .*upsample.blur_weight"):
        convert(state, arguments | {"use_gaussian_blur": False})
    key = "synthesis.blocks.4.last_upsample_conv.blur_weight"
    small = state["synthesis.blocks.1.last_upsample_conv.blur_weight"][:8]
    with pytest.raises(ValueError, match="is not the binomial blur of size 5"):
        convert(state | {key: small}, arguments)
    del state[key]
    with pytest.raises(ValueError, match=rf"call for \['{key}'\] more"):
        convert(state, arguments)


def test_the_alignment_projection_may_only_be_missing_where_it_was_not_trained(published: tuple) -> None:
    state, arguments, _ = published
    del state["ldm_adapter.linear_proj.weight"]
    with pytest.raises(ValueError, match=r"call for \['align.weight'\] more"):
        convert(state, arguments)
    convert(state, arguments | {"use_vf_loss": False})


def test_encoder_widths_must_be_the_encoders(published: tuple) -> None:
    state, arguments, _ = published
    with pytest.raises(ValueError, match=r"patch_in_dimensions is \[7, 7, 7\]; the encoder's layers are 64"):
        convert(state, arguments | {"patch_in_dimensions": [7, 7, 7]})


@pytest.mark.parametrize("widths", [3, True, "64", {"a": 1}])
def test_encoder_widths_must_be_a_list(widths: object) -> None:
    with pytest.raises(ValueError, match="argument patch_in_dimensions is "):
        check_encoder_widths({"patch_in_dimensions": widths}, 64)


def test_a_wrong_shape_is_named(published: tuple) -> None:
    state, arguments, _ = published
    with pytest.raises(ValueError, match=r"style.fc1.weight has shape \(3, 3\) in the checkpoint"):
        convert(state | {"mapping.mlp.fc1.weight": torch.zeros(3, 3)}, arguments)


def test_published_defaults_are_the_full_size_model() -> None:
    arguments = {"vfm_name": "siglip2-large-patch16-512", "scale_factor": 2.0}
    assert tokenizer_config(arguments) == TokenizerConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_convnext": False}, "use_convnext is False; only True is supported"),
        ({"use_cross_attn": True}, "use_cross_attn is True; only False"),
        ({"conditional": True}, "conditional is True; only False"),
        (
            {"how_to_process_concat_z": "interpolate"},
            "how_to_process_concat_z is 'interpolate'; only 'unshuffle'",
        ),
        ({"how_to_compress": "mlp"}, "how_to_compress is 'mlp'; supported are attnproj, conv"),
        ({"compression_mode": "other"}, "compression_mode is 'other'"),
        ({"vfm_name": "resnet50"}, "vfm_name is 'resnet50'; known encoders: siglip2"),
        ({"depth_of_thought": 3}, "unknown arguments: depth_of_thought"),
        ({"vfm_config": {"model_type": "bert"}}, "model_type 'bert'"),
        ({"vfm_config": {"model_type": "siglip_vision_model"}}, "vfm_config lacks"),
        (
            {"vfm_config": {"model_type": "siglip_vision_model", "hidden_act": "gelu"}},
            "hidden_act 'gelu'; siglip_vision_model is supported with 'gelu_pytorch_tanh'",
        ),
        ({"vfm_config": {"model_type": "dinov2", "layer_norm_eps": 1e-5}}, "layer_norm_eps 1e-05"),
        ({"channel_base": "many"}, "argument channel_base is 'many'; needed is int, like 32768"),
        ({"patch_from_layers": 3}, "argument patch_from_layers is 3; needed is list"),
        ({"synthesis_kwargs": 3}, "argument synthesis_kwargs is 3; needed is a mapping"),
        ({"synthesis_kwargs": True}, "argument synthesis_kwargs is True; needed is a mapping"),
        ({"synthesis_kwargs": [1, "y"]}, "argument synthesis_kwargs is .*; needed is a mapping"),
        ({3: 4}, "unknown arguments: 3"),
        ({"legacy": 1}, "argument legacy is 1; needed is bool"),
    ],
)
def test_unsupported_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_config({"vfm_name": "siglip2-large-patch16-512"} | change)


def test_a_config_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="vfm_name is missing"):
        tokenizer_config({"model": "unet"})


def test_the_averaged_generator_is_preferred(tmp_path: Path) -> None:
    torch.save({"G": {"a": torch.zeros(1)}, "G_ema": {"a": torch.ones(1)}, "D": None}, tmp_path / "n.pth")
    assert read_generator(tmp_path / "n.pth")["a"].item() == 1
    torch.save({"G": {"a": torch.zeros(1)}}, tmp_path / "g.pth")
    assert read_generator(tmp_path / "g.pth")["a"].item() == 0
    save_file({"a": torch.ones(2)}, tmp_path / "g.safetensors")
    assert read_generator(tmp_path / "g.safetensors")["a"].sum() == 2


class Surprise:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("surprise"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"G_ema": Surprise()}, tmp_path / "bad.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"G_ema": Surprise()}))
    for name in ("bad.pth", "plain.pkl"):
        with pytest.raises(
            ValueError, match=rf"{name} (was refused: it holds more than tensors|.*truncated or damaged)"
        ):
            read_generator(tmp_path / name)
    assert not (tmp_path / "surprise").exists()


def test_damaged_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    torch.save({"G": {"a": torch.zeros(1000)}}, tmp_path / "n.pth")
    save_file({"a": torch.zeros(1000)}, tmp_path / "n.safetensors")
    for whole in (tmp_path / "n.pth", tmp_path / "n.safetensors"):
        content = whole.read_bytes()
        for part in (0, 1, 7, 500, len(content) - 1):
            cut = whole.with_stem(f"cut{part}")
            cut.write_bytes(content[:part])
            with pytest.raises(ValueError, match=rf"cut{part}\.\w+ \({part} bytes\) is truncated or damaged"):
                read_generator(cut)
    torch.save({"optimizer": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no generator.*found optimizer"):
        read_generator(tmp_path / "other.pth")


def test_arguments_come_from_yaml_or_json(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("G_kwargs:\n  vfm_name: x\n  patch_from_layers: [0, -1]\nD_kwargs: {}\n")
    assert read_arguments(tmp_path / "c.yaml") == {"vfm_name": "x", "patch_from_layers": [0, -1]}
    (tmp_path / "c.json").write_text('{"vfm_name": "x"}')
    assert read_arguments(tmp_path / "c.json") == {"vfm_name": "x"}
    (tmp_path / "bad.yaml").write_text("a: [1, 2\n")
    with pytest.raises(ValueError, match="bad.yaml is not valid YAML"):
        read_arguments(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "number.yaml").write_text("G_kwargs: 3\n")
    with pytest.raises(ValueError, match="number.yaml holds no arguments"):
        read_arguments(tmp_path / "number.yaml")
    with pytest.raises(ValueError, match="list.yaml holds no arguments"):
        read_arguments(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="none.yaml cannot be read"):
        read_arguments(tmp_path / "none.yaml")
