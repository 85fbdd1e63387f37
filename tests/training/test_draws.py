"""Random numbers as a function of (seed, step, stream, call, image): slices of one whole, never twice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vfmvae.ops.noise import seeded_normal
from vfmvae.training.draws import StepDraws

DEVICES = [
    torch.device("cpu"),
    pytest.param(torch.device("cuda"), marks=pytest.mark.gpu),
]
CPU = torch.device("cpu")


def step_draws(
    seed: int = 3,
    step: int = 5,
    stream: int = 0,
    first: int = 0,
    count: int = 8,
    device: torch.device = CPU,
) -> StepDraws:
    return StepDraws(seed, step, device, first, count, total=8, stream=stream)


def all_kinds(draws: StepDraws) -> list[Tensor]:
    return [draws.normal((4, 2)), draws.uniform((3,)), torch.tensor(draws.decisions(5)), draws.normal(())]


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_batch_are_slices_of_the_whole(device: torch.device) -> None:
    whole = all_kinds(step_draws(device=device))
    parts = [all_kinds(step_draws(first=f, count=c, device=device)) for f, c in ((0, 2), (2, 5), (7, 1))]
    for kind in (0, 1, 3):
        assert whole[kind].shape[0] == 8 and whole[kind].device.type == device.type
        torch.testing.assert_close(torch.cat([part[kind] for part in parts]), whole[kind], rtol=0, atol=0)
    for part in parts:
        torch.testing.assert_close(part[2], whole[2], rtol=0, atol=0)  # shared by all


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_place_gives_the_same_numbers_whatever_was_drawn_elsewhere(device: torch.device) -> None:
    draws = step_draws(device=device)
    draws.uniform((100,))  # another size in the call before
    torch.rand(3, device=device)
    second = draws.normal((2,))
    other = step_draws(device=device)
    other.normal(())
    torch.testing.assert_close(other.normal((2,)), second, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_global_generator_is_left_alone(device: torch.device) -> None:
    torch.manual_seed(1)
    expected = torch.rand(4, device=device)
    torch.manual_seed(1)
    all_kinds(step_draws(device=device))
    torch.testing.assert_close(torch.rand(4, device=device), expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_repeats_across_seeds_steps_streams_and_calls(device: torch.device) -> None:
    firsts: list[float] = []
    # 2^32 apart is where a generator that keeps 32 bits of its seed would repeat itself.
    for seed in (0, 1, 2**32, 2**32 + 1, 2**63):
        for step in (0, 1, 2, 2**32):
            for stream in (0, 1):
                draws = step_draws(seed, step, stream, device=device)
                firsts += [draws.normal((1,)).double()[0].item() for _ in range(3)]
    assert len(set(firsts)) == len(firsts) == 5 * 4 * 2 * 3
    values = torch.cat([step_draws(step=s, device=device).normal((4,)).flatten() for s in range(200)])
    assert values.unique().numel() > 0.999 * values.numel()


def test_seeds_and_steps_do_not_stand_in_for_each_other() -> None:
    pairs = [(0, 1), (1, 0), (0, 1_000_003), (1, 1_000_002)]
    numbers = {step_draws(seed, step).decisions(1)[0] for seed, step in pairs}
    assert len(numbers) == len(pairs)


@pytest.mark.parametrize("device", DEVICES)
def test_moments(device: torch.device) -> None:
    normal = torch.cat([step_draws(step=s, device=device).normal((64, 64)).flatten() for s in range(8)])
    n = normal.numel()
    normal = normal.double()
    # Five standard errors of each moment of n independent normal numbers: 1, 2, 6 - skew, 24 - kurtosis.
    assert abs(normal.mean()) < 5 * math.sqrt(1 / n)
    assert abs(normal.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((normal**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((normal**4).mean() - 3) < 5 * math.sqrt(96 / n)
    uniform = torch.cat([step_draws(step=s, device=device).uniform((64, 64)).flatten() for s in range(8)])
    assert uniform.min() >= 0 and uniform.max() < 1
    counts = torch.histc(uniform.cpu(), bins=16, min=0, max=1).double()
    chi_square = ((counts - n / 16) ** 2 / (n / 16)).sum()
    assert chi_square < 44.3  # exceeded once in 10,000, 15 degrees of freedom


def test_neighbouring_steps_and_images_are_independent() -> None:
    steps = torch.stack([step_draws(step=s).normal((512,)) for s in range(6)]).flatten(0, 1).double()
    correlation = torch.corrcoef(steps) - torch.eye(len(steps), dtype=torch.float64)
    assert correlation.abs().max() < 5.5 / math.sqrt(512)


@pytest.mark.parametrize("device", DEVICES)
def test_shared_numbers_are_plain_floats_and_the_same_on_every_device(device: torch.device) -> None:
    numbers = step_draws().decisions(1000)
    assert all(type(number) is float and 0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 1000 - 0.5) < 5 / math.sqrt(12 * 1000)
    assert step_draws(device=device).decisions(1000) == numbers


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_is_the_same_on_every_device_and_holds_the_place(device: torch.device) -> None:
    whole = step_draws(device=device).seed()
    assert whole.device.type == device.type and whole.dtype == torch.int64 and whole.shape == (2,)
    assert torch.equal(whole.cpu(), step_draws().seed()) and whole[1] == 0
    part = step_draws(first=3, count=2, device=device).seed()
    assert part[0] == whole[0] and part[1] == 3
    numbers = [
        step_draws(seed, step, stream, device=device).seed()[0].item()
        for seed in (0, 1, 2**63)
        for step in range(40)
        for stream in (0, 1)
    ]
    draws = step_draws(device=device)
    numbers += [draws.seed()[0].item() for _ in range(3)]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) < -(2**62) and max(numbers) > 2**62  # all 64 bits


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_batch_have_the_noise_of_the_whole(device: torch.device) -> None:
    whole = seeded_normal(step_draws(device=device).seed(), (8, 4, 3, 3))
    parts = [
        seeded_normal(step_draws(first=f, count=c, device=device).seed(), (c, 4, 3, 3))
        for f, c in ((0, 2), (2, 5), (7, 1))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_dtype_and_shape() -> None:
    draws = step_draws(first=2, count=3)
    assert draws.normal((4, 2)).shape == (3, 4, 2) and draws.normal(()).dtype == torch.float32
    assert draws.uniform((1,)).shape == (3, 1) and draws.uniform(()).dtype == torch.float32


@pytest.mark.gpu
def test_drawing_on_a_gpu_does_not_wait_for_it() -> None:
    device = torch.device("cuda")
    step_draws(device=device).normal((2,))
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_kinds(step_draws(device=device))
        step_draws(device=device).seed()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_places_outside_of_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="images 6 to 9 lie outside of a batch of 8"):
        step_draws(first=6, count=3)
    with pytest.raises(ValueError, match="seed -1.* none may be negative"):
        step_draws(seed=-1)
