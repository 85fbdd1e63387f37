"""Two processes against one: the same global batches must give the same weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.launch import run
from tests.distributed.ranks import evaluate_at_once
from tests.distributed.scenarios import SCENARIOS, Scenario
from tests.tiny_runs import largest_difference, parameters, steps


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes leave; they also check what only processes can see (`ranks.main`)."""
    folder = tmp_path_factory.mktemp("ranks")
    run("tests.distributed.ranks", folder)
    assert (folder / "done").exists()
    return folder


@functools.cache
def of_one(scenario: Scenario) -> dict[str, Any]:
    built = scenario.job()
    start = parameters(built)
    results = steps(built, scenario.steps)
    trained = {name: p for name, p in parameters(built).items() if name in start}
    return {
        "start": start,
        "parameters": trained,
        "export": built.ema.export(),
        "losses": results[-1].losses,
    }


def test_evaluation_is_the_same_before_the_first_step_and_after(of_two: Path) -> None:
    assert torch.load(of_two / "quality.pt") == pytest.approx(evaluate_at_once(Scenario()), rel=1e-3)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return sum((one[name] - other[name]).square().sum().item() for name in one) ** 0.5


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_do_what_one_does(of_two: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    found, expected = torch.load(of_two / f"{name}.pt"), of_one(scenario.in_one_process())
    ours, theirs = found["parameters"], expected["parameters"]
    assert largest_difference({n: ours[n] for n in theirs}, theirs) <= scenario.tolerance
    # The tolerance is large beside one step; the error must be small beside the way.
    assert distance(theirs, ours) < 1e-3 * distance(expected["start"], theirs)
    assert found["losses"].keys() == expected["losses"].keys()
    for loss, value in expected["losses"].items():
        torch.testing.assert_close(found["losses"][loss], value, rtol=1e-3, atol=1e-5, msg=loss)
    average = found["export"]
    if scenario.engine.accumulate > 1:  # the mean style follows every part by itself
        average["style.average"] = expected["export"]["style.average"]
    assert largest_difference(average, expected["export"]) <= scenario.tolerance
