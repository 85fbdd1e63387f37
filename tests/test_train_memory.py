"""Estimates from models without values against what the same models with values keep and hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_runs import ALL_LOSSES, raise_layer_scales, stage, steps, tiny
from tests.whole_runs import DECODER, EVERYTHING
from vfmvae.config import TrainConfig
from vfmvae.images import to_unit
from vfmvae.train_job import Job
from vfmvae.train_memory import MetaRun, graph_of
from vfmvae.train_step import DISCRIMINATOR, TOKENIZER, Part, forward
from vfmvae.training.engine import EngineConfig
from vfmvae.training.stages import LossWeights, StageConfig

PLAIN = LossWeights(alignment=0.5)
EXACT = pytest.approx


def config(*stages: StageConfig, **changes: Any) -> TrainConfig:
    """Batches of one image, computed plainly in float32."""
    base = {"stages": stages or (stage(PLAIN),), "batch_size": 1, "fused": False, "dtype": "fp32"}
    return tiny(**base | changes)


def real(planned: TrainConfig) -> tuple[Job, Part]:
    """The run itself, and its first image."""
    built = Job(planned)
    raise_layer_scales(built)
    built.enter_stage(0)
    built.begin_step()
    (images,) = next(built.batches(0))
    return built, Part(to_unit(images), 0)


def test_saved_bytes_are_counted_once_and_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh())
    inputs = torch.zeros(4, 8)
    with graph_of(model) as kept:
        model(inputs)
    assert sum(kept.values()) == 4 * (4 * 8 + 4 * 8), "the linear layer's input, the output of tanh"


@pytest.mark.parametrize("trains", [stage().trains, DECODER, EVERYTHING])
def test_the_tokenizers_graph_is_that_of_the_real_forward(trains: tuple[str, ...]) -> None:
    losses = PLAIN if trains != DECODER else replace(PLAIN, alignment=0.0)
    planned = config(stage(losses, trains=trains))
    memory, _ = MetaRun(planned).enter_stage(0)
    built, part = real(planned)
    with graph_of(built.tokenizer) as kept:
        output = forward(built, part, built.weights(), TOKENIZER)
    assert output.images
    assert memory.graphs == {"tokenizer": EXACT(sum(kept.values()), rel=0.01)}


def test_recomputing_keeps_inputs_and_one_block_at_a_time() -> None:
    engine = EngineConfig(recompute=True)
    memory, _ = MetaRun(config(engine=engine)).enter_stage(0)
    built, part = real(config(engine=engine))
    inputs: list[tuple[Any, ...]] = []
    hooks = [
        b.register_forward_pre_hook(lambda block, given: inputs.append(given))
        for b in built.tokenizer.decoder.blocks
    ]
    with graph_of(built.tokenizer) as kept:  # which does not see what checkpoint() keeps
        output = forward(built, part, built.weights(), TOKENIZER)
    for hook in hooks:
        hook.remove()
    plain, _ = real(config())
    largest = 0
    for block, given in zip(plain.tokenizer.decoder.blocks, inputs, strict=True):
        tensors = [x for x in given if isinstance(x, Tensor)]
        with graph_of(block) as of_block:
            block(*(x if x is None else x.detach().requires_grad_() for x in given))
        of_inputs = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
        kept.update(of_inputs)
        largest = max(largest, sum(of_block.values()) - sum(of_inputs.values()))
    assert output.images
    assert memory.per_image == EXACT(sum(kept.values()) + largest, rel=0.03)
    assert memory.per_image < MetaRun(config()).enter_stage(0)[0].per_image


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_a_discriminators_graph_is_the_real_one(r1: float) -> None:
    losses = replace(ALL_LOSSES, r1=r1, patch_adversarial=0.0, feature_matching=0.0)
    planned = config(stage(losses))
    run = MetaRun(planned)
    run.enter_stage(0)
    built, part = real(planned)
    (adversary,), image = built.adversaries, part.images
    with graph_of(adversary.game) as own:
        draws = built.draws(0, DISCRIMINATOR)
        seen = adversary.game.look(image.clone(), draws, None)
        loss = adversary.game(image, seen, draws, None, built.weights())
    fake = image.clone().requires_grad_()
    with graph_of(adversary.game) as generator:
        seen = adversary.game.look(fake, built.draws(0, DISCRIMINATOR), None)
        losses_ = adversary.game.generator_losses(seen, image, None, built.weights())
    assert loss.requires_grad and losses_
    found = run._game_graph("projected", planned.stages[0])
    assert found == (EXACT(sum(own.values()), rel=0.02), EXACT(sum(generator.values()), rel=0.02))


def test_the_perceptual_networks_graph_is_the_real_one() -> None:
    planned = config(stage(replace(PLAIN, perceptual=1.0)))
    built, part = real(planned)
    assert built.perceptual is not None
    fake = part.images.clone().requires_grad_()
    with graph_of(built.perceptual) as kept:
        distance = built.perceptual(fake, part.images)
    assert distance.requires_grad
    assert MetaRun(planned)._perceptual_graph == EXACT(sum(kept.values()), rel=0.02)


def test_what_does_not_depend_on_the_batch_is_what_a_run_holds() -> None:
    losses = replace(ALL_LOSSES, preservation=1.0)
    planned = config(stage(replace(losses, preservation=0.0), name="a", images=2), stage(losses, name="b"))
    run = MetaRun(planned)
    expected = [run.enter_stage(number)[0].fixed for number in range(2)]
    built = Job(planned)
    built.enter_stage(0)
    steps(built, 1)
    first = held(built)
    steps(built, 2)
    assert built.stage.name == "b"
    assert expected == [EXACT(first, rel=0.01), EXACT(held(built), rel=0.01)]


def held(built: Job) -> int:
    """Bytes of weights, gradients, moments and averages."""
    assert built.perceptual is not None
    models = [built.tokenizer, built.perceptual, *(a.game for a in built.adversaries)]
    tensors = [x for model in models for x in (*model.parameters(), *model.buffers())]
    tensors += [p.grad for model in models for p in model.parameters() if p.grad is not None]
    for optimizer in (built.optimizer, *(a.optimizer for a in built.adversaries)):
        tensors += [x for state in optimizer.state.values() for x in state.values()]
    tensors += built.ema.state_dict().values()
    if built.snapshot is not None:
        tensors += built.snapshot.parameters()
    return sum(x.numel() * x.element_size() for x in tensors)


def test_half_precision_shrinks_the_graphs() -> None:
    single, half = (MetaRun(config(dtype=dtype)).enter_stage(0)[0] for dtype in ("fp32", "bf16"))
    assert 0.4 < half.per_image / single.per_image < 0.9
    assert half.fixed == single.fixed


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "auto", torch.bfloat16),
        ("auto", "cuda:1", torch.bfloat16),
        ("auto", "cpu", torch.float32),
        ("fp16", "cpu", torch.float16),
    ],
)
def test_the_dtype_is_that_of_the_planned_device(dtype: str, device: str, expected: torch.dtype) -> None:
    assert MetaRun(config(dtype=dtype, device=device)).dtype == expected


def test_discriminators_are_beside_the_tokenizers_graph_only_where_they_share_the_forward() -> None:
    losses = LossWeights(alignment=0.0, l1=0.0, multiscale_l1=0.0, adversarial=1.0)
    alone = stage(losses, trains=("style",))
    shared, apart = (
        MetaRun(config(alone, engine=EngineConfig(share_forward=share))).enter_stage(0)[0]
        for share in (True, False)
    )
    assert shared.graphs["tokenizer"] == apart.graphs["tokenizer"]
    assert shared.graphs["discriminators"] > apart.graphs["discriminators"] > 0
