"""What a checkpoint holds of a run, and which checkpoints fit it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from tests.training.small_run import Average, assert_equal_tensors, modules, small_run
from vfmvae.training.state import TrainingState


def metadata(tensors: Mapping[str, Tensor]) -> dict[str, TensorStorageMetadata]:
    """As a checkpoint describes them."""
    return {
        name: TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, [])
        for name, tensor in tensors.items()
    }


def transfer(source: TrainingState, to: TrainingState) -> None:
    """Save and load, without a disk."""
    stored = {name: tensor.detach().clone() for name, tensor in source.tensors().items()}
    targets = to.targets(metadata(stored))
    assert targets.keys() == stored.keys()
    for name, tensor in targets.items():
        tensor.detach().copy_(stored[name])
    to.restore(targets, json.loads(source.record()))


def test_names_say_what_each_tensor_is() -> None:
    run = small_run()
    fixed = {
        "modules.critic.bias",
        "modules.critic.weight",
        "modules.model.decoder.0.bias",
        "modules.model.decoder.0.weight",
        "modules.model.decoder.2.bias",
        "modules.model.decoder.2.weight",
        "modules.model.mean",
        "others.average.decoder.0.bias",
        "others.average.decoder.0.weight",
        "others.average.decoder.2.bias",
        "others.average.decoder.2.weight",
    }
    assert run.state.tensors().keys() == fixed, (
        "the frozen encoder is not stored, nor state that is not there"
    )
    run.step()
    added = run.state.tensors().keys() - fixed
    assert len(added) == 4 * len(("step", "exp_avg", "exp_avg_sq")) + 2
    assert "optimizers.generator.model.decoder.2.bias.exp_avg_sq" in added
    assert "optimizers.critic.critic.weight.momentum_buffer" in added


def test_tensors_are_the_parts_own() -> None:
    run = small_run()
    run.step()
    tensors = run.state.tensors()
    assert tensors["modules.model.decoder.0.weight"].data_ptr() == run.model.decoder[0].weight.data_ptr()
    assert tensors["others.average.decoder.0.weight"] is run.average.average["decoder.0.weight"]


def test_all_parts_come_back() -> None:
    run, other = small_run(), small_run(seed=9)
    for _ in range(3):
        run.step()
    run.state.numbers = {"stage": 2, "skipped": 1, "loss": float("inf")}
    transfer(run.state, other.state)
    assert (other.state.step, other.state.numbers) == (3, run.state.numbers)
    assert_equal_tensors(other.tensors(), run.tensors())
    run.step()
    other.step()
    assert_equal_tensors(other.tensors(), run.tensors())


class Statistics:
    """Gives copies of its state, as an object may."""

    def __init__(self) -> None:
        self.value = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.value = state["value"].item()


def test_other_parts_are_given_what_was_read() -> None:
    run, other = small_run(), small_run(seed=9)
    run.state.others["statistics"] = statistics = Statistics()
    other.state.others["statistics"] = found = Statistics()
    statistics.value = 2.5
    transfer(run.state, other.state)
    assert found.value == 2.5


def test_the_step_count_of_a_scalar_stays_on_the_cpu() -> None:
    """torch's optimizers that are not fused count there, whatever the parameter's device."""

    def state(device: str) -> TrainingState:
        module = nn.Module()
        module.scale = nn.Parameter(torch.ones((), device=device))
        return TrainingState({"m": module}, {"o": torch.optim.Adam(module.parameters(), foreach=False)})

    saved = state("cpu")
    saved.modules["m"].scale.grad = torch.ones(())
    saved.optimizers["o"].step()
    targets = state("meta").targets(metadata(saved.tensors()))
    assert targets["optimizers.o.m.scale.exp_avg"].device.type == "meta"
    assert targets["optimizers.o.m.scale.step"].device.type == "cpu"


def test_going_back_keeps_the_memory_of_the_optimizers() -> None:
    run = small_run()
    run.step()
    at_1 = {name: tensor.detach().clone() for name, tensor in run.state.tensors().items()}
    record = json.loads(run.state.record())
    run.step()
    before = {name: tensor.data_ptr() for name, tensor in run.state.tensors().items()}
    targets = run.state.targets(metadata(at_1))
    for name, tensor in targets.items():
        tensor.detach().copy_(at_1[name])
    run.state.restore(targets, record)
    assert_equal_tensors(run.tensors(), at_1)
    assert {name: tensor.data_ptr() for name, tensor in run.state.tensors().items()} == before


def test_going_back_to_before_the_first_step_forgets_the_moments() -> None:
    fresh, run = small_run(), small_run(seed=9)
    run.step()
    transfer(fresh.state, run.state)
    assert all(not optimizer.state for optimizer in run.optimizers.values())
    fresh.step()
    run.step()
    assert_equal_tensors(run.tensors(), fresh.tensors())


def test_a_compiled_module_has_the_names_of_the_plain_one() -> None:
    run, other = small_run(), small_run(seed=9)
    run.step()
    compiled = torch.compile(other.model)
    other.state.modules["model"] = compiled  # type: ignore[assignment]
    transfer(run.state, other.state)
    assert other.state.tensors().keys() == run.state.tensors().keys()
    assert_equal_tensors(other.tensors(), run.tensors())


def test_hyper_parameters_are_the_configurations() -> None:
    run, other = small_run(), small_run(seed=9)
    run.step()
    other.optimizers["generator"].param_groups[0]["lr"] = 0.25
    transfer(run.state, other.state)
    assert other.optimizers["generator"].param_groups[0]["lr"] == 0.25


class CountsInItsGroups(torch.optim.SGD):
    """Counts its steps where apex does."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        super().step()


def test_what_else_a_group_counts_is_state() -> None:
    states = []
    for _ in range(2):
        _, critic = modules(seed=1)
        states.append(
            TrainingState({"critic": critic}, {"critic": CountsInItsGroups(critic.parameters(), lr=0.1)})
        )
    for _ in range(3):
        states[0].optimizers["critic"].step()
    transfer(states[0], states[1])
    assert states[1].optimizers["critic"].param_groups[0]["step"] == 3


def test_a_stage_may_have_fewer_parts() -> None:
    run, other = small_run(), small_run(seed=9)
    for state in (run.state, other.state):
        del state.modules["critic"], state.optimizers["critic"]
    transfer(run.state, other.state)
    assert_equal_tensors(other.tensors(), run.tensors())


def test_another_stages_checkpoint_is_named() -> None:
    with_critic, without = small_run(), small_run()
    del without.state.modules["critic"], without.state.optimizers["critic"]
    with pytest.raises(ValueError, match="it holds average, critic, model, and this run has average, model"):
        without.state.targets(metadata(with_critic.tensors()))
    with pytest.raises(ValueError, match="it holds average, model, and this run has average, critic, model"):
        with_critic.state.targets(metadata(without.tensors()))


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in moved().items() if key != name}


def moved() -> dict[str, Tensor]:
    run = small_run()
    run.step()
    return run.tensors()


@pytest.mark.parametrize(
    ("stored", "sentence"),
    [
        (without("modules.model.mean"), "it lacks modules.model.mean"),
        (
            moved() | {"modules.model.x": torch.zeros(1), "modules.model.y": torch.zeros(1)},
            "it holds modules.model.x and 1 more, which this run does not have",
        ),
        (
            moved() | {"optimizers.generator.model.gone.exp_avg": torch.zeros(1)},
            "it holds optimizers.generator.model.gone.exp_avg, which this run does not have",
        ),
        (
            moved() | {"modules.model.mean": torch.zeros(4)},
            r"modules.model.mean is \[4\] float32 there and \[3\] float32 here",
        ),
        (
            moved() | {"modules.model.mean": torch.zeros(3, dtype=torch.float64)},
            r"modules.model.mean is \[3\] float64 there and \[3\] float32 here",
        ),
        (
            moved() | {"optimizers.generator.model.decoder.0.bias.exp_avg": torch.zeros(6)},
            r"an optimizer's exp_avg is \[6\] there, for a parameter of \[5\] here",
        ),
    ],
)
def test_what_does_not_fit_is_named(stored: dict[str, Tensor], sentence: str) -> None:
    run = small_run(seed=9)
    before = run.tensors()
    with pytest.raises(ValueError, match=sentence):
        run.state.targets(metadata(stored))
    assert_equal_tensors(run.tensors(), before)


def test_an_optimizer_of_nobodys_parameters_is_our_mistake() -> None:
    model, critic = modules(seed=1)
    state = TrainingState({"model": model}, {"critic": torch.optim.SGD(critic.parameters())})
    with pytest.raises(AssertionError, match="optimizer critic: a parameter of no module"):
        state.tensors()
    assert Average(model).state_dict()
