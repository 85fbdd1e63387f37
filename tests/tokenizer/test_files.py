from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vfmvae
from tests.tokenizer.tiny import DISCRETE, tiny_config, tiny_tokenizer
from vfmvae.tokenizer import Tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Tokenizer, Path]:
    tokenizer = tiny_tokenizer().eval()
    tokenizer.save(tmp_path / "saved")
    return tokenizer, tmp_path / "saved"


def test_a_saved_tokenizer_loads_to_the_same_numbers(saved: tuple[Tokenizer, Path]) -> None:
    tokenizer, path = saved
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = vfmvae.load(path)
    assert loaded.config == tokenizer.config and not loaded.training
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded.decode(loaded.encode(x).mode()), tokenizer.decode(tokenizer.encode(x).mode()))


@pytest.mark.parametrize("changes", [{"bottleneck": DISCRETE}, {"decoder": {"noise": True}}])
def test_every_variant_survives(tmp_path: Path, changes: dict) -> None:
    tokenizer = tiny_tokenizer(tiny_config(**changes))
    tokenizer.save(tmp_path)
    loaded = vfmvae.load(str(tmp_path))
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_training_runs_config_is_read_too(saved: tuple[Tokenizer, Path]) -> None:
    tokenizer, path = saved
    run = {"tokenizer": dataclasses.asdict(tokenizer.config), "steps": 5}
    (path / "config.json").write_text(json.dumps(run))
    assert vfmvae.load(path).config == tokenizer.config


def test_the_format_is_written_and_newer_ones_are_refused(saved: tuple[Tokenizer, Path]) -> None:
    tokenizer, path = saved
    config = json.loads((path / "config.json").read_text())
    assert config.pop("format") == 1
    (path / "config.json").write_text(json.dumps(config))  # as the first files were
    assert vfmvae.load(path).config == tokenizer.config
    for version in (2, 0, "1", True):
        (path / "config.json").write_text(json.dumps({"format": version, **config}))
        with pytest.raises(ValueError, match=rf"config.json has format {version!r}.* reads formats up to 1"):
            vfmvae.load(path)


def test_paths_of_this_machine_are_not_saved(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_file(tokenizer.encoder.state_dict(), tmp_path / "weights.safetensors")
    config = tiny_config()
    local = dataclasses.replace(config.encoder, weights=str(tmp_path / "weights.safetensors"))
    Tokenizer(dataclasses.replace(config, encoder=local)).save(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    (tmp_path / "weights.safetensors").unlink()
    loaded = vfmvae.load(tmp_path / "saved")
    assert loaded.config.encoder.weights is None
    for name, tensor in tokenizer.encoder.state_dict().items():
        assert torch.equal(loaded.encoder.state_dict()[name], tensor), name


def test_saving_again_replaces_both_files(saved: tuple[Tokenizer, Path]) -> None:
    tokenizer, path = saved
    tokenizer.align.weight.data.fill_(3.0)
    tokenizer.save(path)
    assert vfmvae.load(path).align.weight.eq(3.0).all()
    assert len(list(path.iterdir())) == 2


def test_a_failed_save_keeps_the_old_files(
    saved: tuple[Tokenizer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, path = saved
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def full_disk(state: dict, partial: Path, metadata: dict) -> None:
        Path(partial).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vfmvae.model_files.save_file", full_disk)
    tokenizer.align.weight.data.fill_(3.0)
    with pytest.raises(OSError, match="could not write .*model.safetensors.*No space left on device"):
        tokenizer.save(path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="could not write .*taken"):
        tiny_tokenizer().save(tmp_path / "taken")


def test_damaged_files_are_named(saved: tuple[Tokenizer, Path]) -> None:
    _, path = saved
    model = path / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors .*is truncated or damaged"):
        vfmvae.load(path)
    model.unlink()
    with pytest.raises(ValueError, match="model.safetensors does not exist"):
        vfmvae.load(path)
    (path / "config.json").write_text('{"resolution": 64')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        vfmvae.load(path)


def test_weights_that_do_not_fit_are_named(saved: tuple[Tokenizer, Path]) -> None:
    _, path = saved
    state = load_file(path / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "align.weight"} | {"extra": torch.zeros(1)},
        path / "model.safetensors",
    )
    with pytest.raises(ValueError, match="missing align.weight; unexpected extra"):
        vfmvae.load(path)
    save_file(state | {"align.weight": torch.zeros(2, 2)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"align.weight \(2, 2\) instead of \(32, 8\)"):
        vfmvae.load(path)


def test_unknown_fields_are_named_with_the_valid_ones(saved: tuple[Tokenizer, Path]) -> None:
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    config["decoder"]["chanel_base"] = 1
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="unknown field 'chanel_base' in decoder; valid fields: channel_base, "
    ):
        vfmvae.load(path)


def test_what_is_no_tokenizer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="holds no config.json"):
        vfmvae.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        vfmvae.load(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot load 3; give a folder or a hub id"):
        vfmvae.load(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no hub id"):
        vfmvae.load(tmp_path / "not/there/at/all")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/nothing' could not be fetched from the Hugging Face hub"):
        vfmvae.load("nobody/nothing")
