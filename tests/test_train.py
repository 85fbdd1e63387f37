"""The main job, small enough for seconds: files, seeds, fused against reference, stopping and going on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import vfmvae
import vfmvae.train
from tests.helpers import ROOT
from vfmvae.config import LossConfig, TrainConfig
from vfmvae.data import Photographs
from vfmvae.images import to_unit
from vfmvae.losses.alignment import adaptive_weight
from vfmvae.losses.reconstruction import l1_loss, multiscale_l1_loss
from vfmvae.recipes import demo
from vfmvae.serialization import to_json
from vfmvae.tokenizer import BottleneckConfig, DecoderConfig, FusionConfig, Tokenizer
from vfmvae.tokenizer.files import read_safetensors
from vfmvae.train import evaluate, tokenizer_losses, train
from vfmvae.training.checkpoint import checkpoints, step_of
from vfmvae.training.run_folder import RunFolder

STEPS, BATCH = 8, 2


def tiny(**changes: object) -> TrainConfig:
    """The demo with a decoder of a few channels."""
    tokenizer = replace(
        demo().tokenizer,
        fusion=FusionConfig(layer_widths=(8, 8, 16), decompress_factor=1),
        decoder=DecoderConfig(
            channel_base=512,
            channel_max=16,
            num_res_blocks=1,
            extra_convnext=False,
            latent_widths=(16, 8, 8, 8),
            attention_blocks=(0,),
            attention_depths=(1,),
            style_width=16,
        ),
    )
    base = replace(demo(), tokenizer=tokenizer, batch_size=BATCH, steps=STEPS, device="cpu", log_every=1)
    return replace(base, **changes)


def run(config: TrainConfig, path: Path) -> str:
    """Train in this process; returns what it printed."""
    output = io.StringIO()
    train(config, RunFolder(path), Console(file=output, width=200))
    return output.getvalue()


def metrics(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def weights(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    """Few held-out images, and one thread: the operations are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vfmvae.train, "HELD_OUT_IMAGES", 9)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return path, run(tiny(fused=True), path)


def test_a_run_leaves_its_files_and_nothing_else(finished: tuple[Path, str]) -> None:
    path, printed = finished
    names = ["checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "reconstructions.png"]
    assert sorted(os.listdir(path)) == names
    assert os.listdir(path / "checkpoints") == [f"step_{STEPS:08d}"]
    with Image.open(path / "reconstructions.png") as picture:
        picture.load()
        assert picture.size == (8 * 128, 4 * 128 + 8), "eight columns; two rows of pairs"
    for word in ("PSNR (dB)", "SSIM", "before", "after", "seconds", str(path / "reconstructions.png")):
        assert word in printed


def test_a_run_logs_every_loss(finished: tuple[Path, str]) -> None:
    path, printed = finished
    lines = metrics(path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["seen_images"] for line in lines] == [BATCH * step for step in range(1, STEPS + 1)]
    names = {"step", "seen_images", "learning_rate", "l1", "multiscale_l1", "kl", "alignment", "total"}
    assert all(line.keys() == names for line in lines)
    assert printed.count("images/s") == STEPS


def test_a_run_folder_is_a_tokenizer(finished: tuple[Path, str]) -> None:
    path, _ = finished
    tokenizer = vfmvae.load(path)
    assert tokenizer.config == tiny().tokenizer
    images = Photographs("validation", 64).batch(0, 2)["image"]
    assert tokenizer.decode(tokenizer.encode(images).mode()).shape == images.shape


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    torch.manual_seed(12345)  # what happened in the process before has no influence
    run(tiny(fused=True), tmp_path / "same")
    assert_same_run(finished[0], tmp_path / "same")
    run(tiny(fused=True, steps=1, seed=1), tmp_path / "other")
    assert metrics(tmp_path / "other")[0]["l1"] != metrics(finished[0])[0]["l1"]


def test_fused_and_reference_give_the_same_losses(tmp_path: Path) -> None:
    for fused in (True, False):
        run(tiny(fused=fused, steps=3), tmp_path / str(fused))
    for fast, plain in zip(metrics(tmp_path / "True"), metrics(tmp_path / "False"), strict=True):
        assert fast == pytest.approx(plain, rel=1e-3)


@contextmanager
def training_process(config: TrainConfig, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m vfmvae.train` in a process of its own, with as many threads as this one."""
    file = folder.with_suffix(".json")
    file.write_text(to_json(config))
    command = [sys.executable, "-m", "vfmvae.train", "--config", str(file), "--run-dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_metrics(process: subprocess.Popen[str], folder: Path, lines: int) -> None:
    file = folder / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_a_killed_run_goes_on_bit_for_bit(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, config = tmp_path / "killed", tiny(fused=True, checkpoint_every=STEPS // 2)
    with training_process(config, folder) as process:
        wait_for_metrics(process, folder, STEPS // 2 + 1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()
    (folder / ".model.safetensors.x.partial").touch()  # as if it had been writing
    printed = run(config, folder)
    assert f"from step {STEPS // 2}" in printed
    assert_same_run(finished[0], folder)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(
    finished: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    folder, output, real_batch = RunFolder(tmp_path / "my run"), io.StringIO(), Photographs.batch

    def batch_of_a_stopped_run(self: Photographs, step: int, batch_size: int) -> object:
        if self.split == "train" and step == 2:
            signal.raise_signal(number)  # in the middle of the third step
        return real_batch(self, step, batch_size)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Photographs, "batch", batch_of_a_stopped_run)
        train(tiny(fused=True), folder, Console(file=output, width=20))
    assert ended.value.code == code
    assert f"stopped after step 3; go on with: {folder.resume_command()}\n" in output.getvalue()
    assert [step_of(path) for path in checkpoints(folder.checkpoints)] == [3]
    printed = run(tiny(fused=True), folder.path)
    assert_same_run(finished[0], folder.path)
    quality = [line for line in finished[1].splitlines() if "PSNR" in line or "SSIM" in line]
    assert len(quality) == 2
    assert all(line in printed for line in quality), "before and after are those of the whole run"


def test_going_on_with_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    config = tiny(steps=2)
    run(config, tmp_path)
    before = metrics(tmp_path), weights(tmp_path)
    run(config, tmp_path)
    assert metrics(tmp_path) == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in weights(tmp_path).items())
    with pytest.raises(ValueError, match="has done 2 steps already; --steps 1 is fewer"):
        run(replace(config, steps=1), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 2, "the run stays as it was"


def test_weights_that_are_not_finite_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_step(tokenizer: Tokenizer, *_: object) -> dict[str, Tensor]:
        with torch.no_grad():
            tokenizer.align.weight.fill_(torch.nan)
        return {"total": torch.zeros(())}

    monkeypatch.setattr(vfmvae.train, "generator_step", broken_step)
    with pytest.raises(FloatingPointError, match="parameter align.weight is not finite after step 2"):
        run(tiny(steps=2), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "metrics.jsonl"]


def test_bfloat16_runs_on_the_cpu(tmp_path: Path) -> None:
    assert "bfloat16" in run(tiny(steps=1, dtype="bf16"), tmp_path)
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(tmp_path).values()), (
        "parameters stay fp32"
    )


def test_the_total_is_the_weighted_sum() -> None:
    tokenizer = Tokenizer(tiny().tokenizer)
    pixels = Photographs("train", 64).batch(0, 2)["image"]
    images, output = to_unit(pixels), tokenizer(pixels)
    values = LossConfig(l1=2.0, multiscale_l1=0.5, kl=1e-3, alignment=3.0)
    losses = tokenizer_losses(tokenizer, output, images, values)

    l1, smaller = l1_loss(output.reconstruction, images), multiscale_l1_loss(output.multiscale, images)
    kl, alignment = output.posterior.kl().mean(), tokenizer.alignment_loss(output.latents, output.features)
    balance = adaptive_weight(2 * l1 + 0.5 * smaller, alignment, tokenizer.last_fusion_weight)
    total = 2 * l1 + 0.5 * smaller + 1e-3 * kl + 3 * balance * alignment
    expected = {"l1": l1, "multiscale_l1": smaller, "kl": kl, "alignment": alignment, "total": total}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}, rel=1e-6
    )
    fixed = tokenizer_losses(tokenizer, output, images, replace(values, adaptive_alignment=False))
    assert fixed["total"].item() == pytest.approx((total - 3 * (balance - 1) * alignment).item(), rel=1e-5)


def test_terms_without_weight_are_not_computed() -> None:
    pixels = Photographs("train", 64).batch(0, 2)["image"]
    gaussian = Tokenizer(tiny().tokenizer)
    only_l1 = LossConfig(multiscale_l1=0, kl=0, alignment=0)
    assert list(tokenizer_losses(gaussian, gaussian(pixels), to_unit(pixels), only_l1)) == ["l1", "total"]
    config = replace(tiny().tokenizer, bottleneck=BottleneckConfig(kind="discrete", codebooks=2, codes=64))
    discrete = Tokenizer(config)
    values = LossConfig(entropy=0.1, alignment=0, multiscale_l1=0)
    losses = tokenizer_losses(discrete, discrete(pixels), to_unit(pixels), values)
    assert list(losses) == ["l1", "quantization", "entropy", "total"]


def test_evaluation_sees_the_first_held_out_images_whatever_the_batch_size() -> None:
    tokenizer, held_out = Tokenizer(tiny().tokenizer).train(), Photographs("validation", 64)
    by_two, by_nine = evaluate(tokenizer, held_out, 2), evaluate(tokenizer, held_out, 9)
    assert torch.equal(by_two.images, held_out.batch(0, 9)["image"])
    assert torch.equal(by_two.images, by_nine.images)
    assert (by_two.psnr, by_two.ssim) == pytest.approx((by_nine.psnr, by_nine.ssim), rel=1e-3)
    assert tokenizer.training
