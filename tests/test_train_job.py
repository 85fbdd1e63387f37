"""A job in its stages: what moves, what is remembered, what is on; and that a step never waits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.host_reads import host_reads
from tests.tiny_runs import (
    ALL_LOSSES,
    job,
    largest_difference,
    parameters,
    raise_layer_scales,
    stage,
    steps,
    tiny,
)
from tests.whole_runs import DECODER, EVERYTHING, align_tok, small_parts, three_stages
from vfmvae.config import TrainConfig
from vfmvae.data.transforms import CropConfig
from vfmvae.tokenizer import BottleneckConfig
from vfmvae.train_job import Job
from vfmvae.train_step import training_step
from vfmvae.training.ema import EmaConfig
from vfmvae.training.engine import EngineConfig
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.rates import PartRate
from vfmvae.training.stages import LossWeights, StageConfig, TermSchedule

PLAIN = LossWeights(alignment=0.5)
ENCODER_SIDE = ("fusion", "bottleneck", "decompress", "style", "decoder")


def built(*stages: StageConfig, **changes: object) -> Job:
    with small_parts():
        ready = Job(tiny(stages=stages, **changes))
    raise_layer_scales(ready)
    ready.enter_stage(0)
    return ready


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved_parts(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {n.split(".")[0] for n, p in module.named_parameters() if not torch.equal(p, before[n])}


# Stages


def test_each_stage_moves_its_own_parts_and_no_others() -> None:
    ready, moved = built(*three_stages(PLAIN)), []
    for _ in range(3):
        before = copies(ready.tokenizer)
        steps(ready, 2)
        moved.append(moved_parts(before, ready.tokenizer))
    behind = {"fusion", "align", "decompress", "style", "decoder"}
    assert moved == [behind, behind | {"encoder"}, set(DECODER)]


def test_align_tok_is_a_list_of_stages() -> None:
    ready = built(*align_tok())
    behind = {"fusion", *DECODER}
    for name, moved in (("align", behind), ("whole", behind | {"encoder"}), ("decoder", set(DECODER))):
        before = copies(ready.tokenizer)
        of_discriminator = copies(ready.adversaries[0].game)
        results = steps(ready, 3)
        assert ready.stage.name == name
        assert moved_parts(before, ready.tokenizer) == moved
        assert moved_parts(of_discriminator, ready.adversaries[0].game) == {"discriminator"}
        terms = {"l1", "perceptual", "adversarial"} | ({"preservation"} if name == "whole" else set())
        factors = {"adversarial_factor", "discriminator_projected", "total", "gradient_norm"}
        assert all(result.losses.keys() == terms | factors for result in results)
        ratios = {result.losses["adversarial_factor"].item() for result in results}
        assert len(ratios) == 3 and min(ratios) > 0 and max(ratios) < 1e4
        averages, state = ready.ema.state_dict(), ready.tokenizer.state_dict()
        behind_weights = {n.split(".")[0] for n in averages if not torch.equal(averages[n], state[n])}
        assert behind_weights == (moved if name == "whole" else set()), "the average"
        if name == "whole":
            first, *later = (result.losses["preservation"] for result in results)
            assert first == 0 and min(later) > 0
            rates = {p: group["lr"] for group in ready.optimizer.param_groups for p in group["params"]}
            assert {rates[p] for p in ready.tokenizer.encoder.parameters()} == {1e-3 * 0.1}
            assert rates[ready.tokenizer.last_decoder_weight] == 1e-3
    assert ready.state.step == ready.plan.steps


def test_the_blocks_above_a_size_train_alone() -> None:
    losses = LossWeights(alignment=0.0, adversarial=1.0)
    ready = built(stage(losses, trains=("decoder>16",)))
    before = copies(ready.tokenizer)
    steps(ready, 2)
    names = {n for n, p in ready.tokenizer.named_parameters() if not torch.equal(p, before[n])}
    assert {".".join(name.split(".")[:3]) for name in names} == {"decoder.blocks.4", "decoder.blocks.5"}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_alignment_that_nothing_can_learn_from_does_no_harm(accumulate: int) -> None:
    losses = LossWeights(alignment=0.5, adaptive_alignment=False)
    ready = built(stage(losses, trains=("decoder",)), engine=EngineConfig(accumulate=accumulate))
    (result,) = steps(ready, 1)
    assert result.losses["alignment"] > 0 and result.skipped == 0


def test_an_adaptive_weight_needs_the_fusion() -> None:
    with pytest.raises(ValueError, match="stage 'train' does not train 'fusion', so losses.adaptive_align"):
        built(stage(PLAIN, trains=("align", "decoder")))


def test_moments_go_on_where_a_stage_follows() -> None:
    first, second = stage(PLAIN, name="a", images=4), stage(PLAIN, name="b", images=4)
    ready = built(first, replace(second, trains=(*second.trains, "encoder")))
    steps(ready, 2)
    of_before = ready.optimizer.state[ready.tokenizer.align.weight]["exp_avg"].clone()
    ready.begin_step()
    assert ready.stage.name == "b"
    assert torch.equal(ready.optimizer.state[ready.tokenizer.align.weight]["exp_avg"], of_before)
    assert ready.optimizer.state[ready.tokenizer.align.weight]["step"] == 2
    steps(ready, 1)
    encoder = next(ready.tokenizer.encoder.parameters())
    assert ready.optimizer.state[encoder]["step"] == 1, "what did not train before begins"
    assert ready.optimizer.state[ready.tokenizer.align.weight]["step"] == 3


def test_two_equal_stages_in_a_row_are_one() -> None:
    losses = replace(ALL_LOSSES, patch_adversarial=0.0, feature_matching=0.0)
    halves = built(*(stage(losses, name=name, images=4) for name in "ab"))
    whole = built(stage(losses, images=8))
    steps(halves, 4), steps(whole, 4)
    assert largest_difference(parameters(halves), parameters(whole)) == 0


def test_every_stage_has_its_own_optimizers() -> None:
    losses = LossWeights(alignment=0.5, adversarial=1.0)
    other = OptimizerConfig(kind="adamw", learning_rate=2e-3, betas=(0.1, 0.2), weight_decay=0.3)
    changed = stage(losses, name="b", images=2, optimizer=other, discriminator_optimizer=other)
    ready = built(stage(losses, name="a", images=2), changed)
    steps(ready, 1)
    assert ready.begin_step() == {"tokenizer": 2e-3, "discriminator_projected": 2e-3}
    for optimizer in (ready.optimizer, ready.adversaries[0].optimizer):
        assert isinstance(optimizer, torch.optim.AdamW)
        for group in optimizer.param_groups:
            assert (group["betas"], group["weight_decay"]) == ((0.1, 0.2), 0.3)
    assert ready.state.optimizers["projected"] is ready.adversaries[0].optimizer, "which checkpoints hold"


def test_preservation_holds_the_latents_of_the_stages_beginning() -> None:
    ready = built(*three_stages(PLAIN, images=6))
    steps(ready, 3)
    kept = copies(ready.tokenizer)
    first, second, third = (result.losses["preservation"].item() for result in steps(ready, 3))
    assert first == 0 < second and third > 0
    assert ready.snapshot is not None
    assert all(torch.equal(p, kept[name]) for name, p in ready.snapshot.named_parameters() if name in kept)
    (result,) = steps(ready, 1)
    assert "preservation" not in result.losses and ready.snapshot is None
    assert "snapshot" not in ready.state.modules


@pytest.mark.parametrize("workers", [0, 2])
def test_every_stage_sees_its_own_crops(workers: int) -> None:
    whole = CropConfig(side=(1.0, 1.0), flip=0.0)
    stages = (stage(PLAIN, name="a", images=12), stage(PLAIN, name="b", images=8, crops=whole))
    ready = built(*stages, batch_size=4, workers=workers, engine=EngineConfig(accumulate=2))
    batches = [torch.cat(parts) for parts in ready.batches(0)]
    crops = [CropConfig()] * 3 + [whole] * 2
    for number, (images, each) in enumerate(zip(batches, crops, strict=True)):
        assert torch.equal(images, ready.data.batch(number, 4, each)["image"])
    again = [torch.cat(parts) for parts in ready.batches(4)]
    assert len(again) == 1 and torch.equal(again[0], batches[4])


@pytest.mark.parametrize("trains_encoder", [True, False])
def test_a_snapshot_is_of_the_encoder_side_and_holds_an_encoder_only_where_that_trains(
    trains_encoder: bool,
) -> None:
    first, behind = stage(PLAIN, name="a", images=2), replace(PLAIN, preservation=1.0)
    trains = ("fusion", "align", *(["encoder"] if trains_encoder else []))
    ready = built(first, stage(behind, name="b", images=6, trains=trains))
    steps(ready, 3)
    assert ready.snapshot is not None
    parts = {name.split(".")[0] for name in ready.snapshot.state_dict()}
    assert parts == ({"encoder", "fusion"} if trains_encoder else {"fusion"})
    stored = {n.split(".")[2] for n in ready.state.tensors() if n.startswith("modules.snapshot.")}
    assert stored == parts, "what cannot be had again is in the checkpoint"


# Schedules


def test_a_discriminator_may_warm_up_before_the_tokenizer_sees_it() -> None:
    losses = LossWeights(alignment=0.5, adversarial=1.0, patch_adversarial=1.0)
    schedules = tuple(TermSchedule(term=t, start=4) for t in ("adversarial", "patch_adversarial"))
    ready, alone = built(stage(losses, schedules=schedules)), built(stage(PLAIN))
    before = [copies(adversary.game) for adversary in ready.adversaries]
    results = steps(ready, 2)
    steps(alone, 2)
    for adversary, earlier in zip(ready.adversaries, before, strict=True):
        assert moved_parts(earlier, adversary.game) == {"discriminator"}
    assert all({"discriminator_projected", "discriminator_patch"} <= r.losses.keys() for r in results)
    assert all(not {"adversarial", "patch_adversarial"} & r.losses.keys() for r in results)
    ours, theirs = copies(ready.tokenizer), copies(alone.tokenizer)
    assert largest_difference(ours, theirs) < 1e-6, "the tokenizer learns as if there were none"
    (result,) = steps(ready, 1)
    assert {"adversarial", "patch_adversarial"} <= result.losses.keys()


def test_terms_come_and_go_with_their_schedules() -> None:
    schedules = (
        TermSchedule(term="preservation", start=2),
        TermSchedule(term="alignment", start=4),
        TermSchedule(term="l1", end=4),
    )
    losses = LossWeights(alignment=0.5, preservation=1.0, multiscale_l1=0.0, kl=0.0)
    ready = built(stage(losses, schedules=schedules))
    reported = [set(result.losses) - {"total", "gradient_norm"} for result in steps(ready, 3)]
    assert reported == [{"l1"}, {"l1", "preservation"}, {"preservation", "alignment", "alignment_factor"}]


def test_a_step_without_any_term_changes_nothing() -> None:
    losses = LossWeights(alignment=0.0, multiscale_l1=0.0, kl=0.0)
    ready = built(stage(losses, trains=ENCODER_SIDE, schedules=(TermSchedule(term="l1", start=2),)))
    before = copies(ready.tokenizer)
    (result,) = steps(ready, 1)
    assert result.losses["total"] == 0 == result.skipped
    assert moved_parts(before, ready.tokenizer) == set()
    steps(ready, 1)
    assert moved_parts(before, ready.tokenizer) > {"decoder"}


def test_the_blur_fades_with_the_images() -> None:
    losses = replace(PLAIN, adversarial=0.1)
    ready = built(stage(losses, images=8, blur_sigma=2.0, blur_images=4))
    found = []
    for ready.state.step in range(4):
        ready.begin_step()
        found.append(ready.blur())
    assert found == [(2.0, 6), (1.0, 6), None, None]


def test_rates_follow_their_stage() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup=0.5, schedule="cosine")
    ready = built(stage(PLAIN, name="a", images=8, optimizer=config), stage(PLAIN, name="b", images=4))
    rates = []
    for ready.state.step in range(6):
        rates.append(ready.begin_step()["tokenizer"])
        assert {group["lr"] for group in ready.optimizer.param_groups} == {rates[-1]}
    assert rates == pytest.approx([0.25, 0.75, 0.8535534, 0.1464466, 1e-3, 1e-3])


def test_parts_may_have_rates_of_their_own() -> None:
    schedule = OptimizerConfig(learning_rate=1e-2, betas=(0.5, 0.9), eps=1e-3, warmup=0.5, schedule="cosine")
    rates = (PartRate("encoder", 0.1), PartRate("decoder>32", 4.0))
    alike = stage(PLAIN, images=8, trains=EVERYTHING, optimizer=schedule)
    plain, ready = built(alike), built(replace(alike, rates=rates))
    start = copies(ready.tokenizer)
    (said,), (_,) = ([each.begin_step()] for each in (ready, plain))
    assert said == pytest.approx({"tokenizer": 2.5e-3, "encoder": 2.5e-4, "decoder>32": 1e-2})
    assert not any(json.loads(ready.state.record())["optimizers"]["tokenizer"]), "factors are no state"
    steps(plain, 1), steps(ready, 1)
    factors = {"encoder.": 0.1, "decoder.blocks.5.": 4.0}
    for name, parameter in ready.tokenizer.named_parameters():
        factor = next((f for prefix, f in factors.items() if name.startswith(prefix)), 1.0)
        ours, theirs = parameter - start[name], plain.tokenizer.get_parameter(name) - start[name]
        torch.testing.assert_close(ours, factor * theirs, rtol=1e-3, atol=2e-7, msg=name)


# Options


def test_clipping_bounds_the_gradient() -> None:
    free, clipped = job(PLAIN, batch_size=2), job(PLAIN, batch_size=2, clip_norm=0.01)
    norm = steps(free, 1)[0].losses["gradient_norm"].item()
    (result,) = steps(clipped, 1)
    assert result.losses["gradient_norm"].item() == pytest.approx(norm), "what is reported is before"
    assert norm > 0.01
    for name, p in clipped.tokenizer.named_parameters():
        if p.requires_grad and p.grad is not None:
            expected = free.tokenizer.get_parameter(name).grad * 0.01 / norm
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-9)


def test_fp16_gradients_reach_the_optimizer_without_their_scale() -> None:
    single, half = (built(stage(PLAIN), dtype=dtype) for dtype in ("fp32", "fp16"))
    half.guard.scale.fill_(64.0)
    results = [steps(ready, 1)[0] for ready in (single, half)]
    assert [result.skipped for result in results] == [0, 0]
    norms = [result.losses["gradient_norm"].item() for result in results]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    gradients = [ready.tokenizer.align.weight.grad for ready in (single, half)]
    assert gradients[0] is not None and gradients[1] is not None
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_the_average_follows_what_some_stage_trains() -> None:
    ready = built(*three_stages(PLAIN))
    assert any(name.startswith("encoder.") for name in ready.ema.state_dict())
    frozen = built(stage(PLAIN))
    assert not any(name.startswith("encoder.") for name in frozen.ema.state_dict())
    assert not any(name.startswith("modules.tokenizer.encoder.") for name in frozen.state.tensors())


def test_every_stage_averages_as_it_says() -> None:
    slow, follow = EmaConfig(half_life_images=4, ramp_up=None), EmaConfig(half_life_images=0)
    stages = (("a", slow), ("b", follow), ("c", slow))
    ready = built(*(stage(PLAIN, name=name, images=4, ema=ema) for name, ema in stages))
    weight = ready.tokenizer.align.weight
    for step in range(6):
        before = ready.ema.state_dict()["align.weight"].clone()
        steps(ready, 1)
        average = ready.ema.state_dict()["align.weight"]
        if step in (2, 3):
            assert torch.equal(average, weight)
        else:
            expected = torch.lerp(before, weight.detach(), 1 - 0.5 ** (2 / 4))
            torch.testing.assert_close(average, expected)
            assert not torch.equal(average, weight)


# No waiting


def everything() -> TrainConfig:
    """All losses, all parts, half of the options; a discrete bottleneck has terms of its own."""
    losses = replace(ALL_LOSSES, preservation=1.0, r1=0.1, adaptive_adversarial=True)
    trains = ("encoder", *ENCODER_SIDE, "align")
    fading = stage(losses, trains=trains, blur_sigma=1.0, blur_images=500)
    return tiny(stages=(fading,), engine=EngineConfig(clip_norm=1.0))


@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_step_asks_the_device_for_nothing(kind: str, dtype: str) -> None:
    config = replace(everything(), dtype=dtype)
    if kind == "discrete":
        bottleneck = BottleneckConfig(kind="discrete", codebooks=2, codes=16)
        entropy = replace(config.stages[0], losses=replace(config.stages[0].losses, entropy=0.1))
        tokenizer = replace(config.tokenizer, bottleneck=bottleneck)
        config = replace(config, tokenizer=tokenizer, stages=(entropy,))
    ready = built(*config.stages, **{n: getattr(config, n) for n in ("tokenizer", "engine", "dtype")})
    steps(ready, 1)  # what is done once may wait
    for batch, _ in zip(ready.batches(1), range(3), strict=False):
        ready.begin_step()
        with host_reads() as reads:
            result = training_step(ready, batch, ready.weights())
        assert reads == []
        ready.state.step += 1
    assert {"r1"} & ready.weights().keys()
    assert {"preservation", "adversarial_factor", "alignment_factor"} <= result.losses.keys()


@pytest.mark.parametrize(
    "engine", [{}, {"accumulate": 4}, {"share_forward": False}], ids=["whole", "in parts", "two forwards"]
)
def test_each_code_that_a_batch_hits_counts_once(engine: dict[str, Any]) -> None:
    tokenizer = replace(tiny().tokenizer, bottleneck=BottleneckConfig(kind="discrete", codebooks=2, codes=16))
    ready = built(stage(), tokenizer=tokenizer, batch_size=32, engine=EngineConfig(**engine))
    steps(ready, 2)
    assert ready.playing
    for book in ready.tokenizer.bottleneck.codebooks:
        assert book.usage.sum().item() == pytest.approx((0.99 + 1) * 0.01 * 32 * 8 * 8, rel=1e-5)


@pytest.mark.gpu
def test_a_step_on_a_gpu_does_not_synchronise() -> None:
    config = everything()
    ready = built(*config.stages, engine=config.engine, device="cuda", dtype="bf16")
    steps(ready, 2)
    batch = next(ready.batches(2))
    ready.begin_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(ready, batch, ready.weights())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_optimizer_that_a_later_stage_cannot_have_is_refused_at_the_start() -> None:
    later = stage(optimizer=OptimizerConfig(implementation="apex"))
    with pytest.raises(ValueError, match="optimizer.implementation 'apex' cannot be used: "):
        Job(tiny(stages=(stage(), later)))
