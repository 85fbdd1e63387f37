"""The kernels of kernels/optimizer.py against torch.optim in float64, on a GPU or in Triton's interpreter.

tests/ops/test_optimizer.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_optimizer.py
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_kernel_close
from vfmvae.ops import optimizer as ops_optimizer
from vfmvae.training.averaging_adam import AveragingAdam
from vfmvae.training.guard import guarded_update

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
Side = Literal["ours", "torch", "truth"]
SIDES: tuple[Side, ...] = ("ours", "torch", "truth")
# A scalar, none at all, few, one block, blocks and a part of one, several dimensions.
SHAPES = ((), (0,), (1,), (7,), (2048,), (2049,), (3, 5, 1, 1), (3 * 2048 + 5,), (8, 3, 7, 7))
BETA = 0.9  # of the averages
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}

DECAYING = SETTINGS | {"weight_decay": 0.1, "decoupled_weight_decay": True}


@dataclass
class Trained:
    """Parameters with an optimizer and averages: by our kernels, by torch alike, or by torch in float64."""

    side: Side
    starts: Sequence[Tensor]
    settings: dict[str, Any]
    groups: Sequence[dict[str, Any]] = ()
    """Settings of each group, of which parameters take turns."""
    parameters: list[nn.Parameter] = field(init=False)
    averages: list[Tensor] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        dtype = torch.float64 if self.side == "truth" else torch.float32
        self.parameters = [nn.Parameter(start.to(dtype, copy=True)) for start in self.starts]
        self.averages = [p.detach() * 0.5 for p in self.parameters]
        groups = self.groups or [{}]
        split = [{"params": self.parameters[n :: len(groups)], **group} for n, group in enumerate(groups)]
        # The kernels keep them in float32, where 1 - 0.999 is off by 1e-5.
        settings = self.settings | {"betas": tuple(torch.tensor(self.settings["betas"]).tolist())}
        if self.side == "ours":
            self.optimizer = AveragingAdam(split, **settings)
            self.optimizer.follow(dict(zip(self.parameters, self.averages, strict=True)))
            self.optimizer.set_average_weight(1 - BETA)
        else:
            self.optimizer = torch.optim.Adam(split, **settings, fused=True)

    def step(self, gradients: Sequence[Tensor | None], skip: float | None = None) -> None:
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = None if g is None else g.to(p.dtype, copy=True)
            if g is not None and self.side != "ours":  # torch's kernel on a CPU takes no other layout
                p.grad = torch.empty_like(p).copy_(g)
        if skip is None:
            self.optimizer.step()
        else:
            guarded_update(self.optimizer, torch.tensor(skip, device=DEVICE))
            del self.optimizer.found_inf
        if self.side != "ours":
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - BETA)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Everything that an update changes."""
        found = {"parameter": [p.detach() for p in self.parameters], "average": self.averages}
        for name in ("exp_avg", "exp_avg_sq", "step"):
            found[name] = [s[name] for p in self.parameters if (s := self.optimizer.state.get(p))]
        return found


def randoms(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def compare(sides: Sequence[Trained]) -> None:
    """As exact as torch; `sides` in the order of SIDES."""
    found = [side.tensors() for side in sides]
    for name in found[0]:
        assert [t.shape for t in found[0][name]] == [t.shape for t in found[1][name]]
        # A few numbers have a largest error by luck, so all tensors are compared as one.
        rows = [torch.cat([t.flatten() for t in tensors[name]]) for tensors in found]
        if name == "step":
            assert rows[0].tolist() == rows[2].tolist()
        else:
            assert_kernel_close(rows[0], rows[1], rows[2].double(), name)


def three_sides(
    settings: dict[str, Any] = SETTINGS, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[Trained]:
    starts = randoms(shapes)
    return [Trained(side, starts, settings) for side in SIDES]


def step_all(sides: Sequence[Trained], gradients: Sequence[Tensor | None], skip: float | None = None) -> None:
    for side in sides:
        side.step(gradients, skip)


def bits(side: Trained) -> dict[str, list[Tensor]]:
    return copy.deepcopy(side.tensors())


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)], ids=str)
def test_updates(
    betas: tuple[float, float], weight_decay: float, decoupled: bool, poisoned_empty: None
) -> None:
    decay = {"weight_decay": weight_decay, "decoupled_weight_decay": decoupled}
    sides = three_sides(SETTINGS | decay | {"betas": betas})
    for _ in range(4):
        step_all(sides, randoms())
    compare(sides)


@pytest.mark.parametrize("betas", [(0.99, 0.9999), (0.0, 0.0)], ids=str)
def test_bias_corrections_of_many_steps(betas: tuple[float, float]) -> None:
    sides = three_sides(SETTINGS | {"betas": betas}, [(5,)])
    for count in (1, 2, 49, 51, 900, 30_000, 10_000_000):
        for side in sides:
            for p in side.parameters:
                ones = torch.ones_like(p.detach())
                step = torch.tensor(count - 1.0, device=DEVICE)
                side.optimizer.state[p] = {"step": step, "exp_avg": ones, "exp_avg_sq": ones.clone()}
        step_all(sides, [torch.full((5,), 2.0, device=DEVICE)])
        ours, _, truth = (side.parameters[0].detach().double() for side in sides)
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6, msg=f"step {count}")


def test_many_tiny_tensors() -> None:
    sides = three_sides(shapes=[(n % 5,) for n in range(300)])
    for _ in range(2):
        step_all(sides, randoms([(n % 5,) for n in range(300)]))
    compare(sides)


def test_tensors_may_lie_anywhere() -> None:
    """Parameters and gradients at addresses that are no multiple of 16 bytes: none, either and both."""
    shapes = [(5000,)] * 4
    sides = three_sides(shapes=shapes)
    ours = sides[0]
    for number in (1, 3):
        ours.parameters[number].data = misaligned(ours.parameters[number].detach())
    for _ in range(3):
        gradients = randoms(shapes)
        step_all(sides[1:], gradients)
        for number, (p, g) in enumerate(zip(ours.parameters, gradients, strict=True)):
            p.grad = misaligned(g) if number >= 2 else g.clone()
        ours.optimizer.step()
    compare(sides)


def misaligned(x: Tensor) -> Tensor:
    return torch.empty(len(x) + 1, device=DEVICE)[1:].copy_(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_16_bits(dtype: torch.dtype) -> None:
    sides = three_sides()
    for _ in range(3):
        gradients = [g.to(dtype) for g in randoms()]
        step_all(sides[1:], gradients)
        for p, g in zip(sides[0].parameters, gradients, strict=True):
            p.grad_dtype = dtype
            p.grad = g
        sides[0].optimizer.step()
    compare(sides)


def test_memory_layouts() -> None:
    shape = (6, 5, 4, 3)
    sides = three_sides(shapes=[shape] * 2)
    for side in sides:  # before the optimizer has seen them
        side.parameters[1].data = side.parameters[1].data.contiguous(memory_format=torch.channels_last)
        side.averages[1] = side.averages[1].contiguous(memory_format=torch.channels_last)
    ours = sides[0]
    ours.optimizer.follow(dict(zip(ours.parameters, ours.averages, strict=True)))
    for form in (torch.channels_last, torch.contiguous_format):
        gradients = [g.contiguous(memory_format=form) for g in randoms([shape] * 2)]
        step_all(sides, gradients)
        gradients = [g.flip(0).transpose(0, 1).contiguous().transpose(0, 1) for g in gradients]
        step_all(sides, gradients)
    compare(sides)


def test_without_a_gradient_only_the_average_moves() -> None:
    sides = three_sides(DECAYING)
    some = [g if n % 2 else None for n, g in enumerate(randoms())]
    step_all(sides, some)
    step_all(sides, randoms())
    step_all(sides, some)
    compare(sides)
    before = bits(sides[0])
    step_all(sides, [None] * len(SHAPES))
    after = bits(sides[0])
    for name in ("parameter", "exp_avg", "exp_avg_sq", "step"):
        assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)), name
    compare(sides)


def test_a_skipped_step_moves_the_average_alone() -> None:
    """As in the engine without it, where the average is moved after every step, skipped or not."""
    sides = three_sides(DECAYING)
    step_all(sides, randoms(), skip=1.0)  # the first one of all
    for skip in (0.0, 0.0, 1.0, 0.0):
        before = bits(sides[0])
        nothing = torch.full((), float("nan"), device=DEVICE)
        step_all(sides, [g + nothing if skip else g for g in randoms()], skip)
        if skip:
            after = bits(sides[0])
            for name in ("parameter", "exp_avg", "exp_avg_sq", "step"):
                assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)), name
    compare(sides)
    assert all(step == 3 for step in sides[0].tensors()["step"])


def test_groups_have_their_own_settings_and_rates_may_be_tensors() -> None:
    groups = [{"lr": 0.1}, {"betas": (0.5, 0.75), "weight_decay": 0.25}, {"eps": 0.5}]
    starts = randoms()
    sides = [Trained(side, starts, SETTINGS, groups) for side in SIDES]
    for rate in (None, 0.03125, 0.0):
        if rate is not None:
            sides[0].optimizer.param_groups[1]["lr"] = torch.tensor(rate, device=DEVICE)
            for side in sides[1:]:
                side.optimizer.param_groups[1]["lr"] = rate
        step_all(sides, randoms())
    compare(sides)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_weights_of_the_average(weight: float) -> None:
    ours = three_sides()[0]
    before = copy.deepcopy(ours.averages)
    ours.optimizer.set_average_weight(weight)
    ours.step(randoms())
    for p, a, b in zip(ours.parameters, ours.averages, before, strict=True):
        torch.testing.assert_close(a, torch.lerp(b, p.detach(), weight), rtol=1e-6, atol=1e-6)
        assert weight != 1 or torch.equal(a, p.detach())


def test_parameters_without_an_average() -> None:
    sides = three_sides()
    sides[0].optimizer.follow({sides[0].parameters[5]: sides[0].averages[5]})
    kept = copy.deepcopy(sides[0].averages)
    step_all(sides, randoms())
    assert [torch.equal(a, b) for a, b in zip(sides[0].averages, kept, strict=True)] == [
        n != 5 for n in range(len(SHAPES))
    ]
    for side in sides:
        side.averages = side.averages[5:6]
    compare(sides)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.99)], ids=str)
def test_values_that_are_not_finite_go_where_torchs_do(betas: tuple[float, float], value: float) -> None:
    ours, torchs = three_sides(SETTINGS | {"betas": betas}, [(2050,)])[:2]
    gradient = torch.ones(2050, device=DEVICE)
    gradient[7] = gradient[2049] = value
    for number in range(2):
        step_all([ours, torchs], [gradient if number == 0 else torch.ones(2050, device=DEVICE)])
        for name in ("parameter", "average", "exp_avg_sq"):
            found, expected = (side.tensors()[name][0] for side in (ours, torchs))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


def take_over(side: Trained, optimizer: torch.optim.Optimizer) -> None:
    """Go on with another optimizer, from the state dict of the one before."""
    optimizer.load_state_dict(side.optimizer.state_dict())
    side.optimizer = optimizer
    if isinstance(optimizer, AveragingAdam):
        side.side = "ours"
        optimizer.follow(dict(zip(side.parameters, side.averages, strict=True)))
        optimizer.set_average_weight(1 - BETA)
    else:
        side.side = "torch"


@pytest.mark.parametrize("form", ["fused", "foreach", "capturable"])
def test_torch_goes_on_where_ours_was_and_the_other_way_round(form: str) -> None:
    sides = three_sides()
    for _ in range(2):
        step_all(sides, randoms())
    take_over(sides[0], torch.optim.Adam(sides[0].parameters, **{form: True}))
    take_over(sides[1], torch.optim.Adam(sides[1].parameters))
    for group in sides[1].optimizer.param_groups:  # as in the state dict of one that was made like that
        group.update({"fused": None, form: True})
    take_over(sides[1], AveragingAdam(sides[1].parameters))
    for _ in range(2):
        step_all(sides, randoms())
    compare([sides[1], sides[0], sides[2]])
    assert sides[0].optimizer.state_dict().keys() == sides[1].optimizer.state_dict().keys()


def test_moments_come_in_another_layout() -> None:
    sides = three_sides(shapes=[(6, 5, 4, 3)])
    step_all(sides, randoms([(6, 5, 4, 3)]))
    state = copy.deepcopy(sides[0].optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        moment = state["state"][0][name]
        state["state"][0][name] = moment.contiguous(memory_format=torch.channels_last)
    state["state"][0]["step"] = state["state"][0]["step"].double().cpu()
    sides[0].optimizer.load_state_dict(state)
    step_all(sides, randoms([(6, 5, 4, 3)]))
    compare(sides)


def test_what_it_cannot_update_is_refused() -> None:
    ours = three_sides(shapes=[(4,), (5,)])[0]
    ours.parameters[0].grad_dtype = torch.bfloat16
    ours.parameters[0].grad = torch.ones(4, device=DEVICE, dtype=torch.bfloat16)
    ours.parameters[1].grad = torch.ones(5, device=DEVICE)
    with pytest.raises(ValueError, match="these are of torch.bfloat16, torch.float32"):
        ours.optimizer.step()
    wrong = AveragingAdam([nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))])
    wrong.param_groups[0]["params"][0].grad = torch.ones(3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        wrong.step()
    ours = three_sides(shapes=[(4, 5)])[0]
    ours.optimizer.follow({ours.parameters[0]: ours.averages[0].t().contiguous().t()})
    with pytest.raises(ValueError, match=r"averages has a torch.float32 \[4, 5\] with strides \[1, 4\]"):
        ours.step(randoms([(4, 5)]))
    ours.optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        ours.optimizer.step()


def test_a_recorded_update_has_gradients_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is particular to a recording, without one: the table for other updates stays as it is."""
    sides = three_sides()
    monkeypatch.setattr(ops_optimizer, "_recording", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be recorded; let it run once before"):
        sides[0].step(randoms())
    monkeypatch.undo()
    sides = three_sides()
    step_all(sides, randoms())
    (update,) = sides[0].optimizer._passes.values()
    before = update._moving, update._gradients.clone()
    monkeypatch.setattr(ops_optimizer, "_recording", lambda device: True)
    step_all(sides, randoms())
    assert update._moving == before[0] and torch.equal(update._gradients, before[1])
    monkeypatch.undo()
    step_all(sides, randoms())
    compare(sides)


@pytest.mark.skipif(not ON_GPU, reason="records a CUDA graph")
def test_replays_between_other_steps() -> None:
    sides = three_sides()
    ours = sides[0].optimizer
    for group in ours.param_groups:
        group |= {"lr": torch.tensor(0.01, device=DEVICE), "capturable": True}
    skip, standing = torch.zeros((), device=DEVICE), [g.clone() for g in randoms()]
    step_all(sides, randoms())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p, g in zip(sides[0].parameters, standing, strict=True):
            p.grad = g * 1.0  # in the graph's memory
        guarded_update(ours, skip)
    del ours.found_inf
    for skipped in (0.0, 1.0, 0.0):
        gradients = randoms()
        torch._foreach_copy_(standing, gradients)
        skip.fill_(skipped)
        graph.replay()
        step_all(sides[1:], gradients, skipped)
        step_all(sides, randoms())
    compare(sides)


@pytest.mark.skipif(not ON_GPU, reason="there is nothing to wait for")
def test_an_update_does_not_wait_for_the_device() -> None:
    ours = three_sides()[0]
    ours.step(randoms())
    for p in ours.parameters:
        p.grad = torch.ones_like(p)
    skip = torch.zeros((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.optimizer.set_average_weight(0.25)
        guarded_update(ours.optimizer, skip)
    finally:
        torch.cuda.set_sync_debug_mode("default")
