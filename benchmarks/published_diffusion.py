"""The published form of a diffusion transformer and of its training step, which ours is measured against.

The same layers from the same weights (`fused=False`), as SiT, REPA and LightningDiT compute them: attention
by PyTorch's scaled_dot_product_attention, parameters in float32 under autocast, so that products are in the
low precision while the residual sum, norms and modulation are float32. A step is theirs too: AdamW with
torch's default loops, torch's clipping of the gradients, and an average of the weights that goes from tensor
to tensor. What they compute only to print it is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.diffusion import DiffusionTransformer, TransformerConfig
from vfmvae.diffusion.blocks import Attention, DiTBlock, _qk_norm
from vfmvae.diffusion.embeddings import linear
from vfmvae.diffusion_config import DiffusionConfig
from vfmvae.diffusion_step import weighted
from vfmvae.training.diffusion_forward import DiffusionForward, DiffusionInputs
from vfmvae.training.draws import StepDraws

AVERAGE = 0.9999
"""Of the average of the weights, what a step keeps."""


class PublishedAttention(Attention):
    """With PyTorch's attention, where the reference of the operation writes out the softmax."""

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, fused: bool) -> Tensor:
        qkv = linear(x, self.qkv)
        if self.q_norm is None and rotation is None:
            query, key, value = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        else:
            norms = _qk_norm(self.q_norm), _qk_norm(self.k_norm)
            query, key, value = ops.qk_norm_rope(qkv, self.heads, *norms, rotation, fused=False)
        y = F.scaled_dot_product_attention(query, key, value)
        return linear(y.transpose(1, 2).flatten(2), self.proj)


def published_transformer(
    config: TransformerConfig, weights: Mapping[str, Tensor], device: torch.device
) -> DiffusionTransformer:
    """The model with a copy of these weights."""
    with torch.device(device):  # where random numbers that nobody needs take no time
        model = DiffusionTransformer(config, fused=False)
        for block in model.blocks:
            assert isinstance(block, DiTBlock)
            block.attn = PublishedAttention(config)
    model.load_state_dict(weights)
    return model.train()


class PublishedStep:
    """The model, what trains it, and the average of its weights."""

    def __init__(
        self,
        model: DiffusionTransformer,
        config: DiffusionConfig,
        inputs: DiffusionInputs,
        draws: Callable[[], StepDraws],
        low: torch.dtype,
    ) -> None:
        """
        Args:
            inputs: of every step.
            draws: gives its random numbers.
            low: what autocast computes products in; float32 for no autocast.
        """
        self.model, self.inputs, self.draws, self.low = model, inputs, draws, low
        self.stage, self.clip_norm = config.stages[0], config.engine.clip_norm
        settings = self.stage.optimizer
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self.averages = {name: p.detach().clone() for name, p in model.named_parameters()}

    def __call__(self) -> dict[str, Tensor]:
        """One update; returns the losses, unweighted."""
        weights = self.stage.losses.weights()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            losses = DiffusionForward(self.model)(self.inputs, self.stage, self.draws(), weights.keys())
        weighted(losses, weights).backward()
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.averages[name].mul_(AVERAGE).add_(parameter, alpha=1 - AVERAGE)
        return {name: loss.detach() for name, loss in losses.items()}

    def on(self, model: DiffusionTransformer) -> PublishedStep:
        """The same step of another model with the same parameters."""
        step = copy.copy(self)
        step.model = model
        return step

    def tensors(self) -> list[Tensor]:
        """What stays in memory beside weights and gradients."""
        moments = [v for state in self.optimizer.state.values() for v in state.values() if v.ndim]
        return [*moments, *self.averages.values()]

    def autocast(self) -> torch.autocast:
        """Products in the low precision; does nothing for float32."""
        kind = self.inputs.latents.device.type
        if self.low == torch.float32:
            return torch.autocast(kind, enabled=False)
        return torch.autocast(kind, dtype=self.low)
