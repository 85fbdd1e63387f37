"""The convergence benchmark: the whole of it with minimal sizes, and how curves are compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.benchmarks.scripts import script, scripts_importable

convergence = script("convergence")
with scripts_importable():
    import convergence_diffusion as diffusion
    import convergence_models as models

    from vfmvae.diffusion.config import TransformerConfig

CPU = torch.device("cpu")
TINY = replace(
    convergence.BUDGETS["cpu"],
    images=32,
    held_out=30,
    places=8,
    encoder_depth=2,
    encoder_steps=1,
    encoder_batch=4,
    classifier_width=4,
    classifier_steps=2,
    tokenizer_steps=2,
    tokenizer_batch=2,
    width=16,
    depth=2,
    heads=2,
    batch=4,
    evaluate_at=(1, 2),
    samples=15,
    sampling_steps=2,
)


def test_the_whole_writes_what_it_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.json"
    whole, pictures = convergence.Convergence("tiny", TINY, CPU, 2, path).run()
    result = json.loads(path.read_text())
    assert result == json.loads(json.dumps(whole)) and result["complete"] and result["budget"] == "tiny"
    assert set(result["tokenizers"]) == {"plain", "distilled", "vfm"}
    assert all(math.isfinite(value) for kind in result["tokenizers"].values() for value in kind.values())
    runs = {(run["kind"], run["repa"], run["seed"]): run["curve"] for run in result["runs"]}
    assert len(runs) == len(result["runs"]) == 3 * 2 * 3
    for curve in runs.values():
        assert [point["step"] for point in curve] == [1, 2]
        assert all(0 <= point["accuracy"] <= 1 and point["distance"] >= 0 for point in curve)
        assert all(len(point["cknna"]) == 2 for point in curve)
    assert runs["vfm", True, 0] != runs["vfm", False, 0] != runs["vfm", False, 1]
    reached = result["steps_to_reach"]
    assert set(reached) == {"distilled", "vfm", "distilled with REPA", "vfm with REPA"}
    assert len(reached["vfm"]["seeds"]) == 3 and reached["vfm"]["median"] in reached["vfm"]["seeds"]
    assert {"date", "device", "torch"} <= result.keys() and result["seconds"]["diffusion"]["wall"] > 0
    with scripts_importable():
        assert str(path) in convergence.draw_curves(result, path)
        convergence.picture_grid(pictures, tmp_path / "samples.png")
    assert all(Image.open(tmp_path / name).size[0] > 500 for name in ("curves.png", "samples.png"))
    convergence.show(result, "here")


STEPS = (100, 200, 400)


@pytest.mark.parametrize(
    ("first", "second", "ratio", "kind"),
    [
        ((9, 6, 3), (9, 3, 1), 400 / 200, "measured"),
        ((9, 6, 3), (9, 6, 3), 1.0, "measured"),
        ((9, 6, 3), (5, 1, 1), 400 / 150, "measured"),
        ((9, 6, 3), (7, 5, 1), 400 / 300, "measured"),
        ((9, 6, 3), (2, 1, 1), 400 / 100, "at least"),
        ((9, 6, 3), (9, 8, 7), 400 / 400, "less than"),
        ((9, 3, 3), (9, 8, 7), 200 / 400, "less than"),
        ((9, 1, 5), (9, 5, 6), 150 / 200, "measured"),
        ((3, 3, 3), (9, 6, 3), 100 / 400, "less than"),
        ((3, 3, 3), (2, 6, 3), 1.0, "unresolved"),
    ],
)
def test_steps_to_reach(first: list[float], second: list[float], ratio: float, kind: str) -> None:
    assert diffusion.steps_to_reach(STEPS, first, second) == (pytest.approx(ratio), kind)


def test_the_median_of_bounds_is_a_bound() -> None:
    bound, low, high = (
        diffusion.Reach(r, k) for r, k in ((1.0, "less than"), (0.5, "measured"), (2.0, "measured"))
    )
    assert diffusion.median_of([high, bound, low]) == bound and str(bound) == "less than 1.00"
    assert diffusion.median_of([high, low, low]) == low and str(low) == "0.50"


def test_curves_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="curves of 3 and 2 points for 3 steps"):
        diffusion.steps_to_reach(STEPS, [3, 2, 1], [3, 2])


def test_stacked_runs_are_the_runs_alone() -> None:
    """Neither another seed nor REPA beside it changes a run; REPA's weight is what REPA is."""
    config = TransformerConfig(
        latent_size=4, channels=3, width=16, depth=2, heads=2, classes=4, alignment_depth=1,
        alignment_widths=(8,), projector_width=8,
    )  # fmt: skip
    latents = diffusion.Latents(
        {"plain": torch.randn(20, 3, 4, 4), "vfm": torch.randn(20, 3, 4, 4)},
        torch.randint(4, (20,)),
        torch.randn(20, 16, 8),
    )
    runs = [diffusion.Run("plain", False, 0), diffusion.Run("vfm", True, 0), diffusion.Run("vfm", False, 1)]

    def weights(runs: list[diffusion.Run]) -> list[dict[str, torch.Tensor]]:
        stack = diffusion.Stack(config, runs, CPU, rate=1e-2)
        diffusion.train_runs(stack, latents, 8, (3,), lambda step: None, lambda: None)
        return [
            {name: value.clone() for name, value in stack.averaged(number).state_dict().items()}
            for number in range(len(runs))
        ]

    together, alone = weights(runs), [weights([run])[0] for run in runs]
    for one, other in zip(together, alone, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)
    start = diffusion.initial_state(config, 0)
    moved = {name: not torch.equal(value, start[name]) for name, value in together[0].items()}
    assert moved["blocks.0.attn.qkv.weight"] or moved["final_layer.linear.weight"]
    assert not moved["projectors.0.4.weight"], "without REPA its head does not train"
    assert not torch.equal(together[1]["projectors.0.4.weight"], start["projectors.0.4.weight"])


def test_the_tokenizers_differ_in_their_encoders_alone() -> None:
    config = models.tokenizer_config(2, 16, 16, 16, TINY.decoder)  # four of the encoder's tokens per latent
    arms = {}
    for kind in models.KINDS:
        torch.manual_seed(0)
        arms[kind] = models.Arm(kind, config, models.build_mini(2).state_dict())
    states = [arm.tokenizer.decoder.state_dict() for arm in arms.values()]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in state)
    trained = {kind: {n for n, p in arm.named_parameters() if p.requires_grad} for kind, arm in arms.items()}
    assert not any(name.startswith("tokenizer.encoder") for names in trained.values() for name in names)
    assert trained["distilled"] - trained["plain"] == {"tokenizer.align.weight"}
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    features = arms["vfm"].tokenizer.features(images)
    shapes = {arm.posterior(images, features).mean.shape for arm in arms.values()}
    assert shapes == {(2, 16, 4, 4)}
