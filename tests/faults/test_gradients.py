"""Steps that go wrong: they change nothing, they are counted, and the run goes back where they do not end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vfmvae.train
from tests.commands import run as run_command
from tests.tiny_runs import ALL_LOSSES, job, stage, steps, tiny
from tests.whole_runs import cheap, lines, run, saved_steps, small_parts, weights
from vfmvae.serialization import to_json
from vfmvae.train_job import Job
from vfmvae.training.guard import SafetyConfig, StepGuard


@contextmanager
def poisoned_latents(built: Job) -> Iterator[None]:
    """One latent is NaN, as a broken image or an overflow would make it."""

    def poison(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 0, 0, 0] = float("nan")
        return output

    handle = built.tokenizer.fusion.register_forward_hook(poison)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def poisoned_steps(is_bad: Callable[[Job], bool]) -> Iterator[None]:
    """Runs meet NaN in the steps that `is_bad` picks."""
    real_step = vfmvae.train.training_step

    def step(built: Job, *arguments: object) -> object:
        if not is_bad(built):
            return real_step(built, *arguments)  # type: ignore[arg-type]
        with poisoned_latents(built):
            return real_step(built, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vfmvae.train, "training_step", step)
        yield


def test_a_step_with_nan_changes_nothing_that_trains() -> None:
    built = job(batch_size=2)
    steps(built, 1)
    kept = {n: t.clone() for n, t in built.state.tensors().items() if "guard" not in n and "ema" not in n}
    assert any("style.average" in name for name in kept), "a running mean is among them"
    assert any(name.startswith("optimizers.projected") for name in kept)
    with poisoned_latents(built):
        (result,) = steps(built, 1)
    assert result.skipped == 1
    found = built.state.tensors()
    assert [n for n, before in kept.items() if not torch.equal(found[n], before) and not is_iterated(n)] == []
    assert found["others.tokenizer_guard.skipped"] == found["others.projected_guard.skipped"] == 1
    (result,) = steps(built, 1)
    assert result.skipped == 0
    assert all(torch.isfinite(loss) for loss in result.losses.values())
    assert not torch.equal(found["modules.tokenizer.align.weight"], kept["modules.tokenizer.align.weight"])


def is_iterated(name: str) -> bool:
    """The vectors of spectral norms follow the weights, not the losses."""
    return name.startswith("modules.projected") and name.rpartition(".")[2] in ("_u", "_v", "u", "v")


def test_a_run_skips_and_counts_such_steps_and_goes_on(tmp_path: Path) -> None:
    with poisoned_steps(lambda built: built.state.step in (1, 2)):
        printed = run(cheap(steps=6, log_every=3), tmp_path)
    first, second = lines(tmp_path)
    assert (first["skipped_steps"], second["skipped_steps"]) == (2, 0)
    assert first["l1"] is not None and second["l1"] is not None, "means are of the steps that count"
    assert "2 skipped" in printed
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_many_in_a_row_lead_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    config = cheap(steps=8, checkpoint_every=3, safety=SafetyConfig(max_skips=2))
    with poisoned_steps(lambda built: built.state.step in (4, 5) and "rollbacks" not in built.state.numbers):
        printed = run(config, tmp_path)
    assert printed.count("warning: 2 steps in a row up to step 6 were skipped, as the gradients of") == 1
    assert printed.count("; going back to the checkpoint of step 3") == 1
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9)), "each step once"
    assert saved_steps(tmp_path)[-1] == 8
    run(cheap(steps=8), tmp_path / "undisturbed")
    ours, theirs = lines(tmp_path), lines(tmp_path / "undisturbed")
    assert ours[:3] == theirs[:3]
    assert ours[3]["l1"] != theirs[3]["l1"], "with other random draws"


def test_rolling_back_crosses_the_beginning_of_a_stage(tmp_path: Path) -> None:
    losses = replace(ALL_LOSSES, patch_adversarial=0.0, feature_matching=0.0)
    kept = stage(replace(losses, preservation=1.0), name="b", images=6, trains=("fusion", "align"))
    stages = (stage(losses, name="a", images=4), kept)
    config = tiny(stages=stages, checkpoint_every=1, safety=SafetyConfig(max_skips=1))
    with poisoned_steps(lambda built: built.state.step == 2 and "rollbacks" not in built.state.numbers):
        run(config, tmp_path)
    found = lines(tmp_path)
    assert [line["stage"] for line in found] == ["a", "a", "b", "b", "b"]
    assert found[2]["preservation"] == 0, "the snapshot is that of the stage's beginning"


def test_a_run_that_cannot_go_on_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    safety = SafetyConfig(max_skips=2, max_rollbacks=1)
    file = tmp_path / "config.json"
    file.write_text(to_json(cheap(steps=9, checkpoint_every=2, safety=safety)))
    with poisoned_steps(lambda built: built.state.step >= 4), small_parts():
        code = run_command(vfmvae.train, "--config", file, "--run-dir", tmp_path / "run")
    output = capsys.readouterr()
    assert code == 1
    assert output.out.count("going back to the checkpoint of step 4") == 1
    assert output.err == (
        "error: 2 steps in a row up to step 6 were skipped, as the gradients of tokenizer were not finite"
        " or exploded; not finite: l1, multiscale_l1, kl, alignment, total, gradient_norm; lower its learning"
        " rate\n"
    )
    assert saved_steps(tmp_path / "run") == [2, 4], "and what was good is still there"


def test_before_the_first_periodic_checkpoint_a_run_goes_back_to_its_beginning(tmp_path: Path) -> None:
    config = cheap(steps=4, checkpoint_every=0, safety=SafetyConfig(max_skips=2))
    with poisoned_steps(lambda built: built.state.step in (1, 2) and "rollbacks" not in built.state.numbers):
        printed = run(config, tmp_path)
    assert printed.count("going back to the checkpoint of step 0") == 1
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(tmp_path, "eval")] == [0, 4], "that of the beginning stays"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_a_run_that_never_had_a_good_step_ends_after_its_returns(tmp_path: Path) -> None:
    config = cheap(steps=9, safety=SafetyConfig(max_skips=2, max_rollbacks=1))
    with (
        poisoned_steps(lambda built: True),
        pytest.raises(FloatingPointError, match="2 steps in a row up to step 2 were skipped, as the"),
    ):
        run(config, tmp_path)
    assert saved_steps(tmp_path) == [0]


@pytest.mark.parametrize("log_every", [1, 2, 3])
def test_checkpoints_among_skipped_steps_do_not_begin_the_count_anew(tmp_path: Path, log_every: int) -> None:
    # A checkpoint every step: after a return the steps before it count on, or a lost run would never end.
    config = cheap(
        steps=40, checkpoint_every=1, log_every=log_every, safety=SafetyConfig(max_skips=4, max_rollbacks=2)
    )
    with (
        poisoned_steps(lambda built: built.state.step >= 2),
        pytest.raises(FloatingPointError, match="4 steps in a row"),
    ):
        run(config, tmp_path)
    assert saved_steps(tmp_path)[-1] < 10


def test_an_exploding_gradient_skips_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGuard, "WARMUP", 2)
    built = job(replace(ALL_LOSSES, patch_adversarial=0.0, feature_matching=0.0), batch_size=2)
    assert [result.skipped for result in steps(built, 3)] == [0, 0, 0]
    kept = built.tokenizer.align.weight.detach().clone()
    handle = built.tokenizer.last_fusion_weight.register_hook(lambda gradient: gradient * 1e6)
    (result,) = steps(built, 1)
    assert result.skipped == 1 and result.losses["gradient_norm"].isfinite()
    assert torch.equal(built.tokenizer.align.weight, kept)
    handle.remove()
    assert steps(built, 1)[0].skipped == 0
