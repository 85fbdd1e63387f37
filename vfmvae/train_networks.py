"""The networks that a training configuration asks for, on the device that a run computes on.

Their values come from the configuration's seed. `pretrained` False gives frozen networks random values too,
where only speed and memory count.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vfmvae.config import TrainConfig
from vfmvae.discriminators import PatchDiscriminator, ProjectedDiscriminator
from vfmvae.discriminators.layers import LocalBatchNorm
from vfmvae.encoders import build_encoder
from vfmvae.encoders.fp8 import use_fp8
from vfmvae.losses.perceptual import LPIPS, VGG16, PerceptualNetwork, perceptual_network
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.files import build_with_weights
from vfmvae.tokenizer.parts import part_modules
from vfmvae.training.adversary import TERMS_OF, PatchAdversary, ProjectedAdversary
from vfmvae.training.distributed import world_size
from vfmvae.training.forward import Snapshot, TrainingForward
from vfmvae.training.joint import JointConfig, JointDiffusion
from vfmvae.training.regions import (
    compile_blocks,
    decoder_blocks,
    encoder_blocks,
    recompute_blocks,
    shard,
)
from vfmvae.training.stages import StageConfig


def build_forward(
    config: TrainConfig, device: torch.device, dtype: torch.dtype | None, pretrained: bool
) -> TrainingForward:
    """The tokenizer as a step calls it: compiled, sharded and recomputed as the engine's options say."""
    torch.manual_seed(config.seed)
    if config.initial is not None:
        tokenizer = build_initial(config, config.initial, device)
    else:
        tokenizer = Tokenizer(config.tokenizer, "pretrained" if pretrained else None, config.fused)
    tokenizer.train().to(device).compute_dtype = dtype
    tokenizer.encoder.always_bfloat16 = dtype == torch.bfloat16  # on a CPU too
    forward, engine = TrainingForward(tokenizer), config.engine
    if engine.fp8_encoder:
        use_fp8(tokenizer.encoder)
    of_encoder, of_decoder = encoder_blocks(tokenizer.encoder), decoder_blocks(tokenizer)
    if sharded(config):
        shard(forward, [of_encoder, of_decoder], methods=["reconstruct"])
    if engine.recompute:
        recompute_blocks(of_decoder, engine.compile)
    else:
        compile_blocks(of_decoder, engine.compile)
    compile_blocks(of_encoder, engine.compile)
    return forward


def build_initial(config: TrainConfig, initial: str, device: torch.device) -> Tokenizer:
    """The tokenizer with the weights of a saved one; ValueError where it is built otherwise."""
    with naming_initial(initial):
        return build_with_weights(config.tokenizer, initial, device, config.fused)


@contextmanager
def naming_initial(initial: str) -> Iterator[None]:
    """Says in a ValueError that it is about the weights that a run begins with."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"initial {initial}: {error}; build the run's tokenizer as that one (its config.json), or leave"
            f" initial out"
        ) from None


def build_joint(
    config: TrainConfig, joint: JointConfig, width: int, dtype: torch.dtype | None
) -> JointDiffusion:
    """The diffusion transformer that trains along: compiled and recomputed as the engine's options say.

    `width`: of the encoder; ValueError where the model has another.
    """
    torch.manual_seed(config.seed + 1)
    layer = config.tokenizer.encoder.layers.index(-1)
    model = JointDiffusion(joint, layer, width, config.fused, dtype)
    blocks = list(model.transformer.blocks)
    if config.engine.recompute:
        recompute_blocks(blocks, config.engine.compile)
    else:
        compile_blocks(blocks, config.engine.compile)
    return model


def sharded(config: TrainConfig) -> bool:
    """Whether each process keeps a part of the weights only."""
    return config.engine.parallel == "fsdp" and world_size() > 1


def build_perceptual(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, pretrained: bool
) -> PerceptualNetwork | None:
    """What the perceptual loss compares images by; None if no stage has one."""
    if not any(stage.losses.perceptual for stage in config.stages):
        return None
    options = config.perceptual
    network: PerceptualNetwork
    if options.network == "lpips-vgg" and not pretrained:
        network = LPIPS(VGG16(), dtype)
    else:
        network = perceptual_network(options.network, options.weights, dtype)
    return network.to(device).requires_grad_(False)


def evaluation_distances(
    config: TrainConfig, device: torch.device, perceptual: PerceptualNetwork | None
) -> dict[str, PerceptualNetwork]:
    """What evaluation measures beside PSNR and SSIM: LPIPS where the loss is that, else by `mini`."""
    if perceptual is not None and config.perceptual.network == "lpips-vgg":
        return {"lpips": perceptual}
    return {"mini_distance": perceptual_network("mini").to(device).requires_grad_(False)}


def build_games(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, pretrained: bool
) -> Iterator[tuple[str, ProjectedAdversary | PatchAdversary, StageConfig]]:
    """Name and module of each discriminator that some stage plays against, and the first such stage."""
    for number, (name, terms) in enumerate(TERMS_OF.items(), start=1):
        stages = [s for s in config.stages if any(getattr(s.losses, term) for term in terms)]
        if not stages:
            continue
        # A seed of its own, so that a discriminator does not change how the tokenizer begins.
        torch.manual_seed(config.seed + number)
        game: ProjectedAdversary | PatchAdversary
        if name == "projected":
            weights = "pretrained" if pretrained else None
            game = ProjectedAdversary(ProjectedDiscriminator(config.discriminator, weights, dtype))
        else:
            game = PatchAdversary(PatchDiscriminator(dtype=dtype))
        for module in game.modules():
            if isinstance(module, LocalBatchNorm):
                module.fused = config.fused
        yield name, game.to(device), stages[0]


def never_trained(config: TrainConfig, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Prefixes of the tokenizer's parameters that no stage trains."""
    trained: set[int] = set()
    for stage in config.stages:
        for part in stage.trains:
            trained |= {id(p) for m in part_modules(tokenizer, part) for p in m.parameters()}
    never = [name for name, p in tokenizer.named_parameters() if id(p) not in trained]
    encoder = "encoder."
    whole = all(id(p) not in trained for p in tokenizer.encoder.parameters())
    return (encoder, *(n for n in never if not n.startswith(encoder))) if whole else tuple(never)


def take_snapshot(
    config: TrainConfig, tokenizer: Tokenizer, stage: StageConfig, device: torch.device
) -> Snapshot:
    """The tokenizer's encoder side as it is now; `stage`: the one that it is compared with in."""
    encoder = tokenizer.encoder
    fusion, bottleneck = copy.deepcopy(tokenizer.fusion), copy.deepcopy(tokenizer.bottleneck)
    if "encoder" not in stage.trains:
        return Snapshot(fusion, bottleneck)
    # FSDP2 does not copy modules.
    copied = build_encoder(encoder.config, None) if sharded(config) else copy.deepcopy(encoder)
    snapshot, blocks = Snapshot(fusion, bottleneck, copied.to(device)), encoder_blocks(copied)
    if sharded(config):
        shard(snapshot, [blocks])
        copied.load_state_dict(encoder.state_dict())
    compile_blocks(blocks, config.engine.compile)
    return snapshot
