"""The average of the weights: its arithmetic, what it tracks, and that swapping it in leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vfmvae.training.ema import EMA, EmaConfig, ema_beta


class Model(nn.Module):
    """A trained part, a frozen part, and every kind of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.decoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.decoder(self.encoder(x))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_states_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def change(model: nn.Module) -> None:
    """Other values in every parameter and floating-point buffer; integer buffers count on."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.randn_like(tensor)) if tensor.is_floating_point() else tensor.add_(1)


def test_half_of_a_weight_is_forgotten_per_half_life() -> None:
    config = EmaConfig(half_life_images=1000, ramp_up=None)
    assert ema_beta(config, 1000, 0) == 0.5
    assert ema_beta(config, 10, 0) ** 100 == pytest.approx(0.5)
    assert ema_beta(config, 20, 10**9) == pytest.approx(ema_beta(config, 10, 0) ** 2)


def test_early_the_half_life_is_a_share_of_the_images_seen() -> None:
    config = EmaConfig()
    assert ema_beta(config, 512, 0) == 0.0
    assert ema_beta(config, 512, 512) == pytest.approx(0.5**20)
    assert ema_beta(config, 512, 512 * 20) == pytest.approx(0.5)
    assert ema_beta(config, 512, 3_200_000) == ema_beta(config, 512, 10**9) == 0.5 ** (512 / 160_000)
    assert ema_beta(config, 512, 3_199_999) < ema_beta(config, 512, 3_200_000)


def test_without_a_half_life_nothing_is_remembered() -> None:
    for ramp_up in (0.05, None):
        assert ema_beta(EmaConfig(half_life_images=0, ramp_up=ramp_up), 512, 10**9) == 0.0


@pytest.mark.parametrize("change", [{"half_life_images": -1.0}, {"ramp_up": 0.0}, {"ramp_up": float("nan")}])
def test_wrong_settings_are_named(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"ema.{name} is"):
        EmaConfig(**change)


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    model, betas = Model(), (0.0, 0.5, 0.9, 0.99)
    ema = EMA(model, "encoder.")
    expected = model.decoder[0].weight.detach().double()
    for beta in betas:
        change(model)
        ema.update(beta)
        expected = beta * expected + (1 - beta) * model.decoder[0].weight.detach().double()
    torch.testing.assert_close(ema.state_dict()["decoder.0.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_what_an_optimizer_has_moved_is_left_alone() -> None:
    model = Model()
    ema = EMA(model, "encoder.")
    averages = ema.of_parameters()
    assert averages.keys() == {model.scale, *model.decoder.parameters()}
    assert averages[model.scale] is ema.state_dict()["scale"]
    change(model)
    averages[model.scale].fill_(7.0)
    ema.update(0.0, {model.scale})
    assert ema.state_dict()["scale"] == 7.0
    expected = dict(model.named_parameters()) | stored_buffers(model)
    left = {name: average for name, average in ema.state_dict().items() if name != "scale"}
    assert_states_equal(left, {name: expected[name] for name in left})


def test_beta_zero_takes_the_weights_as_they_are() -> None:
    model = Model()
    ema = EMA(model)
    change(model)
    ema.update(0.0)
    assert_states_equal(ema.state_dict(), {**dict(model.named_parameters()), **stored_buffers(model)})


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name != "scratch"}


def test_buffers_are_copied_and_frozen_parts_are_not_tracked() -> None:
    model = Model()
    ema = EMA(model, "encoder.")
    assert set(ema.state_dict()) == {
        "scale",
        *(f"decoder.{k}" for k in model.decoder.state_dict()),
    }
    change(model)
    ema.update(0.99)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(
            ema.state_dict()[f"decoder.1.{name}"], getattr(model.decoder[1], name), rtol=0, atol=0
        )
    model.decoder[1].running_mean = torch.full((4,), 7.0)  # a new tensor, not new values
    ema.update(0.99)
    assert ema.state_dict()["decoder.1.running_mean"].tolist() == [7.0] * 4


def test_what_a_stage_freezes_stays_in_the_average() -> None:
    model = Model()
    model.scale.requires_grad_(False)
    ema = EMA(model, ("encoder.", "decoder.1."))
    assert set(ema.state_dict()) == {"scale", "decoder.0.weight", "decoder.0.bias"}
    with torch.no_grad():
        model.scale.requires_grad_(True).fill_(3.0)
    ema.update(0.5)
    assert ema.state_dict()["scale"] == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_16_bit_weights_are_32_bit(dtype: torch.dtype) -> None:
    # 100 steps of 0.1 %: in 16 bits each would be rounded away.
    model = nn.Linear(4, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    ema = EMA(model)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        ema.update(0.999)
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((1, 4), 2 - 0.999**100), rtol=1e-5, atol=0)
    assert ema.export()["weight"].dtype == dtype


def test_applied_swaps_in_the_average_and_back_bit_for_bit() -> None:
    model = Model().eval()
    ema = EMA(model, "encoder.")
    change(model)
    ema.update(0.3)
    before, averages = state_of(model), copy.deepcopy(ema.state_dict())
    identities = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with ema.applied():
        inside = state_of(model)
        assert_states_equal({k: inside[k] for k in averages}, averages)
        for name in before.keys() - averages.keys():
            torch.testing.assert_close(inside[name], before[name], rtol=0, atol=0)
    assert_states_equal(state_of(model), before)
    assert_states_equal(ema.state_dict(), averages)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == identities


def test_weights_come_back_after_an_error() -> None:
    model = Model()
    ema = EMA(model)
    change(model)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="evaluation broke"), ema.applied():
        model(torch.randn(8, 3))  # moves the running statistics
        raise RuntimeError("evaluation broke")
    assert_states_equal(state_of(model), before)


def test_an_optimizer_goes_on_after_the_swap() -> None:
    def trained(swap: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Model()
        ema = EMA(model)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().sum().backward()
            optimizer.step()
            ema.update(0.5)
            if swap:
                with ema.applied():
                    pass
        return state_of(model)

    assert_states_equal(trained(swap=True), trained(swap=False))


def test_state_round_trip() -> None:
    model = Model()
    ema = EMA(model)
    change(model)
    ema.update(0.4)
    saved = copy.deepcopy(ema.state_dict())
    change(model)
    ema.update(0.4)
    expected = copy.deepcopy(ema.state_dict())
    resumed = EMA(model)
    resumed.load_state_dict(saved)
    resumed.update(0.4)
    assert_states_equal(resumed.state_dict(), expected)
    resumed.load_state_dict(resumed.state_dict())  # what a reader that fills in place hands back
    assert_states_equal(resumed.state_dict(), expected)


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    ema = EMA(Model())
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match="of another model: 1 names are in one of the two only, .*'scale'"):
        ema.load_state_dict({k: torch.zeros_like(v) for k, v in before.items() if k != "scale"})
    wrong = {k: torch.zeros_like(v) for k, v in before.items()} | {"decoder.0.bias": torch.zeros(9)}
    with pytest.raises(ValueError, match=r"decoder.0.bias has shape \(9,\) instead of \(4,\)"):
        ema.load_state_dict(wrong)
    assert_states_equal(ema.state_dict(), before)


def test_export_is_the_whole_model_and_independent_of_it() -> None:
    model = Model()
    ema = EMA(model, "encoder.")
    change(model)
    ema.update(0.7)
    weights, exported = state_of(model), ema.export()
    assert exported.keys() == weights.keys()
    averages = copy.deepcopy(ema.state_dict())
    assert_states_equal({k: exported[k] for k in averages}, averages)
    frozen = {k: v for k, v in weights.items() if k.startswith("encoder.")}
    assert_states_equal({k: exported[k] for k in frozen}, frozen)
    assert_states_equal(state_of(model), weights)
    change(model)
    ema.update(0.0)
    assert_states_equal({k: exported[k] for k in averages}, averages)
    assert not any(tensor.requires_grad for tensor in exported.values())


def test_shared_parameters_are_exported_under_both_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    ema = EMA(model)
    change(model)
    exported = ema.export()
    torch.testing.assert_close(exported["0.weight"], exported["1.weight"], rtol=0, atol=0)


def test_a_model_without_trained_tensors_has_an_empty_average() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, ("weight", "bias"))
    ema.update(0.5)
    with ema.applied():
        pass
    assert ema.state_dict() == {} and set(ema.export()) == {"weight", "bias"}


@pytest.mark.gpu
def test_updates_and_swaps_on_a_gpu_do_not_wait_for_it() -> None:
    model = Model().cuda()
    ema = EMA(model, "encoder.")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(0.5)
        with ema.applied():
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
