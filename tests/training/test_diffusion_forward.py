"""The losses of diffusion training against the same formulas written out in float64 numpy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_diffusion import ALL_LOSSES, CLASSES, MODEL, SIZE, WIDTH, stage
from vfmvae.diffusion import DiffusionTransformer
from vfmvae.diffusion.flow import TimeConfig
from vfmvae.training.diffusion_forward import (
    DiffusionForward,
    DiffusionInputs,
    alignment_target,
    noised,
    pooled_tokens,
)
from vfmvae.training.draws import StepDraws

BATCH = 6
TERMS = ALL_LOSSES.weights().keys()


def draws(count: int = BATCH, total: int | None = None, first: int = 0) -> StepDraws:
    return StepDraws(3, 5, torch.device("cpu"), first, count, total or count)


def some_inputs(grid: int = 2) -> DiffusionInputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    labels = torch.arange(BATCH) % len(CLASSES)
    return DiffusionInputs(normal(4, SIZE, SIZE), labels, normal(grid * grid, WIDTH) + 1, normal(WIDTH))


def model(**changes: Any) -> DiffusionTransformer:
    torch.manual_seed(0)
    built = DiffusionTransformer(replace(MODEL, **changes), fused=False)
    with torch.no_grad():
        for parameter in built.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return built


def cosines(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


@pytest.mark.parametrize(("law", "path"), [("uniform", "linear"), ("lognormal", "cosine")])
@pytest.mark.parametrize("standardise", [False, True])
def test_the_losses_are_their_formulas(law: str, path: str, standardise: bool) -> None:
    time = TimeConfig(law=law, shift=2.0)  # type: ignore[arg-type]
    config = stage(time=time, path=path, standardise_features=standardise, label_dropout=0.5)
    given, transformer = some_inputs(), model()
    found = DiffusionForward(transformer)(given, config, draws(), TERMS)

    # What is drawn, in the order of the forward: times, noise, dropped labels, noise of the class token.
    numbers = draws()
    t = (numbers.uniform(()) if law == "uniform" else numbers.normal(())).double().numpy()
    t = t if law == "uniform" else 1 / (1 + np.exp(-t))
    t = 2 * t / (1 + t)
    noise = numbers.normal((4, SIZE, SIZE)).double().numpy()
    dropped = numbers.uniform(()).numpy() < 0.5
    assert 0 < dropped.sum() < BATCH
    token_noise = numbers.normal((WIDTH,)).double().numpy()

    def mixed(data: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = t.reshape(-1, *[1] * (data.ndim - 1))
        if path == "linear":
            return (1 - s) * data + s * e, e - data
        angle = math.pi / 2 * s
        x = np.cos(angle) * data + np.sin(angle) * e
        return x, math.pi / 2 * (np.cos(angle) * e - np.sin(angle) * data)

    x, velocity = mixed(given.latents.double().numpy(), noise)
    assert given.class_token is not None and given.features is not None
    token, token_velocity = mixed(given.class_token.double().numpy(), token_noise)
    labels = np.where(dropped, len(CLASSES), given.labels.numpy())
    exact = model().double()
    out = exact(*map(torch.from_numpy, (x, t, labels, token)))
    v = out.velocity.detach().numpy()
    y = given.features.double().numpy()
    if standardise:
        y = (y - y.mean(1, keepdims=True)) / (y.std(1, ddof=1, keepdims=True) + 1e-6)
    y = np.concatenate([given.class_token.double().numpy()[:, None], y], axis=1)
    expected = {
        "velocity": ((v - velocity) ** 2).mean(),
        "cosine": (1 - cosines(v, velocity, 1)).mean(),
        "alignment": -cosines(out.projected[0].detach().numpy(), y, -1).mean(),
        "class_token": ((out.class_velocity.detach().numpy() - token_velocity) ** 2).mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert found[name].item() == pytest.approx(value, rel=2e-5, abs=2e-6), name


def test_only_the_terms_asked_for_are_computed() -> None:
    transformer = model(class_token_width=None, alignment_widths=())
    given = DiffusionInputs(some_inputs().latents, some_inputs().labels)
    assert DiffusionForward(transformer)(given, stage(), draws(), ["cosine"]).keys() == {"cosine"}


def test_the_share_of_dropped_labels_is_the_stages() -> None:
    many = 20_000
    given = DiffusionInputs(torch.zeros(many, 1, 1, 1), torch.zeros(many, dtype=torch.int64))
    for share in (0.0, 0.1, 1.0):
        labels = noised(given, stage(label_dropout=share), draws(many), null=9).labels
        assert (labels == 9).double().mean().item() == pytest.approx(share, abs=0.01)
        assert set(labels.unique().tolist()) <= {0, 9}


def test_an_image_is_noised_alike_in_a_whole_batch_and_in_its_part() -> None:
    given = some_inputs()
    whole = noised(given, stage(), draws(), null=5)
    part = noised(
        DiffusionInputs(*(x[2:4] for x in given)),  # type: ignore[index]
        stage(),
        draws(2, BATCH, 2),
        null=5,
    )
    for name, value in part._asdict().items():
        assert torch.equal(value, getattr(whole, name)[2:4]), name


def test_several_projectors_share_a_target() -> None:
    transformer, given = model(alignment_widths=(WIDTH, WIDTH)), some_inputs()
    found = DiffusionForward(transformer)(given, stage(), draws(), ["alignment"])["alignment"]
    alone = []
    for number in range(2):
        one = model(alignment_widths=(WIDTH, WIDTH))
        one.projectors = torch.nn.ModuleList([one.projectors[number]])
        alone.append(DiffusionForward(one)(given, stage(), draws(), ["alignment"])["alignment"].item())
    assert alone[0] != alone[1] and found.item() == pytest.approx(sum(alone) / 2)


def test_a_finer_grid_is_pooled_cell_by_cell() -> None:
    features = torch.arange(36.0).view(1, 36, 1) * torch.tensor([1.0, -2.0])
    pooled = pooled_tokens(features, 3)[0]
    # The first cell holds tokens 0, 1, 6, 7; the next one begins two columns on, the next row twelve tokens.
    first = (0 + 1 + 6 + 7) / 4
    assert pooled[:, 0].tolist() == [first + 2 * column + 12 * row for row in range(3) for column in range(3)]
    assert torch.equal(pooled[:, 1], -2 * pooled[:, 0])
    assert pooled_tokens(features, 6) is features


def test_the_class_token_comes_first_and_is_not_standardised() -> None:
    given = some_inputs(grid=4)
    target = alignment_target(given, model(), stage(standardise_features=True))
    assert given.class_token is not None
    assert target.shape == (BATCH, 1 + 4, WIDTH) and torch.equal(target[:, 0], given.class_token)
    torch.testing.assert_close(target[:, 1:].mean(1), torch.zeros(BATCH, WIDTH), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [9, 12])
def test_grids_that_do_not_fit_are_named(tokens: int) -> None:
    sentence = f"the encoder's {tokens} tokens cannot be compared with the model's 2 x 2"
    with pytest.raises(ValueError, match=sentence):
        pooled_tokens(torch.zeros(1, tokens, 3), 2)
