"""fp8.py: rows of an encoder and of a tokenizer, and their tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.scripts import script
from tests.tokenizer.tiny import tiny_tokenizer

fp8, tables = map(script, ("fp8", "tables"))


def measured(monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> dict:
    common = ["--device", "cpu", "--images", "3", "--batch", "2", "--json", str(output)]
    monkeypatch.setattr(sys, "argv", ["fp8.py", *options, *common])
    fp8.main()
    return json.loads(output.read_text())


def test_an_encoder_loses_more_in_float8_than_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--encoder", "mini", "--layers", "0", "3", "-1", "--pixels", "32")
    result = measured(monkeypatch, tmp_path / "fp8-mini-cpu.json", *options)
    assert [row["layer"] for row in result["layers"]] == [0, 3, -1]
    embedding, *others = result["layers"]
    assert embedding["float8_error"] == embedding["bfloat16_error"], "no linear layer lies before it"
    for row in others:
        assert 0 < 3 * row["bfloat16_error"] < row["float8_error"] < 0.1
        assert 0.99 < row["float8_cosine"] < row["bfloat16_cosine"] <= 1
    assert "times_ms" not in result
    table = tables.tables(tmp_path)["fp8-mini-cpu"]
    assert "mini, trained weights, 3 images of 32 px" in table and "| 3 |" in table


def test_a_tokenizer_reconstructs_from_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer().save(tmp_path / "saved")
    result = measured(monkeypatch, tmp_path / "fp8-x.json", "--tokenizer", str(tmp_path / "saved"))
    exact, half, eighth = result["reconstructions"]
    assert [row["encoder"] for row in (exact, half, eighth)] == ["float64", "bfloat16", "float8"]
    assert exact["latent_error"] == 0 and exact["psnr_to_float64"] == 99
    assert 0 < half["latent_error"] < eighth["latent_error"] < 0.2
    assert eighth["psnr_to_float64"] > 25
    assert all(0 < row["ssim"] <= 1 and row["psnr"] > 0 for row in result["reconstructions"])
