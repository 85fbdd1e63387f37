"""How much memory a stage of a run takes, estimated from models without values.

They are on the meta device, which knows shapes only, and one image goes through them. Counted is what graphs
keep for the backward pass with the reference operations; fused ones keep less. In the order of a step:

    tokenizer's forward     its graph stays until its backward pass
    discriminators' steps   one after another, on real images and reconstructions
    image losses            the perceptual network
    adversarial losses      all discriminators together, for the tokenizer
    joint transformer       its weights are counted, its graph is not
    backward pass           with engine.recompute the graph of one decoder block at a time
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vfmvae.config import TrainConfig
from vfmvae.discriminators import PatchDiscriminator, ProjectedDiscriminator
from vfmvae.discriminators.blur import Blur, reach_of
from vfmvae.losses.perceptual import LPIPS, VGG16, PerceptualNetwork, perceptual_network
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.equivariance import Equivariance
from vfmvae.tokenizer.parts import set_trained
from vfmvae.training.adversary import TERMS_OF, PatchAdversary, ProjectedAdversary
from vfmvae.training.device import DTYPES
from vfmvae.training.draws import StepDraws
from vfmvae.training.forward import StepOutput, TrainingForward
from vfmvae.training.joint import JointDiffusion
from vfmvae.training.regions import decoder_blocks
from vfmvae.training.stages import StageConfig

META = torch.device("meta")
AVERAGE, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes beside a parameter's own four: where it is averaged, and where it trains."""


class StageMemory(NamedTuple):
    """Bytes that a stage takes in one process."""

    fixed: int  # weights, gradients, moments, averages
    graphs: dict[str, int]  # of one image, when graphs keep most, by what they belong to

    @property
    def per_image(self) -> int:
        return sum(self.graphs.values())

    def total(self, images: int) -> int:
        """With so many images computed at once."""
        return self.fixed + images * self.per_image


class ForwardGraph(NamedTuple):
    """The tokenizer's forward of one image: its result, and bytes of its graph."""

    output: StepOutput
    kept: int  # until the backward pass
    again: int  # of the largest block that is computed again there


class GameGraph(NamedTuple):
    """Bytes of a discriminator's graphs of one image."""

    own: int  # for its own loss
    generator: int  # for the tokenizer's


class MetaRun:
    """A run's models without values."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises ValueError for parts that do not fit each other."""
        self.config = config
        self.dtype = planned_dtype(config)
        with META:
            self.tokenizer = Tokenizer(config.tokenizer, encoder_weights=None, fused=False).train()
        self.tokenizer.compute_dtype = self.dtype
        self.forward = TrainingForward(self.tokenizer)
        self.perceptual = self._build_perceptual()
        self.games = self._build_games()
        self._forwards: dict[tuple[Any, ...], ForwardGraph] = {}
        self._game_graphs: dict[tuple[Any, ...], GameGraph] = {}

    def _build_perceptual(self) -> PerceptualNetwork | None:
        if not any(stage.losses.perceptual for stage in self.config.stages):
            return None
        if self.config.perceptual.network != "lpips-vgg":
            return perceptual_network(self.config.perceptual.network, None, self.dtype).to(META)
        with META:
            vgg = VGG16()
        return LPIPS(vgg, self.dtype).to(META)

    def _build_games(self) -> dict[str, ProjectedAdversary | PatchAdversary]:
        games: dict[str, ProjectedAdversary | PatchAdversary] = {}
        if any(_plays("projected", stage) for stage in self.config.stages):
            # Its first power iterations are many small operations, which take longer without values.
            discriminator = ProjectedDiscriminator(self.config.discriminator, None, self.dtype)
            games["projected"] = ProjectedAdversary(discriminator.to(META))
        if any(_plays("patch", stage) for stage in self.config.stages):
            with META:
                games["patch"] = PatchAdversary(PatchDiscriminator(dtype=self.dtype))
        return games

    def enter_stage(self, number: int) -> tuple[StageMemory, StepOutput]:
        """Let the stage's parts train; its memory, and what its forward of one image gives.

        ValueError for a stage that cannot be.
        """
        stage, engine = self.config.stages[number], self.config.engine
        self._check_image_sizes(stage)
        fixed = self._fixed(number)
        set_trained(self.tokenizer, stage.trains)
        forward = self._forward_graph(stage)
        games = [self._game_graph(name, stage) for name in self.games if _plays(name, stage)]
        # Its graph is there in the discriminators' steps only where they use the same forward.
        shared = engine.share_forward and engine.accumulate == 1
        beside = forward.kept if shared else 0
        # Most of it leads through their backbones, and is there from the forward on.
        looking = sum(graph.generator for graph in games)
        moments = [
            {"tokenizer": forward.kept + forward.again},
            *({"tokenizer": beside, "discriminators": graph.own + looking * shared} for graph in games),
            {
                "tokenizer": forward.kept,
                "discriminators": looking,
                "perceptual network": self._perceptual_graph if stage.losses.perceptual else 0,
            },
        ]
        most = max(moments, key=lambda graphs: sum(graphs.values()))
        return StageMemory(fixed, {name: size for name, size in most.items() if size}), forward.output

    def _check_image_sizes(self, stage: StageConfig) -> None:
        """That shrunk images fit the encoder, too."""
        side = self.config.tokenizer.resolution
        for scale in stage.equivariance.image_scales if stage.equivariance.image_probability else ():
            self.tokenizer.encoder.grid(round(side * scale), round(side * scale))

    def _fixed(self, number: int) -> int:
        """Bytes that do not depend on the batch."""
        stages = self.config.stages
        trained = [set(set_trained(self.tokenizer, stage.trains).values()) for stage in stages]
        models = [m for m in (self.tokenizer, self.perceptual, *self.games.values()) if m is not None]
        total = sum(_bytes(x) for model in models for x in (*model.parameters(), *model.buffers()))
        if self.config.engine.fp8_encoder:  # a byte of each
            total += _count(p for b in self.tokenizer.encoder.blocks for p in b.parameters())
        total += AVERAGE * _count(set().union(*trained)) + (GRADIENT + MOMENTS) * _count(trained[number])
        for name, game in self.games.items():
            if any(_plays(name, stage) for stage in stages[: number + 1]):
                total += (GRADIENT + MOMENTS) * _count(p for p in game.parameters() if p.requires_grad)
        if self.config.joint is not None:
            with META:
                joint = JointDiffusion(self.config.joint, 0, self.tokenizer.encoder.width, False, None)
            total += (4 + AVERAGE + GRADIENT + MOMENTS) * _count(joint.parameters())
        if stages[number].losses.preservation:
            encoder = [self.tokenizer.encoder] if "encoder" in stages[number].trains else []
            total += sum(_bytes(p) for part in (self.tokenizer.fusion, *encoder) for p in part.parameters())
        return total

    def _forward_graph(self, stage: StageConfig) -> ForwardGraph:
        align = bool(stage.losses.alignment)
        key = (stage.trains, align)
        if key not in self._forwards:
            self._forwards[key] = self._measured_forward(align)
        return self._forwards[key]

    def _measured_forward(self, align: bool) -> ForwardGraph:
        side = self.config.tokenizer.resolution
        latent_side = side // self.config.tokenizer.downsample
        with META, graph_of(self.tokenizer) as kept, block_graphs(self.tokenizer, kept) as blocks:
            noise = torch.empty(1, self.config.tokenizer.latent_channels, latent_side, latent_side)
            output = self.forward(torch.empty(1, 3, side, side), noise, Equivariance(), align)
        if not self.config.engine.recompute:
            return ForwardGraph(output, sum(kept.values()), 0)
        for block in blocks:
            for storage in block.kept:
                del kept[storage]
            if block.kept:  # what is frozen has no graph
                kept.update(block.inputs)
        again = max(sum(block.kept.values()) for block in blocks)
        return ForwardGraph(output, sum(kept.values()), again)

    @cached_property
    def _perceptual_graph(self) -> int:
        assert self.perceptual is not None
        fake, real = self._images()
        with META, graph_of(self.perceptual) as kept:
            self.perceptual(fake, real)
        return sum(kept.values())

    def _game_graph(self, name: str, stage: StageConfig) -> GameGraph:
        # Those of the whole stage, whatever its schedules leave out at times.
        terms = (*TERMS_OF[name], "r1")
        weights = {term: 1.0 for term in terms if getattr(stage.losses, term)}
        key = (name, *weights, stage.blur_sigma)
        if key not in self._game_graphs:
            self._game_graphs[key] = self._measured_game(name, weights, stage.blur_sigma)
        return self._game_graphs[key]

    def _measured_game(self, name: str, weights: dict[str, float], sigma: float) -> GameGraph:
        game, (fake, real), draws = self.games[name], self._images(), StepDraws(0, 0, META, 0, 1, 1)
        blur = Blur(torch.full((), sigma, device=META), reach_of(sigma)) if sigma else None
        with META, graph_of(game) as own:
            game(real, game.look(fake.detach(), draws, blur), draws, blur, weights)
        with META, graph_of(game) as generator:
            game.generator_losses(game.look(fake, draws, blur), real, blur, weights)
        return GameGraph(sum(own.values()), sum(generator.values()))

    def _images(self) -> tuple[Tensor, Tensor]:
        """A reconstruction and its target."""
        shape = (1, 3, *[self.config.tokenizer.resolution] * 2)
        return torch.empty(shape, device=META, requires_grad=True), torch.empty(shape, device=META)


def planned_dtype(config: TrainConfig) -> torch.dtype:
    """What activations will be computed in: "auto" is that of a GPU unless the run is for the CPU."""
    if config.dtype == "auto":
        return torch.float32 if config.device.startswith("cpu") else torch.bfloat16
    return DTYPES[config.dtype]


@contextmanager
def graph_of(*models: nn.Module) -> Iterator[dict[int, int]]:
    """While entered, collect what graphs keep for the backward pass: bytes by storage, without the models'
    parameters."""
    parameters = {_storage(p) for model in models for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or another tensor takes the same address

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in parameters:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FusedAttention():
        yield kept


class _FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch's attention takes its plain form, which keeps a number for each pair of
    tokens; on any real one it does not."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        options = options or {}
        plain = function is not F.scaled_dot_product_attention or arguments[0].device != META
        if plain or not torch.backends.cuda.flash_sdp_enabled():  # sdpa_kernel(MATH), for a double backward
            return function(*arguments, **options)
        query, key, value = arguments[:3]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, attn_mask=options.get("attn_mask"))[0]


class BlockGraph(NamedTuple):
    """Bytes by storage."""

    inputs: dict[int, int]
    kept: dict[int, int]  # by the block's graph and nothing before it, without the inputs


@contextmanager
def block_graphs(tokenizer: Tokenizer, kept: dict[int, int]) -> Iterator[list[BlockGraph]]:
    """While entered, divide what `graph_of` collects: a graph for each decoder block that runs."""
    found: list[BlockGraph] = []
    before: set[int] = set()
    alive: list[Any] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        before.clear()
        before.update(kept)
        alive.append(inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        found.append(BlockGraph({_storage(x): x.untyped_storage().nbytes() for x in tensors}, {}))

    def leave(module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        alive.append(outputs)
        block = found[-1]
        block.kept.update(
            {key: size for key, size in kept.items() if key not in before and key not in block.inputs}
        )

    hooks = []
    for block in decoder_blocks(tokenizer):
        hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _plays(name: str, stage: StageConfig) -> bool:
    """Whether a discriminator has a loss in a stage."""
    return any(getattr(stage.losses, term) for term in TERMS_OF[name])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
