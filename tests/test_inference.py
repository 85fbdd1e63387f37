"""What the commands share: the tokenizer that is meant, its identity, and names of pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.tokenizer.tiny import tiny_tokenizer
from vfmvae.cli import UsageError
from vfmvae.inference import (
    ModelOptions,
    PictureNames,
    check_resolution,
    latest_tokenizer,
    memory_errors,
    open_tokenizer,
)
from vfmvae.tokenizer.files import tokenizer_hash


def test_the_latest_trained_run_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no trained tokenizer lies in runs/; give one with --tokenizer"):
        latest_tokenizer()
    for number, name in enumerate(("b", "a", "untrained")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "untrained":
            model = tmp_path / "runs" / name / "model.safetensors"
            model.touch()
            os.utime(model, (number, number))
    assert latest_tokenizer() == Path("runs/a")
    (tmp_path / "runs" / "a" / "config.json").write_text('{"diffusion": {}}')
    assert latest_tokenizer() == Path("runs/b"), "a diffusion model is no tokenizer"


def test_a_tokenizer_is_opened_frozen_and_in_the_dtype_asked_for(tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path)
    options = ModelOptions(str(tmp_path), device="cpu", dtype="bf16")
    name, tokenizer = open_tokenizer(options, Console(quiet=True))
    assert name == str(tmp_path)
    assert tokenizer.dtype == torch.bfloat16 and not tokenizer.training
    assert tokenizer.encoder.always_bfloat16
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        open_tokenizer(ModelOptions(str(tmp_path), device="gpu"), Console(quiet=True))


def test_the_hash_is_of_the_weights_and_not_of_the_file(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer.save(tmp_path)
    _, loaded = open_tokenizer(ModelOptions(str(tmp_path), device="cpu"), Console(quiet=True))
    assert tokenizer_hash(loaded) == before
    with torch.no_grad():
        loaded.align.weight[0, 0] += 1e-3
    assert tokenizer_hash(loaded) != before


def test_a_resolution_must_fit() -> None:
    tokenizer = tiny_tokenizer()
    check_resolution(tokenizer, None)
    check_resolution(tokenizer, 128)
    for wrong in (0, 100, -64):
        with pytest.raises(UsageError, match=f"--resolution {wrong} .* multiple of 64"):
            check_resolution(tokenizer, wrong)


def test_every_picture_has_its_own_name_inside_the_folder() -> None:
    names = PictureNames("sheet.png")
    given = ["a/x.jpg", "a/x.png", "a/X.webp", "sheet.bmp", "v1.5", "a/x-2.jpg"]
    expected = ["a/x.png", "a/x-2.png", "a/X-3.png", "sheet-2.png", "v1.5.png", "a/x-2-2.png"]
    assert [str(names.take(name)) for name in given] == expected
    for wrong in ("../x.png", "/etc/x.png", "a/../../x.png", ""):
        with pytest.raises(ValueError, match="leads out of the output folder"):
            names.take(wrong)


def test_a_full_device_is_a_sentence_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="CUDA out of memory.; try a smaller --batch-size"), memory_errors():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")
