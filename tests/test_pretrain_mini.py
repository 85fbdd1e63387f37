"""The shipped `mini` is a representation, and the script that made it does what it says."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import vfmvae.encoders
from vfmvae import pretrain_mini
from vfmvae.data.views import Views
from vfmvae.encoders import EncoderConfig, build_encoder
from vfmvae.pretrain_mini import (
    GRID,
    PATCH,
    TEMPERATURE,
    Heads,
    PretrainConfig,
    build_mini,
    encode,
    linear_probe,
    patch_retrieval,
    pixel_loss,
    place_loss,
    pretrain,
    pretraining_losses,
    random_mini,
    scene_loss,
)

SHIPPED = Path(vfmvae.encoders.__file__).parent / "mini.safetensors"


@pytest.fixture(scope="module")
def mini() -> VisionTransformer:
    model = build_mini().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(SHIPPED).items()})
    return model


def test_the_shipped_file_is_small_complete_and_says_what_it_is() -> None:
    assert SHIPPED.stat().st_size < 4_000_000
    state, expected = load_file(SHIPPED), build_mini().state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}
    assert all(t.dtype == torch.float16 and t.isfinite().all() for t in state.values())
    with safe_open(SHIPPED, "pt") as file:
        metadata = file.metadata()
    assert "--steps" in metadata["command"] and "--seed" in metadata["command"]
    assert "torch" in metadata["versions"] and metadata["license"] == "Apache-2.0"


def test_a_linear_probe_sees_more_in_mini_than_in_random_weights(mini: VisionTransformer) -> None:
    """Which scene a held-out crop is from, in grey with random exposure; guessing is right in 1 of 16."""
    trained = linear_probe(mini)
    untrained = [linear_probe(random_mini(seed)) for seed in range(2)]
    assert trained > max(untrained) + 0.2, f"mini {trained:.3f}, random weights {untrained}"


def test_patches_find_their_place_in_another_view(mini: VisionTransformer) -> None:
    trained = patch_retrieval(mini)
    untrained = [patch_retrieval(random_mini(seed)) for seed in range(2)]
    assert trained > max(untrained) + 0.1, f"mini {trained:.3f}, random weights {untrained}"


def test_the_encoder_table_gives_the_same_features(mini: VisionTransformer) -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    features = build_encoder(EncoderConfig("mini", layers=(-1,), scale_factor=1.0))(images)
    with torch.no_grad():
        tokens = encode(mini, images)
    assert torch.allclose(features.layers[0], tokens, atol=1e-5)
    assert torch.allclose(features.pooled, tokens.mean(dim=1), atol=1e-5)


def test_encode_is_timms_own_forward() -> None:
    model, images = random_mini(0), torch.rand(2, 3, 64, 64)
    tokens = encode(model, images)
    assert torch.equal(tokens, model.forward_features(images))
    assert torch.allclose(tokens.mean(dim=1), model(images), atol=1e-6)


def test_scene_loss_in_closed_form() -> None:
    features = torch.eye(5, 8)
    expected = math.log(1 + 4 * math.exp(-1 / TEMPERATURE))
    assert scene_loss(features, 3 * features).item() == pytest.approx(expected, abs=1e-6)
    shuffled = features.roll(1, dims=0)
    expected = 1 / TEMPERATURE + expected
    assert scene_loss(features, shuffled).item() == pytest.approx(expected, rel=1e-5)


def test_place_loss_against_a_loop() -> None:
    first, second = torch.randn(2, 16, 6), torch.randn(2, 16, 6)
    target = torch.rand(2, 16, 2) * 2.6 - 1.3
    terms = []
    for tokens, others, points in zip(first, second, target, strict=True):
        inside = [n for n in range(16) if points[n].abs().max() <= 0.75]
        cosine = {m: F.cosine_similarity(tokens, _bilinear(others, points[m]), dim=1) for m in inside}
        for n in inside:
            far = [m for m in inside if (points[m] - points[n]).abs().max() >= 0.5]
            logits = torch.stack([cosine[m][n] for m in [n, *far]]) / TEMPERATURE
            terms.append(logits.logsumexp(0) - logits[0])
    assert len(terms) > 5
    assert place_loss(first, second, target).item() == pytest.approx(sum(terms).item() / len(terms), rel=1e-4)


def _bilinear(tokens: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Tokens [16, C] of a 4 x 4 grid over [-1, 1] at a point (x, y) between their centres."""
    column, row = ((point + 1) * 2 - 0.5).tolist()
    c, r = min(int(column), 2), min(int(row), 2)
    grid = tokens.view(4, 4, -1)
    upper, lower = (torch.lerp(grid[y, c], grid[y, c + 1], column - c) for y in (r, r + 1))
    return torch.lerp(upper, lower, row - r)


def test_place_loss_of_views_that_do_not_meet_is_zero() -> None:
    tokens = torch.randn(1, 16, 6)
    assert place_loss(tokens, tokens, torch.full((1, 16, 2), 3.0)).item() == 0


def test_pixel_loss_compares_patches_row_by_row() -> None:
    images = torch.randn(2, 3, 64, 64)
    patches = [
        images[:, :, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)].flatten(1)
        for r in range(GRID)
        for c in range(GRID)
    ]
    assert pixel_loss(torch.stack(patches, dim=1), images).item() == 0
    assert pixel_loss(torch.stack(patches, dim=1) + 0.5, images).item() == pytest.approx(0.25, rel=1e-5)


def test_hidden_patches_are_not_seen() -> None:
    heads, model = Heads(), random_mini(0)
    whole = Views(torch.rand(2, 3, 64, 64), torch.zeros(2, 2), torch.ones(2, 1), torch.ones(2, 2))
    hidden = torch.ones(2, GRID * GRID, dtype=torch.bool)
    hidden[:, 0] = False

    def losses(second: torch.Tensor) -> dict[str, torch.Tensor]:
        return pretraining_losses(model, heads, whole, whole._replace(images=second), hidden, None)

    before, changed = losses(whole.images), whole.images.clone()
    changed[:, :, PATCH:] = 0
    assert torch.equal(losses(changed)["scene"], before["scene"])
    changed[:, :, 0] = 0
    assert not torch.equal(losses(changed)["scene"], before["scene"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_weights(dtype: str) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        config = PretrainConfig(steps=3, batch_size=4, seed=seed, device="cpu", dtype=dtype)
        return pretrain(config, Console(quiet=True)).state_dict()

    one, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["patch_embed.proj.weight"], other["patch_embed.proj.weight"])


def test_training_lowers_every_loss() -> None:
    printed = io.StringIO()
    config = PretrainConfig(steps=30, batch_size=8, device="cpu", dtype="fp32")
    pretrain(config, Console(file=printed, width=200))
    first, last = re.findall(r"scene (\S+) +place (\S+) +pixels (\S+)", printed.getvalue())
    for before, after in zip(first, last, strict=True):
        assert float(after) < 0.95 * float(before), printed.getvalue()


def test_the_command_writes_the_file_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain_mini, "linear_probe", lambda _: 0.625)
    monkeypatch.setattr(pretrain_mini, "patch_retrieval", lambda _: 0.5)
    output = tmp_path / "new" / "mini.safetensors"
    arguments = ["--output", str(output), "--steps", "1", "--batch-size", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["pretrain_mini", *arguments])
    pretrain_mini.main()
    assert set(load_file(output)) == set(build_mini().state_dict())
    assert [file.name for file in output.parent.iterdir()] == ["mini.safetensors"]
    printed = capsys.readouterr().out
    assert "62.5" in printed and "50.0" in printed and "random weights, seed 2" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "steps 0 must be at least 1"),
        (["--batch-size", "1"], "batch_size 1 must be at least 2"),
        (["--output", "/"], "output / is a folder"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain_mini", *arguments])
    with pytest.raises(SystemExit) as stop:
        pretrain_mini.main()
    error = capsys.readouterr().err
    assert stop.value.code != 0 and sentence in error and "Traceback" not in error
