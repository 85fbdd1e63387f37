"""Guidance: the combination by hand, how often a model is asked, and what with."""

from __future__ import annotations

import math

import pytest
import torch

from tests.diffusion.exact import GaussianModel
from vfmvae.diffusion.guidance import Guidance, guided_velocity

LABELS = torch.tensor([0, 1])


def evaluate(guidance: Guidance, t: float = 0.5, start: float | None = None, **more: object) -> tuple:
    """Velocities of x = 0, and the model that was asked."""
    model = GaussianModel(**more).eval()  # type: ignore[arg-type]
    width = model.config.class_token_width
    token = None if width is None else torch.zeros(2, width)
    velocity = guided_velocity(model, LABELS, 2, guidance)
    with torch.no_grad():
        return velocity(torch.zeros(2, 4, 2, 2), token, t, t if start is None else start), model


def of_classes() -> tuple[torch.Tensor, torch.Tensor]:
    """The velocities of the classes, and of the null class, at x = 0 and t = 0.5, [2, 4, 2, 2]."""
    slope = (0.5 - 0.5 * 0.25) / (0.25 * 0.25 + 0.25)
    conditional, null = (-0.5 * slope * m - m for m in (torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5])))
    return (v.double().view(2, 1, 1, 1).expand(2, 4, 2, 2) for v in (conditional, null))  # type: ignore[return-value]


def test_all_channels_are_guided() -> None:
    conditional, null = of_classes()
    found, _ = evaluate(Guidance(2.5))
    torch.testing.assert_close(found.latents, null + 2.5 * (conditional - null))


def test_the_other_channels_stay_conditional() -> None:
    conditional, null = of_classes()
    found, _ = evaluate(Guidance(2.5, channels=3))
    torch.testing.assert_close(found.latents[:, :3], (null + 2.5 * (conditional - null))[:, :3])
    torch.testing.assert_close(found.latents[:, 3:], conditional[:, 3:])


def test_the_class_token_has_a_scale_of_its_own() -> None:
    conditional, null = of_classes()
    for own, scale in ((None, 2.5), (1.5, 1.5), (1.0, 1.0)):
        found, _ = evaluate(Guidance(2.5, class_token_scale=own), class_token_width=4)
        # The model's class token is minus the class's mean, so velocities are minus the latents'.
        torch.testing.assert_close(found.class_token, -(null + scale * (conditional - null))[:, :, 0, 0])
        torch.testing.assert_close(found.latents, null + 2.5 * (conditional - null))


def test_a_class_token_alone_may_be_guided() -> None:
    found, model = evaluate(Guidance(1.0, class_token_scale=2.0), class_token_width=4)
    conditional, null = of_classes()
    torch.testing.assert_close(found.latents, conditional)
    torch.testing.assert_close(found.class_token, -(2 * conditional - null)[:, :, 0, 0])
    assert [rows for rows, _, _ in model.calls] == [4]


@pytest.mark.parametrize(
    ("interval", "start", "rows"),
    [
        ((0.0, 1.0), 1.0, 4),
        ((0.25, 0.75), 0.25, 4),
        ((0.25, 0.75), 0.75, 4),
        ((0.25, 0.75), 0.76, 2),
        ((0.25, 0.75), 0.24, 2),
        ((0.0, 0.3), 0.1 + 0.2, 4),  # 0.30000000000000004
    ],
)
def test_outside_of_the_closed_interval_the_null_class_is_not_computed(
    interval: tuple[float, float], start: float, rows: int
) -> None:
    # Where the step begins decides, not where the velocity is asked for.
    _, model = evaluate(Guidance(2.5, interval), t=0.5, start=start)
    assert [(call[0], call[2]) for call in model.calls] == [(rows, [0, 1, 2, 2][:rows])]


def test_scale_one_needs_no_second_pass() -> None:
    conditional, _ = of_classes()
    found, model = evaluate(Guidance(1.0))
    torch.testing.assert_close(found.latents, conditional)
    assert [rows for rows, _, _ in model.calls] == [2]


def test_a_second_model_takes_the_place_of_the_null_class() -> None:
    model, guide = GaussianModel().eval(), GaussianModel(means=(0.5, 0.5, 9.0)).eval()
    velocity = guided_velocity(model, LABELS, 2, Guidance(2.0, (0.0, 0.6)), guide)
    with torch.no_grad():
        found = velocity(torch.zeros(2, 4, 2, 2), None, 0.5, 0.5)
        velocity(torch.zeros(2, 4, 2, 2), None, 0.9, 0.9)
    conditional, other = of_classes()
    torch.testing.assert_close(found.latents, other + 2 * (conditional - other))
    assert model.calls == [(2, 0.5, [0, 1]), (2, 0.9, [0, 1])]
    assert guide.calls == [(2, 0.5, [0, 1])], "asked for the same classes, and inside of the interval only"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"interval": (0.8, 0.2)}, "guidance.interval is 0.8 to 0.2"),
        ({"interval": (-0.1, 0.5)}, "guidance.interval is -0.1 to 0.5"),
        ({"interval": (0.0, 1.5)}, "must rise and lie in"),
        ({"channels": 0}, "guidance.channels is 0"),
        ({"scale": math.nan}, "guidance.scale is"),
    ],
)
def test_values_that_guidance_cannot_have(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Guidance(**given)  # type: ignore[arg-type]
