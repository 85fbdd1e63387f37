"""The run's configuration: what it refuses, and what a resumed run may change."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from vfmvae.config import PerceptualConfig, TrainConfig, check_same_run, read_config
from vfmvae.recipes import demo
from vfmvae.serialization import to_json
from vfmvae.tokenizer import BottleneckConfig
from vfmvae.tokenizer.equivariance import EquivarianceConfig
from vfmvae.training.ema import EmaConfig
from vfmvae.training.engine import EngineConfig
from vfmvae.training.guard import SafetyConfig
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.rates import PartRate
from vfmvae.training.stages import LossWeights, StageConfig


def test_reading_a_written_config_gives_an_equal_one(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    config = replace(demo(), data="/images", seed=7, fused=True, dtype="bf16", steps=None)
    file.write_text(to_json(config))
    assert read_config(file) == config


def test_the_error_names_the_file_and_the_valid_fields(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"stages": [{"ema": {"momentum": 0.9}}]}')
    message = r"config\.json: unknown field 'momentum' in stages\[0\]\.ema; valid fields: half_life_images"
    with pytest.raises(ValueError, match=message):
        read_config(file)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "batch_size is 0; it must be at least 1"),
        ("steps", 0, "steps is 0; it must be at least 1"),
        ("log_every", 0, "log_every is 0; it must be at least 1"),
        ("evaluate_every", -1, "evaluate_every is -1; it must be at least 0"),
        ("checkpoint_every", -1, "checkpoint_every is -1; it must be at least 0"),
        ("keep_checkpoints", 0, "keep_checkpoints is 0; it must be at least 1"),
        ("workers", -1, "workers is -1; it must be at least 0"),
        ("seed", -1, "seed is -1; it must be at least 0"),
        ("stages", (), "stages is empty; a run needs at least one"),
        ("dtype", "fp8", "dtype is .fp8.; needed is one of auto, fp32, bf16, fp16"),
    ],
)
def test_bad_values_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TrainConfig(), **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("accumulate", 0),
        ("adaptive_every", 0),
        ("clip_norm", -1.0),
        ("compile", "on"),
        ("parallel", "tensor"),
    ],
)
def test_bad_engine_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"engine.{field} is "):
        EngineConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [{"explosion": 1.0}, {"explosion": -1.0}, {"max_skips": 0}, {"max_rollbacks": -1}]
)
def test_bad_safety_options_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"safety\."):
        SafetyConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_loss_weights_are_finite_and_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match=f"losses.kl is {value}"):
        LossWeights(kl=value)


def test_alignment_needs_the_last_layer() -> None:
    tokenizer = replace(demo().tokenizer, encoder=replace(demo().tokenizer.encoder, layers=(0, 1, 3)))
    with pytest.raises(ValueError, match=r"stage 'reconstruct': .*layers \(0, 1, 3\) lacks -1"):
        replace(demo(), tokenizer=tokenizer)
    parts = ("fusion", "bottleneck", "decompress", "style", "decoder")
    without = StageConfig(trains=parts, losses=LossWeights(alignment=0), equivariance=NONE)
    assert replace(demo(), tokenizer=tokenizer, stages=(without,)).stages == (without,)


NONE = EquivarianceConfig(latent_probability=0.0, image_probability=0.0)


def test_equivariance_scales_must_fit_the_resolution() -> None:
    wrong = EquivarianceConfig(latent_scales=(0.3,), latent_probability=1.0, image_probability=0.0)
    with pytest.raises(ValueError, match="stage 'odd': "):
        replace(demo(), stages=(StageConfig(name="odd", equivariance=wrong),))


def test_parts_and_their_rates_are_checked_in_every_stage() -> None:
    first, second = demo().stages
    for change, message in (
        ({"trains": ("fusion", "decoder>99", "align")}, "no decoder block lies above 99 px"),
        ({"rates": (PartRate("encoder", 0.1),)}, "rates has 'encoder', but encoder does not train"),
    ):
        with pytest.raises(ValueError, match=f"^stage 'sharpen': {message}"):
            replace(demo(), stages=(first, replace(second, **change)))


def test_float8_is_for_encoders_that_no_stage_trains() -> None:
    first, second = demo().stages
    engine = EngineConfig(fp8_encoder=True)
    assert replace(demo(), engine=engine).engine == engine
    trains = (first, replace(second, trains=("encoder", *second.trains)))
    with pytest.raises(ValueError, match="'sharpen' trains 'encoder', and engine.fp8_encoder is for frozen"):
        replace(demo(), stages=trains, engine=engine)
    with pytest.raises(ValueError, match="fp8_encoder keeps the whole encoder.*'fsdp' shards"):
        replace(engine, parallel="fsdp")


def test_shards_cannot_keep_gradients_apart() -> None:
    first, second = demo().stages
    stages = first, replace(second, trains=("encoder", *second.trains))
    engine = EngineConfig(parallel="fsdp", accumulate=2)
    with pytest.raises(
        ValueError, match="'sharpen' trains 'encoder', so losses.adaptive_alignment cannot be"
    ):
        replace(demo(), stages=stages, engine=engine)
    for fine in (replace(engine, accumulate=1), replace(engine, parallel="ddp")):
        assert replace(demo(), stages=stages, engine=fine).engine == fine
    assert replace(demo(), engine=engine).engine == engine
    adaptive = replace(second.losses, adaptive_adversarial=True)
    with pytest.raises(
        ValueError, match="'sharpen' has losses.adaptive_adversarial, which cannot be measured"
    ):
        replace(demo(), stages=(first, replace(second, losses=adaptive)), engine=engine)
    fixed = replace(second.losses, adaptive_alignment=False)
    stages = first, replace(stages[1], losses=fixed)
    assert replace(demo(), stages=stages, engine=engine).stages == stages


def test_a_resumed_run_may_change_how_it_trains() -> None:
    config = demo()
    moved = replace(config.tokenizer, encoder=replace(config.tokenizer.encoder, weights="/elsewhere"))
    first, second = config.stages
    slower = replace(first, optimizer=replace(first.optimizer, learning_rate=1e-5), images=99)
    slower = replace(slower, rates=(PartRate("decoder", 0.5),))
    other_losses = replace(second, losses=replace(second.losses, kl=0.0), ema=EmaConfig(half_life_images=0))
    changed = replace(
        config,
        tokenizer=moved,
        perceptual=PerceptualConfig(network="mini", weights="/elsewhere"),
        stages=(slower, other_losses),
        steps=9,
        device="cpu",
        fused=True,
        workers=3,
        dtype="bf16",
        engine=EngineConfig(accumulate=2, recompute=True),
    )
    check_same_run(changed, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 9}, "cannot change its batch_size from 8 to 9; start a new run instead"),
        ({"seed": 1}, "cannot change its seed from 0 to 1"),
        ({"data": "/images"}, "cannot change its data from None to /images"),
        ({"tokenizer": replace(demo().tokenizer, latent_channels=8)}, "cannot change its tokenizer; start"),
        ({"perceptual": PerceptualConfig()}, "cannot change its perceptual; start a new run"),
        ({"stages": demo().stages[:1]}, "its stages from reconstruct, sharpen to reconstruct; start a new"),
        ({"stages": demo().stages[::-1]}, "from reconstruct, sharpen to sharpen, reconstruct"),
    ],
)
def test_a_resumed_run_may_not_change_what_it_trains(changes: dict[str, object], message: str) -> None:
    earlier = replace(demo(), batch_size=8)
    with pytest.raises(ValueError, match=message):
        check_same_run(replace(earlier, **changes), earlier)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": ("fusion", "align")}, r"cannot change trains of its stage 'sharpen' from \('fusion',"),
        (
            {"optimizer": OptimizerConfig(kind="adamw", betas=(0.9, 0.99))},
            "optimizer.kind of its stage 'sharpen' from adam to adamw",
        ),
        (
            {"discriminator_optimizer": OptimizerConfig(betas=(0.3, 0.99))},
            r"discriminator_optimizer.betas of its stage 'sharpen' from \(0.0, 0.99\) to \(0.3, 0.99\)",
        ),
        (
            {"optimizer": OptimizerConfig(betas=(0.9, 0.999))},
            r"optimizer.betas of its stage 'sharpen' from \(0.9, 0.99\) to \(0.9, 0.999\)",
        ),
        (
            {"optimizer": OptimizerConfig(betas=(0.9, 0.99), implementation="apex")},
            "optimizer.implementation of its stage 'sharpen' from torch to apex",
        ),
    ],
)
def test_a_resumed_run_keeps_the_parts_and_moments_of_its_stages(
    changes: dict[str, object], message: str
) -> None:
    first, second = demo().stages
    with pytest.raises(ValueError, match=message):
        check_same_run(replace(demo(), stages=(first, replace(second, **changes))), demo())


def test_a_resumed_run_may_change_to_an_optimizer_with_the_same_state() -> None:
    triton = replace(demo().stages[0].optimizer, implementation="triton")
    changed = replace(demo(), stages=tuple(replace(stage, optimizer=triton) for stage in demo().stages))
    plain = replace(
        demo(), stages=tuple(replace(s, optimizer=demo().stages[0].optimizer) for s in demo().stages)
    )
    check_same_run(changed, plain)
    check_same_run(plain, changed)


def test_a_resumed_run_cannot_gain_or_lose_a_discriminator() -> None:
    first, second = demo().stages
    for losses, sentence in (
        (replace(second.losses, adversarial=0.0), "turn losses.adversarial off in its stage 'sharpen'"),
        (
            replace(second.losses, feature_matching=1.0),
            "turn losses.patch_adversarial and losses.feature_match",
        ),
        (replace(second.losses, preservation=1.0), "turn losses.preservation on"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_same_run(replace(demo(), stages=(first, replace(second, losses=losses))), demo())
    other = replace(second, losses=replace(second.losses, adversarial=0.2))
    check_same_run(replace(demo(), stages=(first, other)), demo())


def test_groups_of_another_size_than_the_whole_batchs_are_a_warning() -> None:
    def warnings(parts: int, adversarial: float = 1.0, images: int = 32) -> list[str]:
        stages = (replace(demo().stages[0], losses=LossWeights(adversarial=adversarial)),)
        engine = EngineConfig(accumulate=parts)
        return replace(demo(), batch_size=images, stages=stages, engine=engine).warnings()

    assert warnings(1) == warnings(2) == warnings(4) == warnings(8, adversarial=0.0) == []
    assert warnings(2, images=12) == [], "the whole batch has groups of 6 too"
    (warning,) = warnings(8)
    assert "over groups of 4 images, as 4 are computed at once, and not over 8" in warning


def test_what_trains_nothing_is_refused_or_said() -> None:
    gaussian, (first, second) = demo(), demo().stages
    with pytest.raises(
        ValueError, match="'sharpen' trains 'bottleneck' alone, and a Gaussian one has no param"
    ):
        alone = replace(second, trains=("bottleneck",), losses=LossWeights(alignment=0.0))
        replace(gaussian, stages=(first, alone))
    code = replace(first, losses=LossWeights(quantization=3.0, entropy=0.1), blur_sigma=2.0, blur_images=9)
    assert replace(gaussian, stages=(code,)).warnings() == [
        "stage 'reconstruct': losses.quantization is 3, and a gaussian bottleneck has none",
        "stage 'reconstruct': losses.entropy is 0.1, and a gaussian bottleneck has none",
        "stage 'reconstruct': blur_sigma is 2, and there is no discriminator to blur images for",
    ]
    discrete = replace(gaussian.tokenizer, bottleneck=BottleneckConfig(kind="discrete"))
    (warning,) = replace(
        gaussian, stages=(replace(first, losses=LossWeights(kl=1.0)),), tokenizer=discrete
    ).warnings()
    assert warning == "stage 'reconstruct': losses.kl is 1, and a discrete bottleneck has none"
    assert replace(gaussian, steps=2).warnings() == [
        "stage 'sharpen' gets no update: its 800 images are too few of --steps 2"
    ]
