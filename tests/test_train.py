"""A run from its first step to its files: three stages, every loss, seeds, signals, going on."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from rich.console import Console

import vfmvae
import vfmvae.train
from tests.helpers import ROOT
from tests.host_reads import host_reads
from tests.tiny_runs import ALL_LOSSES, stage, tiny
from tests.whole_runs import (
    align_tok,
    assert_same_run,
    cheap,
    lines,
    run,
    saved_steps,
    small_parts,
    state,
    three_stages,
    weights,
)
from vfmvae.config import TrainConfig
from vfmvae.data import Photographs
from vfmvae.recipes import demo
from vfmvae.serialization import to_json
from vfmvae.train import TokenizerRun
from vfmvae.train_plan import describe
from vfmvae.training.device import slow_on_cpu
from vfmvae.training.engine import EngineConfig
from vfmvae.training.run_folder import RunFolder
from vfmvae.training.stages import IMAGE_TERMS, LossWeights

FULL = tiny(stages=three_stages(), checkpoint_every=2, evaluate_every=3 * 2)
STEPS = 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return path, run(FULL, path)


def test_a_run_leaves_its_files_and_nothing_else(finished: tuple[Path, str]) -> None:
    path, printed = finished
    files = ["config.json", "metrics.jsonl", "model.safetensors", "reconstructions.png"]
    assert sorted(os.listdir(path)) == sorted(["checkpoints", "figures", *files])
    assert saved_steps(path) == [4, 6], "the two newest"
    assert len(os.listdir(path / "checkpoints")) == 2
    assert sorted(os.listdir(path / "figures")) == [f"reconstructions_{n:012d}.png" for n in (6, 12)]
    with Image.open(path / "reconstructions.png") as picture:
        picture.load()
        assert picture.size == (8 * 128, 4 * 128 + 8), "eight columns; two rows of pairs"
    for word in ("PSNR (dB)", "SSIM", "before", "after", "seconds", str(path / "reconstructions.png")):
        assert word in printed


def test_a_run_logs_every_loss_of_every_stage(finished: tuple[Path, str]) -> None:
    path, printed = finished
    found = lines(path)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["stage"] for line in found] == ["behind"] * 2 + ["whole"] * 2 + ["decoder"] * 2
    common = {*IMAGE_TERMS, "adversarial", "patch_adversarial", "feature_matching", "total", "gradient_norm"}
    common |= {"discriminator_projected", "discriminator_patch", "skipped_steps", "kind", "step", "stage"}
    rates = ("tokenizer", "discriminator_projected", "discriminator_patch")
    common |= {"seen_images", *(f"learning_rate_{name}" for name in rates)}
    latent = {"kl", "alignment", "alignment_factor"}
    assert [set(line) for line in found[1::2]] == [
        common | latent,
        common | latent | {"preservation"},
        common,
    ]
    assert all(value is not None for line in found for value in line.values())
    assert found[2]["preservation"] == 0 < found[3]["preservation"], "the stage begins at its snapshot"
    assert [line["step"] for line in lines(path, "eval")] == [0, 3, 6]
    assert printed.count("images/s") == STEPS


def test_it_says_once_that_the_perceptual_network_is_not_lpips(finished: tuple[Path, str]) -> None:
    sentence = "the perceptual loss compares features of mini; it is not LPIPS"
    assert finished[1].count(sentence) == 1
    assert "mini_distance" in lines(finished[0], "eval")[0], "and evaluation names what it measures"


def test_a_run_folder_is_a_tokenizer(finished: tuple[Path, str]) -> None:
    tokenizer = vfmvae.load(finished[0])
    assert tokenizer.config == FULL.tokenizer
    images = Photographs("validation", 64).batch(0, 2)["image"]
    assert tokenizer.decode(tokenizer.encode(images).mode()).shape == images.shape


def test_the_same_seed_gives_the_same_run_whoever_reads_the_images(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    torch.manual_seed(12345)  # what happened in the process before has no influence
    run(replace(FULL, workers=2), tmp_path)
    assert_same_run(finished[0], tmp_path)


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    for seed in (0, 1):
        run(cheap(steps=1, seed=seed), tmp_path / str(seed))
    assert lines(tmp_path / "0")[0]["l1"] != lines(tmp_path / "1")[0]["l1"]


def test_fused_and_reference_give_the_same_losses(tmp_path: Path) -> None:
    losses = LossWeights(perceptual=0.5, ssim=0.2, adversarial=0.3, alignment=0.5)
    for fused in (True, False):
        run(tiny(stages=(stage(losses, images=4),), fused=fused), tmp_path / str(fused))
    (first_fast, second_fast), (first, second) = lines(tmp_path / "True"), lines(tmp_path / "False")
    # Rounding decides which side of a kink (of leaky ReLU) a number lies on: gradients jump, losses do not.
    # In the second step that has moved the weights.
    for fast, plain, tolerance in ((first_fast, first, 1e-4), (second_fast, second, 5e-3)):
        for name, value in plain.items():
            if not isinstance(value, str):
                wide = 5e-3 if name == "gradient_norm" else tolerance
                assert fast[name] == pytest.approx(value, rel=wide), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_runs_on_the_cpu(dtype: str, tmp_path: Path) -> None:
    losses = replace(ALL_LOSSES, patch_adversarial=0.0, feature_matching=0.0)
    printed = run(tiny(stages=(stage(losses),), dtype=dtype, steps=8), tmp_path)
    name = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert f"1 thread: {name} beside float32 parameters, fused operations\n" in printed
    slow = slow_on_cpu(getattr(torch, name), torch.device("cpu"))
    assert printed.count("warning: this CPU has no instructions for") == (slow is not None)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path).values()), "parameters are fp32"
    skipped = [line["skipped_steps"] for line in lines(tmp_path)]
    scale = state(tmp_path)["others.tokenizer_guard.scale"].item()
    if dtype == "bf16":
        assert (sum(skipped), scale) == (0, 1.0)
    else:
        assert 0 < sum(skipped) < len(skipped), "the first scale is too large, a later one is not"
        assert scale == 2.0 ** (16 - sum(skipped))
        assert lines(tmp_path)[-1]["l1"] is not None


def test_steps_shares_the_updates_among_the_stages(tmp_path: Path) -> None:
    stages = tuple(stage(LossWeights(alignment=0.5), name=n, images=i) for n, i in (("a", 30), ("b", 90)))
    run(cheap(stages=stages, steps=4), tmp_path)
    assert [line["stage"] for line in lines(tmp_path)] == ["a", "b", "b", "b"]


def test_as_many_checkpoints_stay_as_asked(tmp_path: Path) -> None:
    run(cheap(checkpoint_every=1, keep_checkpoints=3), tmp_path)
    assert saved_steps(tmp_path) == [2, 3, 4]


def test_the_loop_reads_the_device_once_per_log_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(stages=(stage(ALL_LOSSES),), steps=7, log_every=3)
    real_advance, found = vfmvae.train.Run.advance, []

    def counted(*arguments: Any) -> bool:
        with host_reads() as reads:
            done = real_advance(*arguments)
        found.extend(read for read in reads if "loader.py" not in read)  # a seed that never left the host
        return done

    monkeypatch.setattr(vfmvae.train.Run, "advance", counted)
    run(config, tmp_path)
    assert len(found) == len(lines(tmp_path)) == 3, found


# Going on


@contextmanager
def training_process(config: TrainConfig, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m vfmvae.train` in a process group of its own, as under a shell."""
    file = folder.with_suffix(".json")
    file.write_text(to_json(config))
    command = [sys.executable, "-m", "vfmvae.train", "--config", str(file), "--run-dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    while not (folder / "metrics.jsonl").exists() or not any(x["step"] >= step for x in lines(folder)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_to_all_processes_of_a_run_stops_it_cleanly(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    # As Ctrl-C in a terminal and batch systems do it: the processes that read images get it too.
    folder = tmp_path / "my run"
    with training_process(cheap(steps=10_000, workers=2), folder) as process:
        wait_for_step(process, folder, 2)
        os.killpg(process.pid, number)
        output = process.communicate()[0]
    assert process.returncode == code, output
    first, step = saved_steps(folder)
    assert first == 0
    assert output.endswith(f"stopped after step {step}; go on with: {RunFolder(folder).resume_command()}\n")
    assert output.count("stopping after this step") == 1
    assert "Traceback" not in output


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config, folder = cheap(steps=10_000), tmp_path / "run"
    with training_process(config, folder) as first:
        wait_for_step(first, folder, 1)
        command = [sys.executable, "-m", "vfmvae.train", "--run-dir", str(folder), "--resume"]
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert first.poll() is None, "the first is not disturbed"
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == (
        f"error: process {first.pid} on {socket.gethostname()} trains in {folder} now; wait until it ends,"
        f" stop it, or give another --run-dir\n"
    )
    assert "from step 0\n" in run(replace(config, steps=1), folder), "killed, it is in nobody's way"


class Killed(BaseException):
    """What no part of the program sees coming."""


def test_a_run_that_is_killed_in_its_first_step_goes_on_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cheap(steps=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(vfmvae.train, "training_step", mock.Mock(side_effect=Killed))
        run(config, tmp_path / "killed")
    assert saved_steps(tmp_path / "killed") == [0]
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "nothing has been trained"
    torch.manual_seed(12345)
    assert "from step 0\n" in run(config, tmp_path / "killed")
    run(config, tmp_path / "undisturbed")
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.parametrize("step", [1, 4])
def test_a_stopped_run_goes_on_bit_for_bit(finished: tuple[Path, str], tmp_path: Path, step: int) -> None:
    stop_after(FULL, tmp_path, step)
    assert saved_steps(tmp_path)[-1] == step
    assert not (tmp_path / "figures" / "reconstructions_000000000012.png").exists()
    printed = run(FULL, tmp_path)
    assert f"from step {step}\n" in printed
    assert_same_run(finished[0], tmp_path)
    quality = [line for line in finished[1].splitlines() if "PSNR" in line or "SSIM" in line]
    assert len(quality) == 2
    assert all(line in printed for line in quality), "before and after are those of the whole run"


def test_align_tok_goes_on_bit_for_bit_in_the_middle_of_its_second_stage(tmp_path: Path) -> None:
    config = tiny(stages=align_tok(), workers=1, engine=EngineConfig(adaptive_every=2))
    run(config, tmp_path / "whole")
    stop_after(config, tmp_path / "stopped", 5)
    stopped = state(tmp_path / "stopped")
    assert any(name.startswith("modules.snapshot.encoder.") for name in stopped)
    ratio = stopped["others.adaptive_adversarial.ratio"].item()
    assert "from step 5\n" in run(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    found = lines(tmp_path / "whole")
    assert [line["stage"] for line in found] == ["align"] * 3 + ["whole"] * 3 + ["decoder"] * 3
    assert found[4]["adversarial_factor"] == found[5]["adversarial_factor"] == ratio, "it is remembered"
    rates = [line.get("learning_rate_encoder") for line in found]
    assert rates == [None] * 3 + [pytest.approx(1e-4)] * 3 + [None] * 3


def stop_after(config: TrainConfig, folder: Path, step: int) -> None:
    """Run until a SIGTERM in the middle of a step."""
    real_step = vfmvae.train.training_step

    def stopped_step(job: vfmvae.train.Job, *arguments: object) -> object:
        if job.state.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return real_step(job, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(vfmvae.train, "training_step", stopped_step)
        run(config, folder)
    assert ended.value.code == 0


def test_going_on_with_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    config = cheap(steps=2)
    run(config, tmp_path)
    before = lines(tmp_path), lines(tmp_path, "eval"), weights(tmp_path)
    run(config, tmp_path)
    assert (lines(tmp_path), lines(tmp_path, "eval")) == before[:2]
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in weights(tmp_path).items())
    with pytest.raises(ValueError, match="has done 2 steps already; --steps 1 is fewer"):
        run(replace(config, steps=1), tmp_path)
    assert f'"steps": {config.steps}' in (tmp_path / "config.json").read_text(), "the run stays as it was"


def test_a_run_that_is_lengthened_into_another_stage_is_refused(tmp_path: Path) -> None:
    stages = tuple(stage(LossWeights(alignment=0.5), name=name, images=8) for name in ("one", "two"))
    run(cheap(stages=stages, steps=4), tmp_path)
    message = "step 4 of the run lies in stage 'two'; by stages of 6, 6 steps it would lie in 'one'"
    with pytest.raises(ValueError, match=message):
        run(cheap(stages=stages, steps=12), tmp_path)


def test_the_last_stage_of_a_finished_run_may_be_lengthened(tmp_path: Path) -> None:
    one, two = (stage(LossWeights(alignment=0.5), name=name, images=4) for name in ("one", "two"))
    run(cheap(stages=(one, two), steps=None), tmp_path)
    longer = cheap(stages=(one, replace(two, images=8)), steps=None)
    run(longer, tmp_path)
    assert [line["stage"] for line in lines(tmp_path)] == ["one"] * 2 + ["two"] * 4


def test_a_signal_before_the_first_step_leaves_a_run_to_go_on_with(tmp_path: Path) -> None:
    """The first evaluation, during which it comes, takes minutes at full size."""
    measure = TokenizerRun.measure

    def interrupted(run: TokenizerRun) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return measure(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(TokenizerRun, "measure", interrupted)
        run(cheap(steps=2), tmp_path)
    assert ended.value.code == 0 and saved_steps(tmp_path) == [0] and lines(tmp_path) == []
    run(cheap(steps=2), tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_while_models_load_ends_at_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """In a new folder nothing is left; a run that was there is as it was."""
    before = signal.getsignal(number)

    def interrupted(config: TrainConfig) -> None:
        signal.raise_signal(number)
        raise AssertionError("went on")

    def stopped() -> str:
        console = Console(file=io.StringIO(), width=200)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(vfmvae.train, "Job", interrupted)
            vfmvae.train.train(cheap(steps=1), RunFolder(tmp_path / "run"), console)
        assert ended.value.code == code and signal.getsignal(number) == before
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert stopped() == "stopped before the first step; nothing was written\n"
    RunFolder(tmp_path / "run").check_new()
    run(cheap(steps=1), tmp_path / "run")
    command = RunFolder(tmp_path / "run").resume_command()
    assert stopped() == f"stopped before the first step; go on with: {command}\n"
    assert saved_steps(tmp_path / "run")[-1] == 1


def test_a_run_begins_with_a_saved_tokenizer_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """What it does not train comes from there too, and checkpoints do not hold it."""
    run(cheap(steps=2, seed=3), tmp_path / "first")
    begun = (stage(LossWeights(alignment=0.0), trains=("decoder",)),)
    config = cheap(stages=begun, steps=4, initial=str(tmp_path / "first"))
    run(config, tmp_path / "whole")
    (evaluated, _), final = lines(tmp_path / "whole", "eval"), lines(tmp_path / "first", "eval")[-1]
    assert evaluated["psnr"] == final["psnr"], "where the first one ended"
    before, after = weights(tmp_path / "first"), weights(tmp_path / "whole")
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder", "style"}, "the mean style is a running one"

    stop_after(config, tmp_path / "stopped", step=2)
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    run(replace(config, initial=str(tmp_path / "moved")), tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    run(replace(config, initial=str(tmp_path / "whole")), tmp_path / "stopped")  # they differ in the decoder
    run(cheap(steps=1), tmp_path / "other")
    with pytest.raises(ValueError, match="other holds other weights, of what this run does not train, than"):
        run(replace(config, steps=6, initial=str(tmp_path / "other")), tmp_path / "stopped")
    with pytest.raises(ValueError, match="initial .*first: .* does not fit its config: .* build the run's"):
        run(replace(config, tokenizer=demo().tokenizer), tmp_path / "new")
    with pytest.raises(ValueError, match="initial .*first: .* does not fit its config: .* build the run's"):
        describe(replace(config, tokenizer=demo().tokenizer), Console(file=io.StringIO()))
    assert not (tmp_path / "new").exists()


def test_a_tracker_that_does_not_open_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no login"):
        patch.setattr("vfmvae.training.run.open_trackers", mock.Mock(side_effect=ValueError("no login")))
        run(cheap(steps=1), tmp_path)
    RunFolder(tmp_path).check_new()


def test_trackers_are_closed_where_a_run_fails_before_its_first_step(tmp_path: Path) -> None:
    tracker = mock.Mock()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr("vfmvae.training.run.open_trackers", lambda *arguments: [tracker])
        patch.setattr(TokenizerRun, "measure", mock.Mock(side_effect=RuntimeError("no memory")))
        run(cheap(steps=1), tmp_path)
    assert tracker.mock_calls == [mock.call.close(failed=True)]


def test_a_run_in_half_precision_goes_on_in_single(tmp_path: Path) -> None:
    # As the error after too many skipped steps advises: the scale of fp16 must not come along.
    run(cheap(dtype="fp16", steps=1), tmp_path)
    run(cheap(dtype="fp32", steps=2), tmp_path)
    assert state(tmp_path)["others.tokenizer_guard.scale"] == 1.0
    run(cheap(dtype="fp16", steps=3), tmp_path)
    assert state(tmp_path)["others.tokenizer_guard.scale"] > 2.0**10


# Mistakes


def test_errors_are_one_line_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with training_process(cheap(steps=1), tmp_path / "file") as process:
        output = process.communicate()[0]
    assert process.returncode == 1
    assert output == f"error: {tmp_path / 'file'} is a file; give a folder as --run-dir\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tempfile.mkstemp", lambda **options: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(OSError, match="Permission denied"), small_parts():
        run(cheap(steps=1), tmp_path)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    engine = replace(cheap().engine, accumulate=3)
    with pytest.raises(ValueError, match="batch_size 2 cannot be shared by 1 processes in 3 parts"):
        run(cheap(engine=engine), tmp_path)
