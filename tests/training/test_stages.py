"""Stages in images become updates, and schedules say which losses are on."""

from __future__ import annotations

import pytest

from tests.tiny_runs import stage
from vfmvae.training.stages import LossWeights, Place, StageConfig, StagePlan, TermSchedule

ADAPTIVE = LossWeights(adversarial=1.0, adaptive_adversarial=True)


def stages(*images: int) -> tuple[StageConfig, ...]:
    return tuple(stage(name=str(number), images=each) for number, each in enumerate(images))


def test_a_stage_takes_as_many_updates_as_its_images_need() -> None:
    plan = StagePlan(stages(100, 7, 16), batch_size=8)
    assert plan.lengths == [13, 1, 2]
    assert plan.steps == 16


@pytest.mark.parametrize(
    ("steps", "lengths"), [(4, [1, 2, 1]), (10, [2, 6, 2]), (3, [1, 1, 1]), (1000, [200, 600, 200])]
)
def test_given_steps_are_shared_in_proportion(steps: int, lengths: list[int]) -> None:
    plan = StagePlan(stages(20, 60, 20), batch_size=8, steps=steps)
    assert plan.lengths == lengths
    assert plan.steps == steps


def test_a_stage_too_short_for_an_update_is_passed_over() -> None:
    plan = StagePlan(stages(1, 99), batch_size=1, steps=10)
    assert plan.lengths == [0, 10]
    assert plan.locate(0) == Place(1, 0)


def test_every_update_has_its_place() -> None:
    plan = StagePlan(stages(16, 8, 24), batch_size=8)
    places = [plan.locate(step) for step in range(plan.steps)]
    assert places == [Place(0, 0), Place(0, 1), Place(1, 0), Place(2, 0), Place(2, 1), Place(2, 2)]
    assert [plan.progress(place) for place in places[:3]] == [0.25, 0.75, 0.5]
    with pytest.raises(ValueError, match="step 6 lies beyond the 6 of this run"):
        plan.locate(6)


def test_schedules_keep_their_share_of_a_shortened_stage() -> None:
    whole, short = StagePlan(stages(800), 8), StagePlan(stages(800), 8, steps=4)
    assert [whole.stage_images(Place(0, step)) for step in (0, 1, 50)] == [0, 8, 400]
    assert [short.stage_images(Place(0, step)) for step in range(4)] == [0, 200, 400, 600]


def test_terms_are_on_when_their_schedule_says_so() -> None:
    schedules = (
        TermSchedule(term="adversarial", start=100, ramp=100),
        TermSchedule(term="l1", end=150),
    )
    losses = LossWeights(l1=2.0, multiscale_l1=0.0, kl=0.0, alignment=3.0, quantization=0.0, adversarial=4.0)
    config = stage(losses, schedules=schedules)
    assert config.weights(0) == {"l1": 2.0, "alignment": 3.0}
    assert config.weights(125) == {"l1": 2.0, "alignment": 3.0, "adversarial": 1.0}
    assert config.weights(150) == {"alignment": 3.0, "adversarial": 2.0}
    assert config.weights(10_000) == {"alignment": 3.0, "adversarial": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "a stage needs a name"),
        ({"images": 0}, "stage 'train': images is 0; it must be at least 1"),
        ({"trains": ()}, "stage 'train' trains nothing"),
        ({"losses": LossWeights(alignment=0.0)}, "trains 'align', which only losses.alignment reads"),
        (
            {"trains": ("align", "decoder")},
            "stage 'train' does not train 'fusion', so losses.adaptive_alignment has no gradient",
        ),
        (
            {"trains": ("fusion", "align", "style"), "losses": ADAPTIVE},
            "stage 'train' does not train the decoder's last block, so losses.adaptive_adversarial has no",
        ),
        ({"blur_sigma": -1.0}, "blur_sigma -1.0 and blur_images 0 must not be negative"),
    ],
)
def test_bad_stages_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**changes)  # type: ignore[arg-type]


def test_losses_that_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no loss asks for a reconstruction; give one of losses\.\{l1,l2,"):
        LossWeights(l1=0, multiscale_l1=0)
    assert LossWeights(l1=0, multiscale_l1=0, adversarial=1.0, alignment=0.0).adversarial == 1.0
    with pytest.raises(ValueError, match="adaptive_alignment compares with the image losses; give one of"):
        LossWeights(l1=0, multiscale_l1=0, adversarial=1.0)
    with pytest.raises(ValueError, match="adaptive_adversarial balances losses.adversarial and losses.patch"):
        LossWeights(adaptive_adversarial=True, feature_matching=1.0)
    message = r"adaptive_adversarial compares with the image losses; give one of losses.\{l1,l2,perceptual,"
    with pytest.raises(ValueError, match=message):
        LossWeights(adaptive_adversarial=True, adversarial=1.0, l1=0.0)
    with pytest.raises(ValueError, match="losses.r1 is 0.5, which penalises the discriminator of losses.adv"):
        LossWeights(r1=0.5)
    with pytest.raises(ValueError, match="names the loss 'l3', which does not exist; known: l1, l2, "):
        TermSchedule(term="l3")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blur_sigma": 5.0}, "blur_images 0, so nothing would be blurred"),
        (
            {"losses": LossWeights(), "schedules": (TermSchedule(term="adversarial", start=5),)},
            "schedule for losses.adversarial, whose weight is 0",
        ),
        (
            {"images": 100, "schedules": (TermSchedule(term="l1", start=500),)},
            "losses.l1 starts after 500 images, and the stage has 100",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        stage(**changes)
