"""A run small enough for tests of checkpoints: two modules, two optimizers, averaged weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vfmvae.training.state import TrainingState


class Model(nn.Module):
    """A frozen part, a trained one with odd sizes, and a buffer that training moves."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 7).requires_grad_(False)
        self.decoder = nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 1))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(inputs.mean().expand(3), 0.1)
        return self.decoder(self.encoder(inputs))


class Average:
    """Weights averaged over steps; its tensors are sharded if the model's are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self.average[name].lerp_(parameter.detach(), 0.3)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(state[name])


class Run:
    """A model, a critic, their optimizers and the average; `state` is what checkpoints hold."""

    def __init__(self, model: nn.Module, critic: nn.Module, average: Average) -> None:
        """The modules as they train: plain, wrapped or sharded."""
        self.model, self.critic, self.average = model, critic, average
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = {
            "generator": torch.optim.Adam(trained, lr=0.05, fused=True),
            "critic": torch.optim.SGD(critic.parameters(), lr=0.05, momentum=0.9),
        }
        self.state = TrainingState(
            {"model": model, "critic": critic},
            self.optimizers,
            {"average": average},
            frozen=("model.encoder.",),
        )

    def step(self, critic: bool = True) -> None:
        """One update, from inputs that the step's number gives."""
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.state.step))
        inputs = inputs.to(next(self.model.parameters()).device)
        loss = self.critic(self.model(inputs)).square().mean()
        loss.backward()
        for name, optimizer in self.optimizers.items():
            if critic or name != "critic":
                optimizer.step()
            optimizer.zero_grad()
        self.average.update()
        self.state.step += 1

    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything that a checkpoint holds."""
        return {name: tensor.detach().clone() for name, tensor in self.state.tensors().items()}


def modules(seed: int, width: int = 5) -> tuple[Model, nn.Linear]:
    """A model, whose frozen part does not depend on the seed, and a critic."""
    torch.manual_seed(0)
    encoder = Model().encoder
    torch.manual_seed(seed)
    model = Model(width)
    model.encoder.load_state_dict(encoder.state_dict())
    return model, nn.Linear(1, 3)


def small_run(seed: int = 1, width: int = 5, device: str = "cpu") -> Run:
    """A run in one process."""
    model, critic = (module.to(device) for module in modules(seed, width))
    return Run(model, critic, Average(model))


def assert_equal_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, and bit for bit the same values."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
