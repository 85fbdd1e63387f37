"""`vfmvae.sample`: published trajectories, closed forms, and that a batch changes no sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

import vfmvae
from tests.diffusion.exact import GaussianModel, gaussian_solution
from tests.helpers import run_python
from vfmvae.diffusion import DiffusionTransformer, TransformerConfig
from vfmvae.diffusion.flow import shifted
from vfmvae.diffusion.guidance import Guidance
from vfmvae.diffusion.sampling import Sampler, Sampling, as_trained, run, sample, sample_noise

SAMPLERS: list[Sampler] = ["euler", "heun", "dopri5", "sde"]
SHAPE = (4, 2, 2)
TINY = TransformerConfig(latent_size=4, channels=4, width=32, depth=2, heads=4, classes=5)


def transformer(seed: int = 0, **options: object) -> DiffusionTransformer:
    """Random weights everywhere: a fresh model is zero at its end."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(TransformerConfig(**{**vars(TINY), **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def published(request: pytest.FixtureRequest) -> tuple[DiffusionTransformer, dict[str, Tensor], int, int]:
    """A published SiT of random weights, its trajectories, the steps they took and its null class."""
    folder: Path = request.getfixturevalue("parity_dir") / "samplers"
    theirs = json.loads((folder / "config.json").read_text())
    config = TransformerConfig(
        latent_size=theirs["input_size"],
        channels=theirs["in_channels"],
        patch=theirs["patch_size"],
        width=theirs["hidden_size"],
        depth=theirs["depth"],
        heads=theirs["num_heads"],
        classes=theirs["num_classes"],
        qk_norm=theirs["qk_norm"],
        alignment_depth=theirs["encoder_depth"],
        alignment_widths=tuple(theirs["z_dims"]),
        projector_width=theirs["projector_dim"],
    )
    model = DiffusionTransformer(config)
    state = load_file(folder / "model.safetensors")
    state.pop("pos_embed")
    statistics = {name: buffer for name, buffer in model.named_buffers() if name.startswith("latents_")}
    model.load_state_dict(state | statistics)
    return model, load_file(folder / "io.safetensors"), theirs["num_steps"], theirs["null_class"]


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize(
    ("guidance", "interval"), [(1.0, (0.0, 1.0)), (2.5, (0.0, 1.0)), (2.5, (0.25, 0.75))]
)
def test_published_trajectories(
    published: tuple[DiffusionTransformer, dict[str, Tensor], int, int],
    method: Literal["euler", "heun"],
    guidance: float,
    interval: tuple[float, float],
) -> None:
    model, io, steps, null = published
    truth = io[f"ode_{method}_cfg{guidance}_lo{interval[0]}_hi{interval[1]}"]
    found = vfmvae.sample(model, io["latents"], io["y"], method, steps, guidance, interval, null)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, truth, atol=2e-5, rtol=0)
    assert found.equal(sample(model, io["latents"], io["y"], method, steps, guidance, interval))


def test_both_directions_of_time_give_the_same_sample() -> None:
    """A model whose t = 1 is data: it is asked at 1 - t, and its velocity turned around."""
    ours, theirs = transformer(), transformer(published_time="data")
    theirs.load_state_dict(ours.state_dict())
    noise, labels = sample_noise(0, range(2), (4, 4, 4)), torch.tensor([1, 3])

    # The same field in the other time: u(x, s) = -v(x, 1 - s), integrated from s = 0 up to 1.
    with torch.no_grad():
        x = noise.double()
        for step in range(20):
            s = torch.full((2,), step / 20)
            x = x + ours(x.float(), s, labels).velocity.double() / 20
    found = sample(theirs, noise, labels, steps=20)
    torch.testing.assert_close(found, x.float(), atol=1e-5, rtol=0)
    assert (found - noise).abs().max() > 0.1, "the velocity is not zero"


@pytest.mark.parametrize(("sampler", "tolerance"), [("heun", 1e-3), ("dopri5", 0.04)])
def test_the_ode_ends_where_theory_says(sampler: Sampler, tolerance: float) -> None:
    if sampler == "dopri5":
        pytest.importorskip("torchdiffeq")
    model, labels = GaussianModel().eval(), torch.tensor([0, 1, 0])
    noise = sample_noise(1, range(3), SHAPE)
    mean = torch.tensor([2.0, -1.0, 2.0]).view(3, 1, 1, 1)
    found = sample(model, noise, labels, sampler)
    torch.testing.assert_close(found, gaussian_solution(noise, mean, 0.5), atol=tolerance, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("with_token", [False, True])
def test_a_batch_changes_no_sample(sampler: Sampler, with_token: bool) -> None:
    if sampler == "dopri5":
        pytest.importorskip("torchdiffeq")
    model = transformer(class_token_width=6 if with_token else None)
    labels = torch.arange(5) % 4
    settings = Sampling(sampler, steps=6, guidance=Guidance(1.5, (0.1, 0.8)))

    def drawn(numbers: range) -> list[Tensor]:
        noise = sample_noise(7, numbers, (4, 4, 4))
        made = run(settings, model, noise, labels[numbers.start : numbers.stop], seed=7, numbers=numbers)
        return [part for part in made if part is not None]

    whole = drawn(range(5))
    assert len(whole) == 1 + with_token
    for size in (1, 2):
        parts = [drawn(range(first, min(first + size, 5))) for first in range(0, 5, size)]
        for number, part in enumerate(whole):
            pieces = torch.cat([piece[number] for piece in parts])
            torch.testing.assert_close(pieces, part, atol=1e-5, rtol=0)
    assert not torch.allclose(whole[0][0], whole[0][4], atol=0.1), "of one class, and yet not the same"


def test_noise_depends_on_seed_number_and_draw_alone() -> None:
    whole = sample_noise(3, range(5), (2, 3))
    assert whole.dtype == torch.float32 and whole[3:].equal(sample_noise(3, [3, 4], (2, 3)))
    assert whole[[4, 0]].equal(sample_noise(3, [4, 0], (2, 3)))
    others = [sample_noise(4, range(5), (2, 3)), sample_noise(3, range(5), (2, 3), draw=1)]
    assert not any(np.intersect1d(whole, other).size for other in others)
    assert not np.intersect1d(whole, sample_noise(3, range(5, 10), (2, 3))).size
    many = sample_noise(2**63 + 11, range(2000), (10,)).flatten()
    assert stats.kstest(many, "norm").pvalue > 0.01
    with pytest.raises(ValueError, match="negative"):
        sample_noise(-1, range(2), (1,))


def test_the_sde_follows_its_seed_and_the_marginal() -> None:
    model, count = GaussianModel().eval(), 500
    noise, labels = sample_noise(0, range(count), SHAPE), torch.zeros(count, dtype=torch.int64)
    found = sample(model, noise, labels, "sde", steps=100, seed=5)
    assert found.mean().item() == pytest.approx(2.0, abs=0.02)
    assert found.std().item() == pytest.approx(0.5, rel=0.05)
    few = (noise[:2], labels[:2], "sde", 100)
    assert sample(model, *few, seed=5).equal(found[:2])
    assert not torch.allclose(sample(model, *few, seed=6), found[:2], atol=0.01)


def test_a_class_token_is_made_along() -> None:
    model = GaussianModel(class_token_width=3).eval()
    noise, token_noise = sample_noise(0, range(2), SHAPE), torch.tensor([[0.5] * 3, [-1.0] * 3])
    made = run(Sampling("heun"), model, noise, torch.tensor([0, 1]), class_token_noise=token_noise)
    assert made.class_token is not None
    means = torch.tensor([[-2.0], [1.0]])  # of this model's class tokens
    torch.testing.assert_close(
        made.class_token, gaussian_solution(token_noise, means, 0.5), atol=1e-3, rtol=0
    )
    assert made.latents.equal(
        sample(model, noise, torch.tensor([0, 1]), "heun", class_token_noise=token_noise)
    )


def test_guided_steps_cost_a_batch_of_two_and_others_one() -> None:
    model = GaussianModel().eval()
    noise, labels = torch.zeros(3, *SHAPE), torch.tensor([0, 1, 0])
    sample(model, noise, labels, "heun", 4, 2.0, (0.5, 0.75))
    # Steps from 1, 0.75, 0.5, 0.25; both evaluations of a step are guided or not, the last has one.
    assert [(rows, t) for rows, t, _ in model.calls] == [
        *((3, 1.0), (3, 0.75)),
        *((6, 0.75), (6, 0.5)),
        *((6, 0.5), (6, 0.25)),
        (3, 0.25),
    ]
    assert model.calls[2][2] == [0, 1, 0, 2, 2, 2]
    model.calls.clear()
    sample(model, noise, labels, "sde", 4, 2.0, null_label=1)
    assert [rows for rows, _, _ in model.calls] == [6] * 4 and model.calls[0][2][3:] == [1, 1, 1]


def test_autoguidance_and_guided_channels_reach_the_model() -> None:
    model, guide = GaussianModel().eval(), GaussianModel(means=(0.5, 0.5, 9.0)).eval()
    null_is_the_same = GaussianModel(means=(2.0, -1.0, 0.5)).eval()
    noise, labels = sample_noise(0, range(2), SHAPE), torch.tensor([0, 1])
    found = sample(model, noise, labels, "euler", 10, 1.5, guide=guide, guidance_channels=3)
    expected = sample(null_is_the_same, noise, labels, "euler", 10, 1.5, guidance_channels=3)
    torch.testing.assert_close(found, expected)
    unguided = sample(model, noise, labels, "euler", 10)
    assert found[:, 3:].equal(unguided[:, 3:]) and not torch.allclose(found[:, :3], unguided[:, :3])


def test_a_shift_moves_the_steps() -> None:
    model = GaussianModel().eval()
    sample(model, torch.zeros(1, *SHAPE), torch.tensor([0]), "euler", 2, shift=3.0)
    assert [t for _, t, _ in model.calls] == pytest.approx([1.0, 0.75])


def test_the_model_is_left_as_it_was() -> None:
    model = GaussianModel().train()
    model.part.eval()
    sample(model, torch.zeros(1, *SHAPE), torch.tensor([0]), steps=1)
    assert model.training and not model.part.training
    with pytest.raises(AttributeError):
        sample(model, torch.zeros(1, *SHAPE), torch.tensor([0]), steps=1, guide=object())  # type: ignore
    assert model.training


def test_a_model_of_sixteen_bits_gets_sixteen_bits() -> None:
    model = transformer()
    exact = sample(model, noise := sample_noise(0, [0], (4, 4, 4)), torch.tensor([0]), steps=4)
    model.compute_dtype = torch.bfloat16
    found = sample(model, noise, torch.tensor([0]), steps=4)
    assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 0}, "sampling.steps is 0"),
        ({"sampler": "ddim"}, "sampling.sampler is .*euler, heun, dopri5, sde"),
        ({"shift": 0.0}, "sampling.shift is 0.0"),
        ({"sampler": "dopri5", "shift": 2.0}, "chooses its own times"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance.interval is 0.9 to 0.1"),
        ({"guidance_channels": 5}, "the latents have 4 channels"),
        ({"class_token_guidance": 2.0}, "has no class token"),
        ({"class_token_noise": torch.zeros(2, 3)}, "has no class token"),
        (
            {"labels": torch.tensor([0, 3])},
            "label 3 does not exist; this model has 0 to 1, and 2 is its null",
        ),
        ({"labels": torch.tensor([-1, 0])}, "label -1"),
        ({"labels": torch.tensor([0.0, 1.0])}, "whole numbers"),
        ({"null_label": 7}, "label 7"),
        ({"labels": torch.tensor([0])}, "do not fit"),
        ({"numbers": [1]}, "do not fit"),
        ({"guide": GaussianModel(class_token_width=2)}, "the guide has"),
        ({"guide": GaussianModel(means=(0.0, 0.0))}, "the guide has 1 classes"),
    ],
)
def test_mistakes_are_named(given: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"noise": torch.zeros(2, *SHAPE), "labels": torch.tensor([0, 1]), **given}
    with pytest.raises(ValueError, match=words):
        sample(GaussianModel(), **arguments)  # type: ignore[arg-type]


def test_the_function_is_called_before_and_after_its_namesake_is_imported() -> None:
    program = (
        "import torch, vfmvae; from tests.diffusion.exact import GaussianModel;"
        "arguments = (GaussianModel(), torch.ones(1, 4, 2, 2), torch.tensor([0]), 'heun', 4);"
        "before = vfmvae.sample(*arguments); import vfmvae.sample;"
        "assert vfmvae.sample.__name__ == 'vfmvae.sample'; print(vfmvae.sample(*arguments).equal(before))"
    )
    assert run_python("-c", program).strip() == "True"


def test_shifts_of_training_and_of_sampling_multiply() -> None:
    """Shifting by one and then by the other is shifting by their product."""
    once, twice = Sampling(shift=2.0), as_trained(Sampling(shift=2.0), 3.0)
    t = torch.linspace(0, 1, 5)
    torch.testing.assert_close(shifted(t, twice.shift), shifted(shifted(t, 3.0), once.shift))
    assert as_trained(Sampling("dopri5"), 3.0) == Sampling("dopri5"), "which chooses its own times"
