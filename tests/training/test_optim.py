"""The optimizer against the published update, its rate at points worked out by hand, norms of gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from vfmvae.training.averaging_adam import AveragingAdam
from vfmvae.training.optim import (
    Group,
    OptimizerConfig,
    build_optimizer,
    check_available,
    gradient_norm,
    learning_rate,
    next_optimizer,
    scale_gradients,
    set_learning_rate,
)


def test_the_rate_rises_linearly_over_the_warmup() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup=0.2)
    rates = [learning_rate(config, progress) for progress in (0.0, 0.05, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 2.0, 2.0, 2.0])


def test_the_cosine_begins_after_the_warmup_and_ends_at_zero() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup=0.2, schedule="cosine")
    rates = [learning_rate(config, progress) for progress in (0.2, 0.4, 0.6, 0.8, 1.0)]
    root = 0.5**0.5
    assert rates == pytest.approx([2.0, 1 + root, 1.0, 1 - root, 0.0])


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(OptimizerConfig(learning_rate=0.5), 0.0) == 0.5


def test_the_rate_is_set_for_every_parameter() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 3.0}], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    a.grad = b.grad = torch.ones(1)
    optimizer.step()
    assert (a.item(), b.item()) == (-0.25, -0.25)


def test_groups_have_a_factor_of_the_rate() -> None:
    config = OptimizerConfig(learning_rate=0.2, betas=(0.5, 0.9), eps=1e-3)
    parameters = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    slow = Group("slow", 0.1)
    optimizer = build_optimizer(config, parameters, {parameters[0]: slow, parameters[2]: slow})
    for rate in (None, 0.05):
        if rate is not None:
            set_learning_rate(optimizer, rate)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        full = rate or 0.2
        assert [rates[id(p)] for p in parameters] == pytest.approx([0.1 * full, full, 0.1 * full])
    starts, gradients = [p.detach().clone() for p in parameters], torch.randn(3, 4)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    for number, factor in enumerate((0.1, 1.0, 0.1)):
        own = replace(config, learning_rate=0.05 * factor)
        by_hand = adam_by_hand(own, starts[number], [gradients[number]])
        torch.testing.assert_close(parameters[number].detach().double(), by_hand, rtol=1e-5, atol=1e-7)


def test_a_next_optimizer_knows_what_the_earlier_did() -> None:
    config = OptimizerConfig(learning_rate=0.1, betas=(0.9, 0.99))
    old, new = (nn.Parameter(torch.randn(4)) for _ in range(2))
    start, gradients = old.detach().clone(), list(torch.randn(4, 4))
    optimizer = build_optimizer(config, [old])
    for number, gradient in enumerate(gradients):
        if number == 2:
            optimizer = next_optimizer(config, [old, new], optimizer, {old: Group("old"), new: Group("new")})
        old.grad, new.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    expected = adam_by_hand(config, start, gradients)
    torch.testing.assert_close(old.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert (optimizer.state[old]["step"], optimizer.state[new]["step"]) == (4, 2)
    other = next_optimizer(replace(config, kind="adamw"), [old], optimizer)
    assert not other.state, "another class begins anew"


def adam_by_hand(config: OptimizerConfig, start: Tensor, gradients: list[Tensor]) -> Tensor:
    """Algorithm 1 of arXiv 1412.6980; weight decay as L2 (adam) or decoupled as in arXiv 1711.05101."""
    w, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    beta1, beta2 = config.betas
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        if config.kind == "adam":
            g = g + config.weight_decay * w
        else:
            w = w - config.learning_rate * config.weight_decay * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = w - config.learning_rate * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + config.eps)
    return w


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_updates_are_the_published_ones(
    kind: Literal["adam", "adamw"], betas: tuple[float, float], weight_decay: float
) -> None:
    config = OptimizerConfig(kind=kind, learning_rate=0.1, betas=betas, eps=1e-3, weight_decay=weight_decay)
    parameter = nn.Parameter(torch.randn(7))
    start, gradients = parameter.detach().clone(), list(torch.randn(5, 7))
    optimizer = build_optimizer(config, [parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = adam_by_hand(config, start, gradients)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_parameters_may_come_from_a_generator() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(OptimizerConfig(), (p for p in model.parameters()))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    assert optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sgd"}, 'kind is "sgd"; needed is one of adam, adamw'),
        ({"schedule": "linear"}, 'schedule is "linear"'),
        ({"implementation": "bitsandbytes"}, 'implementation is "bitsandbytes"'),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"warmup": 1.0}, "warmup is 1.0"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{message}"):
        OptimizerConfig(**change)  # type: ignore[arg-type]


class OnCuda(nn.Parameter):
    """A parameter that says it lies on a CUDA device."""

    is_cuda = True


FAKE_APEX = """
import torch

class FusedAdam(torch.optim.SGD):
    # The documented signature.
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8,
                 adam_w_mode=True, weight_decay=0., amsgrad=False, set_grad_none=True,
                 capturable=False, master_weights=False):
        if eps == 0.5:
            raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")
        super().__init__(params, lr=lr)
        self.seen = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                         adam_w_mode=adam_w_mode, weight_decay=weight_decay, amsgrad=amsgrad)

    def step(self):
        # It counts in its groups.
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                self.state[parameter] = {"exp_avg": parameter.grad.clone()}
"""


@pytest.fixture
def apex_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that imports come from first; what a test puts there under the name apex is used."""
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "apex"}
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]
    sys.modules.update(kept)


def put_apex(folder: Path, optimizers: str | None) -> None:
    (folder / "apex").mkdir()
    (folder / "apex" / "__init__.py").touch()
    if optimizers is not None:
        (folder / "apex" / "optimizers.py").write_text(optimizers)


def test_moments_are_handed_on_between_implementations_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfmvae.training.optim.why_no_adam_average", lambda *_: None)
    parameter = nn.Parameter(torch.ones(3))
    torchs, ours = OptimizerConfig(), OptimizerConfig(implementation="triton")
    first = build_optimizer(torchs, [parameter])
    parameter.grad = torch.ones(3)
    first.step()
    second = next_optimizer(ours, [parameter], first)
    assert isinstance(second, AveragingAdam) and second.defaults["fused"]
    assert second.state[parameter] is first.state[parameter]
    assert next_optimizer(torchs, [parameter], second).state[parameter] is first.state[parameter]
    other = next_optimizer(replace(ours, kind="adamw"), [parameter], second)
    assert not other.state and other.defaults["decoupled_weight_decay"]


def test_the_kernel_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    config, parameter = OptimizerConfig(implementation="triton"), nn.Parameter(torch.ones(3))
    refused, remedy = (
        "optimizer.implementation 'triton' cannot be used: ",
        ".*--optimizer.implementation torch",
    )
    with pytest.raises(ValueError, match=f"{refused}.*(on cpu|not installed){remedy}"):
        check_available(config, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"{refused}.*(on cpu|not installed){remedy}"):
        build_optimizer(config, [parameter])
    monkeypatch.setattr("vfmvae.ops.native.why_no_triton", lambda x: None)
    with pytest.raises(
        ValueError, match=f"{refused}it takes parameters of float32, not torch.float64{remedy}"
    ):
        build_optimizer(config, [nn.Parameter(torch.ones(3, dtype=torch.float64))])
    build_optimizer(config, [parameter])


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_apex_is_given_every_setting(apex_folder: Path, kind: Literal["adam", "adamw"]) -> None:
    put_apex(apex_folder, FAKE_APEX)
    config = OptimizerConfig(
        kind=kind, implementation="apex", learning_rate=0.02, betas=(0.1, 0.2), eps=1e-4, weight_decay=0.3
    )
    optimizer = build_optimizer(config, [OnCuda(torch.zeros(2))])
    assert type(optimizer).__module__ == "apex.optimizers"
    assert optimizer.seen == {  # type: ignore[attr-defined]
        "lr": 0.02,
        "bias_correction": True,
        "betas": (0.1, 0.2),
        "eps": 1e-4,
        "adam_w_mode": kind == "adamw",
        "weight_decay": 0.3,
        "amsgrad": False,
    }


def test_apex_goes_on_counting_where_an_earlier_one_stopped(apex_folder: Path) -> None:
    put_apex(apex_folder, FAKE_APEX)
    config = OptimizerConfig(implementation="apex", learning_rate=0.5)
    old, new = (OnCuda(torch.zeros(2)) for _ in range(2))
    old.grad = new.grad = torch.ones(2)
    groups = {old: Group("old"), new: Group("new", 0.5)}
    optimizer = build_optimizer(config, [old], groups)
    for _ in range(3):
        optimizer.step()
    following = next_optimizer(config, [old, new], optimizer, groups)
    assert following.state[old]["exp_avg"].tolist() == [1.0, 1.0] and new not in following.state
    following.step()
    found = {group["params"][0]: (group["step"], group["lr"]) for group in following.param_groups}
    assert found == {old: (4, 0.5), new: (1, 0.25)}


@pytest.mark.parametrize("optimizers", [None, FAKE_APEX])
def test_apex_is_refused_with_the_reason(apex_folder: Path, optimizers: str | None) -> None:
    put_apex(apex_folder, optimizers)  # None: another package of that name
    config = OptimizerConfig(implementation="apex")
    reason = "it needs parameters on a CUDA device" if optimizers else "NVIDIA apex is not installed"
    remedy = ".*use --optimizer.implementation torch"
    with pytest.raises(ValueError, match=f"'apex' cannot be used: {reason}{remedy}"):
        build_optimizer(config, [nn.Parameter(torch.zeros(2))])


def test_apex_without_its_extensions_is_refused(apex_folder: Path) -> None:
    put_apex(apex_folder, FAKE_APEX)
    config = OptimizerConfig(implementation="apex", eps=0.5)
    with pytest.raises(ValueError, match="cannot be used: apex.optimizers.FusedAdam requires cuda ext"):
        build_optimizer(config, [OnCuda(torch.zeros(2))])


def test_a_broken_apex_is_not_taken_for_an_absent_one(apex_folder: Path) -> None:
    put_apex(apex_folder, "import a_module_that_does_not_exist")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_does_not_exist"):
        build_optimizer(OptimizerConfig(implementation="apex"), [OnCuda(torch.zeros(2))])


def with_gradients(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(values))) for values in gradients]
    for parameter, values in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(values)
    return parameters


def test_the_norm_is_that_of_all_gradients_as_one_vector() -> None:
    parameters = with_gradients([3.0, 0.0], [0.0, 4.0, 12.0])  # 3^2 + 4^2 + 12^2 = 13^2
    parameters.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    norm = gradient_norm(parameter for parameter in parameters)
    assert norm.ndim == 0 and norm.item() == pytest.approx(13.0)


def test_all_gradients_are_scaled_alike() -> None:
    parameters = [*with_gradients([3.0, 0.0], [0.0, 4.0, 12.0]), nn.Parameter(torch.zeros(2))]
    scale_gradients((parameter for parameter in parameters), torch.tensor(0.5))
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 2.0, 6.0]))
    assert parameters[2].grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_not_hidden(value: float) -> None:
    assert not gradient_norm(with_gradients([1.0, value], [2.0])).isfinite()


def test_without_gradients_the_norm_is_zero() -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    assert gradient_norm(parameters) == gradient_norm([]) == 0
    scale_gradients(parameters, torch.tensor(0.5))
    assert parameters[0].grad is None


@pytest.mark.gpu
def test_norm_and_scaling_on_a_gpu_do_not_wait_for_it() -> None:
    model = nn.Linear(4, 4).cuda()
    model(torch.ones(2, 4, device="cuda")).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = gradient_norm(model.parameters())
        scale_gradients(model.parameters(), norm.reciprocal())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gradient_norm(model.parameters()).item() == pytest.approx(1.0)


def test_apex_is_refused_where_updates_are_recorded(apex_folder: Path) -> None:
    put_apex(apex_folder, FAKE_APEX)
    config = OptimizerConfig(implementation="apex")
    with pytest.raises(ValueError, match=r"cannot be used: engine.graphs records updates"):
        build_optimizer(config, [OnCuda(torch.zeros(2))], capturable=True)
