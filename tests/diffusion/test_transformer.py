"""The transformer against the published ones: their stored outputs, and their form as the papers have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.diffusion import published_form as published
from vfmvae.convert.diffusion import convert
from vfmvae.deferred import without_parameters
from vfmvae.diffusion import SIZES, DiffusionTransformer, TransformerConfig
from vfmvae.diffusion.guidance import Guidance, guided_velocity

TINY = TransformerConfig(latent_size=4, channels=3, width=32, depth=3, heads=2, classes=5)
REPA = replace(TINY, alignment_depth=2, alignment_widths=(6, 7), projector_width=24)
REG = replace(REPA, qk_norm=True, class_token_width=9)
LIGHTNING = replace(TINY, norm="rms", swiglu=True, rope=True, qk_norm=True, published_time="data")
ALL = {"sit": replace(TINY, learn_sigma=True, patch=2), "repa": REPA, "reg": REG, "lightningdit": LIGHTNING}

# Published arguments of models that no stored output is of, by whose models they are.
SIT = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 3, "num_heads": 2}
SIT |= {"num_classes": 5}
HEADS = {"encoder_depth": 2, "z_dims": [6, 10], "projector_dim": 24}
LDIT = SIT | {"patch_size": 1, "input_size": 6, "use_rope": True}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "original SiT": ("sit", SIT | {"learn_sigma": True}),
    "SiT, patch 4, wider MLP": ("sit", SIT | {"learn_sigma": False, "patch_size": 4, "mlp_ratio": 6}),
    "REPA, two encoders": ("repa", SIT | HEADS),
    "REPA, q/k norm, head after the last block": (
        "repa",
        SIT | HEADS | {"qk_norm": True, "encoder_depth": 3},
    ),
    "REG, patch 2": ("reg", SIT | HEADS | {"qk_norm": True}),
    "REG without q/k norm": ("reg", SIT | HEADS | {"patch_size": 1, "input_size": 3}),
    "LightningDiT, LayerNorm with q/k norm": (
        "lightningdit",
        LDIT | {"use_qknorm": True, "use_swiglu": True},
    ),
    "LightningDiT, no shift": (
        "lightningdit",
        LDIT | {"wo_shift": True, "use_rmsnorm": True, "use_swiglu": True},
    ),
    "LightningDiT, no rotation": ("lightningdit", LDIT | {"use_rope": False, "use_rmsnorm": True}),
    "LightningDiT, GELU, patch 2": (
        "lightningdit",
        LDIT | {"use_rmsnorm": True, "use_qknorm": True, "patch_size": 2},
    ),
    "LightningDiT, LayerNorm, GELU, no shift": (
        "lightningdit",
        LDIT | {"wo_shift": True, "learn_sigma": True},
    ),
}


def randomised(config: TransformerConfig, fused: bool = False, seed: int = 1) -> DiffusionTransformer:
    """Every parameter drawn anew: nothing is zero, as much of a fresh model is."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(config, fused=fused)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim < 2 else 1 / parameter[0].numel() ** 0.5
            parameter.add_(torch.randn(parameter.shape) * spread)
    return model


def inputs(config: TransformerConfig, batch: int = 2) -> tuple[Tensor, ...]:
    """Noisy latents, times, labels (the null class last), and a class token where the model has one."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, config.channels, config.latent_size, config.latent_size, generator=generator)
    t, y = torch.linspace(0.1, 0.9, batch), torch.arange(config.classes + 1)[-batch:]
    if config.class_token_width is None:
        return x, t, y
    return x, t, y, torch.randn(batch, config.class_token_width, generator=generator)


def outputs(model: DiffusionTransformer, given: tuple[Tensor, ...]) -> list[Tensor]:
    out = model(*given)
    return [out.velocity, *([] if out.class_velocity is None else [out.class_velocity]), *out.projected]


def _fixture(parity_dir: Path, name: str, source: Any) -> tuple[DiffusionTransformer, dict[str, Tensor]]:
    folder = parity_dir / name
    arguments = json.loads((folder / "config.json").read_text())
    model = convert(source, load_file(folder / "model.safetensors"), arguments)
    return model, load_file(folder / "io.safetensors")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["repa_sit", "reg_sit", "lightningdit"])
@torch.no_grad()
def test_outputs_equal_those_of_the_published_implementation(
    parity_dir: Path, name: str, fused: bool
) -> None:
    model, io = _fixture(parity_dir, name, {"repa_sit": "repa", "reg_sit": "reg"}.get(name, name))
    model.fused = fused
    # LightningDiT's t = 1 is data, and its velocity leads there.
    t, sign = (1 - io["t"], -1) if name == "lightningdit" else (io["t"], 1)
    out = model(io["x"], t, io["y"], io.get("cls_token"))
    torch.testing.assert_close(sign * out.velocity, io["velocity"], atol=2e-5, rtol=0)
    assert (out.class_velocity is None) == ("cls_velocity" not in io)
    if out.class_velocity is not None:
        torch.testing.assert_close(out.class_velocity, io["cls_velocity"], atol=2e-5, rtol=0)
    for number, projected in enumerate(out.projected):
        expected = io[f"projected_{number}"]
        torch.testing.assert_close(projected, expected, atol=projected_limit(expected), rtol=0)


def projected_limit(published: Tensor) -> float:
    """What rounding may make of projected tokens, which reach 45.

    The published numbers are 6e-5 from those of float64 themselves. The same operations in the same order
    come within 2e-5 of them on an AMD EPYC, and within 8e-5 where the library of matrix products sums in
    another order (Intel Xeon).
    """
    return 2e-6 * published.abs().max().item()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """With one, torch sums 1 x 1 convolutions in another order than the published numbers have."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@torch.no_grad()
def test_lightningdits_guided_velocity_on_three_channels(parity_dir: Path) -> None:
    model, io = _fixture(parity_dir, "lightningdit", "lightningdit")
    # The same latents twice, at t = 0.5: with their classes, and with the null class.
    x, y, (published_guided, published_other) = io["cfg_x"][:3], io["cfg_y"], io["cfg_velocity"].chunk(2)
    assert torch.equal(x, io["cfg_x"][3:]) and io["cfg_t"].eq(0.5).all()
    assert y[3:].eq(model.config.classes).all()
    guidance = Guidance(scale=3.0, channels=3)
    guided = -guided_velocity(model, y[:3], model.config.classes, guidance)(x, None, 0.5, 0.5).latents
    # Three times one velocity less twice another, each within 2e-5.
    torch.testing.assert_close(guided.float(), published_guided, atol=5 * 2e-5, rtol=0)
    other = -model(x, torch.full((3,), 0.5), y[3:]).velocity
    torch.testing.assert_close(other[:, 3:], published_other[:, 3:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_options_without_stored_outputs_equal_the_published_form(name: str) -> None:
    source, arguments = PUBLISHED[name]
    state = published.random_state(arguments, class_token=7 if source == "reg" else None)
    model = convert(source, state, arguments).double()
    model.fused = False
    state |= _exact_tables(model)
    x, t, y, *token = (v.double() if v.is_floating_point() else v for v in inputs(model.config, 3))
    data = model.config.published_time == "data"
    expected = published.forward(state, arguments, x, 1 - t if data else t, y, *token)
    sign = -1 if data else 1
    out = model(x, t, y, *token)
    close = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(sign * out.velocity, expected.velocity, **close)
    if token:
        torch.testing.assert_close(out.class_velocity, expected.class_velocity, **close)
    assert len(out.projected) == len(arguments.get("z_dims", ()))
    for ours, theirs in zip(out.projected, expected.projected, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    grid = model.config.grid**2
    for ours, theirs in zip(model.features(x, t, y, *token), expected.blocks, strict=True):
        torch.testing.assert_close(ours, theirs[:, -grid:], **close)


def _exact_tables(model: DiffusionTransformer) -> dict[str, Tensor]:
    """Give the model the published form's tables in float64; its own are those rounded to float32."""
    config = model.config
    exact = {"positions": published.positions(config.width, config.grid)}
    if config.class_token_width is not None:
        exact["positions"] = torch.cat([torch.zeros(1, config.width), exact["positions"]])
    if config.rope:
        angles = published.rotations(config.width // config.heads, config.grid).repeat_interleave(2, dim=1)
        exact |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    for name, table in exact.items():
        torch.testing.assert_close(getattr(model, name), table, atol=6e-8, rtol=0)
        setattr(model, name, table)
    return {"pos_embed": exact["positions"][None]}


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@torch.no_grad()
def test_a_fresh_model_has_zero_velocity(config: TransformerConfig) -> None:
    out = DiffusionTransformer(config)(*inputs(config))
    assert out.velocity.eq(0).all()
    assert out.class_velocity is None or out.class_velocity.eq(0).all()
    assert all(projected.abs().mean() > 0.01 for projected in out.projected)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_fused_equals_plain_with_gradients(config: TransformerConfig) -> None:
    results = []
    for fused in (False, True):
        model = randomised(config, fused)
        found = outputs(model, inputs(config))
        torch.stack([tensor.square().mean() for tensor in found]).sum().backward()
        results.append((found, [p.grad for p in model.parameters()]))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_every_parameter_learns(config: TransformerConfig) -> None:
    config = replace(config, depth=2)
    model = randomised(config, fused=True)
    torch.stack([o.square().mean() for o in outputs(model, inputs(config, batch=6))]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    if config.learn_sigma:  # but for the channels that stand for the variance
        rows = model.final_layer.linear.weight.grad.unflatten(0, (-1, 2 * config.channels))
        assert rows[:, config.channels :].eq(0).all() and rows[:, : config.channels].ne(0).any()


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@torch.no_grad()
def test_bfloat16_computation_is_close_and_leaves_parameters(config: TransformerConfig) -> None:
    model, given = randomised(config), inputs(config)
    exact = outputs(model, given)
    model.compute_dtype = torch.bfloat16
    assert model.dtype == torch.bfloat16
    for rough, fine in zip(outputs(model, given), exact, strict=True):
        assert rough.dtype == torch.bfloat16
        assert (rough.float() - fine).norm() < 0.05 * fine.norm()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("config", [REPA, REG], ids=["repa", "reg"])
def test_project_is_the_head_of_forward(config: TransformerConfig) -> None:
    model, given = randomised(config), inputs(config)
    projected = model.project(*given)
    expected = model(*given).projected
    assert [tuple(p.shape) for p in projected] == [(2, config.tokens, 6), (2, config.tokens, 7)]
    for ours, theirs in zip(projected, expected, strict=True):
        assert torch.equal(ours, theirs)
    sum(p.sum() for p in projected).backward()
    reached = [block.attn.qkv.weight.grad is not None for block in model.blocks]
    assert reached == [True, True, False]


@torch.no_grad()
def test_the_convolution_head_looks_at_neighbours() -> None:
    config = replace(REPA, projector="conv", alignment_widths=(6,))
    model, given = randomised(config), inputs(config)
    tokens = model.features(*given)[config.alignment_depth - 1]
    weight, bias = model.projectors[0].conv.weight, model.projectors[0].conv.bias
    padded = torch.nn.functional.pad(tokens.unflatten(1, (4, 4)), (0, 0, 1, 1, 1, 1))
    expected = bias + sum(
        padded[:, i : i + 4, j : j + 4] @ weight[:, :, i, j].T for i in range(3) for j in range(3)
    )
    torch.testing.assert_close(model(*given).projected[0], expected.flatten(1, 2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_published_direction_of_time_is_turned_around() -> None:
    ours = randomised(replace(LIGHTNING, published_time="noise"))
    theirs = randomised(LIGHTNING)
    x, t, y = inputs(LIGHTNING)
    assert torch.equal(theirs(x, t, y).velocity, -ours(x, 1 - t, y).velocity)


@torch.no_grad()
def test_labels_and_times_matter() -> None:
    model = randomised(TINY)
    x, t, y = inputs(TINY)
    out = model(x, t, y).velocity
    assert not torch.allclose(out, model(x, t, y.flip(0)).velocity, atol=1e-3)
    assert not torch.allclose(out, model(x, t + 0.05, y).velocity, atol=1e-4)


def test_wrong_inputs_are_named() -> None:
    model = DiffusionTransformer(REG)
    x, t, y, token = inputs(REG)
    for arguments, message in (
        ((x[:, :2], t, y, token), r"x is \[2, 2, 4, 4\]; this model needs \[2, 3, 4, 4\]"),
        ((x[..., :3], t, y, token), r"x is \[2, 3, 4, 3\]"),
        ((x, t[:1], y, token), r"t is \[1\]; this model needs \[2\]"),
        ((x, t, y[:, None], token), r"y is \[2, 1\]; this model needs \[2\]"),
        ((x, t, y, token[:, 1:]), r"class_token is \[2, 8\]; this model needs \[2, 9\]"),
        ((x, t, y), "class_token is missing"),
    ):
        for method in (model, model.project, model.features):
            with pytest.raises(ValueError, match=message):
                method(*arguments)
    with pytest.raises(ValueError, match="class_token is given, and this model has none"):
        DiffusionTransformer(TINY)(x, t, y, token)


@pytest.mark.parametrize(("size", "millions"), [("XL", 675), ("L", 458), ("B", 130)])
def test_the_published_sizes_have_the_published_numbers_of_parameters(size: str, millions: int) -> None:
    with without_parameters():
        model = DiffusionTransformer(TransformerConfig(channels=4, latent_size=32, patch=2, **SIZES[size]))
    assert all(parameter.is_meta for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.01)


def test_lightningdit_is_as_large() -> None:
    options = {"norm": "rms", "swiglu": True, "rope": True}
    with torch.device("meta"):
        model = DiffusionTransformer(TransformerConfig(**SIZES["XL"], **options))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(675e6, rel=0.01)


@pytest.mark.parametrize(
    ("config", "fused"),
    [(REG, True), (LIGHTNING, True), (LIGHTNING, False)],
    ids=["reg", "lightningdit", "lightningdit, plain"],
)
def test_compiles_to_one_graph(config: TransformerConfig, fused: bool) -> None:
    model, given = randomised(replace(config, depth=2), fused), inputs(config)
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(*given)
    expected = model(*given)
    for ours, theirs in zip(
        [found.velocity, *found.projected], [expected.velocity, *expected.projected], strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_latents_are_normalised_by_the_models_statistics() -> None:
    model = DiffusionTransformer(TINY)
    latents = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.normalise(latents), latents)
    model.latents_mean.copy_(torch.tensor([1.0, 0.0, -2.0]))
    model.latents_std.copy_(torch.tensor([2.0, 1.0, 0.5]))
    normal = model.normalise(latents)
    torch.testing.assert_close(normal[:, 0], (latents[:, 0] - 1) / 2)
    torch.testing.assert_close(normal[:, 2], (latents[:, 2] + 2) * 2)
    torch.testing.assert_close(model.denormalise(normal), latents)


def test_matrices_cast_once_give_what_matrices_cast_in_every_forward_give() -> None:
    """Bit for bit; vectors stay in float32."""
    torch.manual_seed(0)
    model = DiffusionTransformer(
        TransformerConfig(latent_size=4, channels=4, width=16, depth=2, heads=2, classes=3)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.compute_dtype = torch.bfloat16
    given = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    before = model(*given).velocity
    model.cast_weights()
    assert {p.dtype for p in model.parameters() if p.ndim == 1} == {torch.float32}
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert torch.equal(model(*given).velocity, before) and before.any()
