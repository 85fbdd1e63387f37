"""Published diffusion transformers through the command, and what the converter refuses."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vfmvae
from tests import commands
from tests.diffusion import published_form as published
from tests.diffusion.test_transformer import projected_limit
from vfmvae.convert import __main__ as command
from vfmvae.convert.diffusion import convert
from vfmvae.convert.diffusion_config import published_config
from vfmvae.convert.files import read_config, read_state
from vfmvae.diffusion import DiffusionTransformer, TransformerConfig

State = dict[str, Tensor]

SIT = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2}
SIT |= {"num_classes": 5}
REPA = SIT | {"encoder_depth": 1, "z_dims": [6], "projector_dim": 24}
LIGHTNING = SIT | {"use_rmsnorm": True, "use_swiglu": True, "use_rope": True}

SOURCES = {"repa_sit": "repa", "reg_sit": "reg", "lightningdit": "lightningdit", "samplers": "repa"}


def _fixture(parity_dir: Path, name: str) -> tuple[State, dict[str, Any], State]:
    folder = parity_dir / name
    arguments = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), arguments, load_file(folder / "io.safetensors")


def _command(folder: Path, source: str, state: object, config: object, *more: str | Path) -> tuple[int, Path]:
    """Exit code and output folder of the command, for a checkpoint that torch saves and a config as JSON."""
    torch.save(state, folder / "checkpoint.pt")
    (folder / "config.json").write_text(json.dumps(config))
    files = ("--checkpoint", folder / "checkpoint.pt", "--config", folder / "config.json")
    output = folder / "out"
    return commands.run(command, "--from", source, *files, "--output", output, *more), output


def _published_training(state: State) -> dict[str, Any]:
    """A checkpoint as published training writes it: parameters, their average, and the options."""
    return {
        "model": {f"module.{name}": torch.full_like(tensor, math.nan) for name, tensor in state.items()},
        "ema": {f"module.{name}": tensor for name, tensor in state.items()},
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="SiT-XL/2", seed=0),
        "steps": 400_000,
    }


@pytest.mark.parametrize("name", ["repa_sit", "reg_sit", "lightningdit"])
@torch.no_grad()
def test_a_published_checkpoint_loads_and_gives_the_published_numbers(
    parity_dir: Path, tmp_path: Path, name: str
) -> None:
    state, arguments, io = _fixture(parity_dir, name)
    code, output = _command(tmp_path, SOURCES[name], _published_training(state), arguments)
    assert code == 0
    model = vfmvae.load(output)
    assert isinstance(model, DiffusionTransformer) and not model.training
    # Published LightningDiT has t = 1 as data, and the velocity of that direction.
    t, sign = (1 - io["t"], -1) if name == "lightningdit" else (io["t"], 1)
    out = model(io["x"], t, io["y"], io.get("cls_token"))
    torch.testing.assert_close(sign * out.velocity, io["velocity"], atol=2e-5, rtol=0)
    if "cls_velocity" in io:
        torch.testing.assert_close(out.class_velocity, io["cls_velocity"], atol=2e-5, rtol=0)
    for number, projected in enumerate(out.projected):
        expected = io[f"projected_{number}"]
        torch.testing.assert_close(projected, expected, atol=projected_limit(expected), rtol=0)
    assert len(out.projected) == ("projected_0" in io)


def test_the_command_says_what_it_converted(
    parity_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, arguments, _ = _fixture(parity_dir, "samplers")
    code, output = _command(tmp_path, "repa", state, arguments)
    line = capsys.readouterr().out
    assert (
        code == 0 and line.startswith(f"{output}: 0.") and "latents 4 x 8 x 8 with a mean std of 5.49" in line
    )
    assert line.endswith("(no --statistics given)\n")


@pytest.mark.parametrize("wrap", ["plain", "model", "compiled", "safetensors", "half"])
def test_parameters_are_found_in_whatever_was_saved(tmp_path: Path, wrap: str) -> None:
    state = published.random_state(REPA)
    path = tmp_path / ("c.safetensors" if wrap == "safetensors" else "c.pt")
    saved: dict[str, Any] = {
        "plain": state,
        "model": {"model": state, "ema": None},
        "compiled": {"ema": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
        "half": {name: tensor.bfloat16() for name, tensor in state.items()},
    }
    if wrap == "safetensors":
        save_file(state, path)
    else:
        torch.save(saved[wrap], path)
    model = convert("repa", read_state(path), REPA)
    found = model.state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name in state.keys() - {"pos_embed"}:
        expected = state[name].bfloat16().float() if wrap == "half" else state[name]
        assert torch.equal(found[name], expected), name


class Surprise:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("surprise"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("code.pt", {"ema": published.random_state(REPA), "args": Surprise()}),
        ("inside.pt", {"ema": {}, "args": argparse.Namespace(hook=Surprise())}),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} was refused: it holds more than tensors"):
            read_state(tmp_path / name)
    assert not (tmp_path / "surprise").exists()


def test_files_without_a_model_are_named(tmp_path: Path) -> None:
    torch.save({"optimizer": 3}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"other.pt holds no model: needed is a state dict.* found optimizer"
    ):
        read_state(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"none.pt does not exist"):
        read_state(tmp_path / "none.pt")


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = published.random_state(REPA)
    del state["x_embedder.proj.bias"]
    code, output = _command(tmp_path, "repa", state, REPA)
    stderr = capsys.readouterr().err
    assert code == 1 and stderr.count("\n") == 1 and not output.exists()
    assert f"{tmp_path / 'checkpoint.pt'}: " in stderr and "x_embedder.proj.bias" in stderr


def test_parameters_that_do_not_fit_are_named_as_published(tmp_path: Path) -> None:
    reg = REPA | {"qk_norm": True}
    state = published.random_state(reg, class_token=9)
    one = torch.zeros(1)
    without = {name: tensor for name, tensor in state.items() if name != "wg_norm.weight"}
    with pytest.raises(ValueError, match=r"net.pt: .*call for wg_norm.weight more, .*no place for new.bias"):
        convert("reg", without | {"new.bias": one}, reg, where="net.pt")
    with pytest.raises(
        ValueError, match=r"cls_projectors2.bias has shape \(1,\) .*the arguments give \(32,\)"
    ):
        convert("reg", state | {"cls_projectors2.bias": one}, reg)
    broken = state["final_layer.linear.bias"].clone()
    broken[0] = math.inf
    with pytest.raises(ValueError, match=r"final_layer.linear.bias holds values that are not finite"):
        convert("reg", state | {"final_layer.linear.bias": broken}, reg)
    with pytest.raises(ValueError, match=r"no place for blocks.0.attn.k_norm.bias"):
        convert("reg", state, reg | {"qk_norm": False})
    with pytest.raises(ValueError, match="cls_projectors2.weight is missing, .* use --from repa"):
        convert("reg", published.random_state(REPA), REPA)
    with pytest.raises(ValueError, match=r"cls_token_dim is 8; the checkpoint's class token has 9"):
        convert("reg", state, reg | {"cls_token_dim": 8})
    assert convert("reg", state, reg | {"cls_token_dim": 9}).config.class_token_width == 9


def test_a_model_without_a_null_class_is_refused() -> None:
    state = published.random_state(REPA)
    name = "y_embedder.embedding_table.weight"
    with pytest.raises(ValueError, match=f"{name} has 5 rows, .* none for the null class"):
        convert("repa", state | {name: state[name][:-1]}, REPA | {"class_dropout_prob": 0.0})


def test_fixed_tables_are_checked_before_they_are_dropped(parity_dir: Path) -> None:
    state, arguments, _ = _fixture(parity_dir, "lightningdit")
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        for wrong in (state[name] + 2e-4, state[name] * math.nan):
            with pytest.raises(ValueError, match=rf"{name} differs by \S+ from the fixed table"):
                convert("lightningdit", state | {name: wrong}, arguments)
        with pytest.raises(ValueError, match=rf"{name} is \[.*check input_size \(8\), patch_size \(1\)"):
            convert("lightningdit", state | {name: state[name][:, :3]}, arguments)
        convert("lightningdit", state | {name: state[name] + 5e-5}, arguments)
        convert("lightningdit", {k: v for k, v in state.items() if k != name}, arguments)
    with pytest.raises(ValueError, match=r"no place for feat_rope.freqs_cos, feat_rope.freqs_sin"):
        convert("lightningdit", state, arguments | {"use_rope": False})


def test_statistics_of_the_latents() -> None:
    mean, std = torch.randn(4).double(), torch.rand(4).double() + 0.5
    sit, lightning = published.random_state(REPA), published.random_state(LIGHTNING)
    model = convert("repa", sit, REPA)  # the published scale of the Stable Diffusion autoencoder
    torch.testing.assert_close(model.normalise(torch.ones(1, 4, 8, 8)), torch.full((1, 4, 8, 8), 0.18215))
    given = convert("repa", sit, REPA, (mean, std))
    torch.testing.assert_close(given.latents_mean, mean.float())
    torch.testing.assert_close(given.latents_std, std.float())
    scaled = LIGHTNING | {"latent_multiplier": 0.5, "latent_norm": True}
    model = convert("lightningdit", lightning, scaled, (mean, std))
    latents = torch.randn(2, 4, 8, 8)
    expected = (latents - mean[:, None, None]) / std[:, None, None] * 0.5
    torch.testing.assert_close(model.normalise(latents), expected.float())
    assert convert("lightningdit", lightning, LIGHTNING).latents_std.eq(1).all()
    with pytest.raises(ValueError, match=r"latent_norm: true.* give them with --statistics"):
        convert("lightningdit", lightning, scaled)
    with pytest.raises(ValueError, match=r"not normalised \(latent_norm: false\); leave"):
        convert("lightningdit", lightning, LIGHTNING | {"latent_norm": False}, (mean, std))
    halved = convert("repa", sit, REPA | {"latent_multiplier": 0.5})
    assert halved.latents_mean.eq(0).all() and halved.latents_std.eq(2).all()
    with pytest.raises(ValueError, match="statistics are of 3 channels, and the model's latents have 4"):
        convert("repa", sit, REPA, (mean[:3], std[:3]))
    for bad in ((mean * math.nan, std), (mean, std * 0), (mean, std * math.inf)):
        with pytest.raises(ValueError, match="not finite, or stds that are not above 0"):
            convert("repa", sit, REPA, bad)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_command_takes_statistics_from_a_file(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = {"mean": torch.randn(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 2.5)}
    path = tmp_path / f"latents_stats.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(statistics, path)
    code, output = _command(tmp_path, "repa", published.random_state(REPA), REPA, "--statistics", path)
    assert code == 0 and capsys.readouterr().out.endswith("mean std of 2.5\n")
    model = vfmvae.load(output)
    assert torch.equal(model.latents_mean, statistics["mean"].flatten())
    code, _ = _command(tmp_path, "vfm-vae", {}, {}, "--statistics", path)
    assert code == 2 and "--from vfm-vae makes a tokenizer" in capsys.readouterr().err


def test_published_configurations_with_names() -> None:
    last = {"projectors.0.4.weight": torch.zeros(768, 2048)}
    training = {"model": "SiT-XL/2", "num_classes": 1000, "encoder_depth": 8, "fused_attn": True}
    training |= {"qk_norm": False, "resolution": 256, "path_type": "linear", "prediction": "v", "seed": 0}
    expected = TransformerConfig(latent_size=32, channels=4, patch=2, alignment_widths=(768,))
    assert published_config("repa", training, last).config == expected
    assert published_config("repa", {}, last).config == expected
    small = published_config("repa", {"model": "SiT-B/1", "resolution": 256, "downsample_ratio": 16}, last)
    assert (small.config.width, small.config.depth, small.config.heads) == (768, 12, 12)
    assert (small.config.latent_size, small.config.patch, small.config.alignment_depth) == (16, 1, 4)
    sit = published_config("sit", {"model": "SiT-S/4", "image_size": 512}, {}).config
    assert (sit.width, sit.latent_size, sit.learn_sigma, sit.published_time) == (384, 64, True, "data")
    large = published_config("lightningdit", {"model_type": "LightningDiT-1p0B/1", "in_chans": 16}, {}).config
    assert (large.width, large.depth, large.heads, large.channels) == (1536, 24, 24, 16)


def test_lightningdits_yaml(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        """
ckpt_path: x.pt
data: {data_path: d, image_size: 256, num_classes: 1000, num_workers: 8, latent_norm: true,
  latent_multiplier: 1.0}
vae: {model_name: vavae_f16d32, downsample_ratio: 16}
model: {model_type: LightningDiT-XL/1, use_qknorm: false, use_swiglu: true, use_rope: true,
  use_rmsnorm: true, wo_shift: false, in_chans: 32, use_checkpoint: false}
train: {max_steps: 80000}
optimizer: {lr: 0.0002}
transport: {path_type: Linear, prediction: velocity, use_cosine_loss: true, use_lognorm: true}
sample: {mode: ODE, cfg_scale: 10.0}
"""
    )
    found = published_config("lightningdit", read_config(tmp_path / "c.yaml"), {})
    assert found.latent_norm and found.latent_multiplier == 1.0
    assert found.config == TransformerConfig(norm="rms", swiglu=True, rope=True, published_time="data")


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (
            "repa",
            {"depht": 3},
            "unknown arguments: depht; those of --from repa are .*decoder_hidden_size, depth",
        ),
        ("sit", {"qk_norm": True}, "unknown arguments: qk_norm; those of --from sit are"),
        ("lightningdit", {"z_dims": [3]}, "unknown arguments: z_dims"),
        ("repa", {"decoder_hidden_size": 64}, "decoder_hidden_size is 64, and hidden_size 32; only equal"),
        ("repa", {"z_dims": [768]}, r"z_dims is \[768\]; the checkpoint's projectors give \[\]"),
        ("repa", {"prediction": "noise"}, "prediction is 'noise'; supported are velocity, v"),
        ("sit", {"path_type": "GVP"}, "path_type is 'GVP'; supported are Linear, linear"),
        ("sit", {"model": "SiT-XL/2"}, "hidden_size is 32, and the model's name says 1152; remove one"),
        ("sit", {"model": "DiT-XL/2"}, "name is 'DiT-XL/2'; needed is SiT-SIZE/PATCH, .* of S, B, L, XL"),
        ("lightningdit", {"model_type": "SiT-XL/2"}, "needed is LightningDiT-SIZE/PATCH"),
        ("sit", {"input_size": None, "resolution": 250}, "downsample_ratio is 8, which does not divide 250"),
        ("sit", {"depth": "many"}, "argument depth is 'many'; needed is int, like 28"),
        ("sit", {"num_heads": 5}, "model.width 32 cannot be divided by 5 heads"),
        ("sit", {"null_class": 4}, "null_class is 4; it must be num_classes"),
        ("lightningdit", {"latent_multiplier": 0}, "latent_multiplier is 0; it must be above 0"),
        ("lightningdit", {"latent_multiplier": "x"}, "latent_multiplier is 'x'; needed is float, like 1.0"),
        ("lightningdit", {"latent_norm": 1}, "latent_norm is 1; needed is bool, like False"),
        ("lightningdit", {"model": {}, "training": {}}, "unknown sections of the config: depth, .*training"),
        ("lightningdit", {"model": {}, "data": 3}, "section data of the config is 3; needed is a mapping"),
    ],
)
def test_arguments_that_do_not_fit_are_named(source: Any, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        published_config(source, SIT | change, {})


def test_arguments_that_change_nothing_are_accepted() -> None:
    nothing = {"fused_attn": False, "class_dropout_prob": 0.1, "use_cfg": True, "cfg_scale": 3.0}
    expected = published_config("sit", SIT, {})
    assert published_config("sit", SIT | nothing | {"null_class": 5}, {}) == expected
