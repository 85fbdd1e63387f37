"""What stands before the diffusion models of convergence.py: images, encoder, classifier, three tokenizers.

Images are 64 px scenes, uint8 until a model sees them; latents [B, z, h, w].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae.data import ImageBatch, Scenes
from vfmvae.encoders import EncoderConfig
from vfmvae.encoders.base import ViTConfig
from vfmvae.images import to_uint8, to_unit
from vfmvae.losses.alignment import gradient_ratio
from vfmvae.losses.reconstruction import l1_loss, multiscale_l1_loss
from vfmvae.pretrain_mini import RESOLUTION, WIDTH, build_mini, encode
from vfmvae.tokenizer import (
    BottleneckConfig,
    DecoderConfig,
    FusionConfig,
    Posterior,
    Tokenizer,
    TokenizerConfig,
)

Kind = Literal["plain", "distilled", "vfm"]
KINDS: tuple[Kind, ...] = ("plain", "distilled", "vfm")
NAMES = {"plain": "(a) plain VAE", "distilled": "(b) distilled", "vfm": "(c) VFM-VAE"}
ALIGNMENT = {"plain": 0.0, "distilled": 0.5, "vfm": 1.0}
"""Of the VF loss, times the adaptive weight: of VA-VAE's first stage and VFM-VAE's weak one; margins 0."""
ADAPTIVE_EVERY = 8  # steps between measurements of the adaptive weight
KL = 1e-6
PART = 64  # images of a pool that are drawn or encoded at a time

Advance = Callable[[], None]


# Images ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Scenes that are drawn beforehand: what training takes its batches from."""

    images: Tensor  # uint8 [N, 3, R, R]
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, step: int, batch_size: int) -> ImageBatch:
        """Random images by the number of the step, the same on every device."""
        chosen = torch.randint(len(self), (batch_size,), generator=torch.Generator().manual_seed(step))
        place = chosen.to(self.images.device)
        images, labels = self.images[place], self.labels[place]
        return {"image": images, "label": labels, "key": [], "number": chosen.tolist(), "faults": []}


def draw_pool(count: int, resolution: int, seed: int, device: torch.device, threads: int) -> Pool:
    source = Scenes("train", resolution, seed)
    parts = [range(start, min(start + PART, count)) for start in range(0, count, PART)]
    with ThreadPoolExecutor(threads) as pool:
        batches = list(pool.map(source.read, parts))
    images = torch.cat([batch["image"].contiguous() for batch in batches])
    return Pool(images.to(device), torch.cat([batch["label"] for batch in batches]).to(device))


def in_parts(images: Tensor, size: int = 4 * PART) -> Iterator[Tensor]:
    """In [-1, 1]."""
    return (to_unit(part) for part in images.split(size))


# The classifier -------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A convolutional network that knows nothing of the encoder: images -> features [B, D] -> logits.

    It looks at 32 px, where scenes still show what they are. Batch norm, since with group norm it learnt
    next to nothing in the steps that a CPU has time for.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside, stride in ((3, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
            for c_in, by in ((inside, stride), (outside, 2 if stride == 1 else 1)):
                layers += [nn.Conv2d(c_in, outside, 3, by, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(F.avg_pool2d(images, 2)).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train_classifier(model: Classifier, pool: Pool, steps: int, batch_size: int) -> None:
    """Trained with labels, the only model here that sees them beside the diffusion models.

    Batches are turned by quarters, which no class minds.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    for step in range(steps):
        batch = pool.batch(step, batch_size)
        images = to_unit(batch["image"]).rot90(step % 4, (2, 3))
        loss = F.cross_entropy(model(images), batch["label"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)


@torch.no_grad()
def classified(model: Classifier, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Features [N, D] of images uint8, and the share that is given its label."""
    features = torch.cat([model.features(part) for part in in_parts(images)])
    return features, (model.head(features).argmax(dim=1) == labels).double().mean().item()


def warmup_cosine(step: int, steps: int) -> float:
    return min((step + 1) / max(1, steps // 20), 0.5 * (1 + math.cos(math.pi * step / steps)))


# Tokenizers -----------------------------------------------------------------------------------------------


class TrainedEncoder(nn.Module):
    """The encoder of (a) and (b): the architecture of the frozen one, trained from nothing, and a head."""

    def __init__(self, depth: int, ratio: int, latent_channels: int, initial_logvar: float) -> None:
        super().__init__()
        self.trunk = build_mini(depth)
        self.ratio = ratio
        self.head = nn.Linear(WIDTH * ratio**2, 2 * latent_channels)
        nn.init.zeros_(self.head.bias)
        nn.init.constant_(self.head.bias[latent_channels:], initial_logvar)

    def forward(self, images: Tensor) -> Tensor:
        """Images -> moments [B, 2z, h, w]."""
        tokens = encode(self.trunk, images).transpose(1, 2)
        side = math.isqrt(tokens.shape[2])
        grid = F.pixel_unshuffle(tokens.unflatten(2, (side, side)), self.ratio)
        return self.head(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Arm(nn.Module):
    """One of the three tokenizers; frozen encoder, latent size and decoder are the same in all.

    `tokenizer` is the library's. (a) and (b) put a trained encoder in the place of its frozen one and its
    fusion; (b) and (c) hold their latents to the frozen one's features.
    """

    def __init__(self, kind: Kind, config: TokenizerConfig, encoder_state: dict[str, Tensor]) -> None:
        super().__init__()
        self.kind = kind
        self.tokenizer = Tokenizer(config, encoder_state)
        self.encoder: TrainedEncoder | None = None
        if kind != "vfm":
            self.tokenizer.fusion.requires_grad_(False)
            depth = len(self.tokenizer.encoder.blocks)  # type: ignore[attr-defined]
            logvar = config.bottleneck.initial_logvar
            self.encoder = TrainedEncoder(depth, self.tokenizer.fusion.ratio, config.latent_channels, logvar)
        if kind == "plain":
            self.tokenizer.align.requires_grad_(False)

    def posterior(self, images: Tensor, features: list[Tensor] | None) -> Posterior:
        if self.encoder is not None:
            return Posterior(self.encoder(images).float())
        assert features is not None
        side = self.tokenizer.config.resolution // self.tokenizer.config.downsample
        found = self.tokenizer.fuse(features, (side, side))
        assert isinstance(found, Posterior)
        return found

    @property
    def last_encoder_weight(self) -> Tensor:
        return self.tokenizer.last_fusion_weight if self.encoder is None else self.encoder.head.weight

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def tokenizer_config(
    depth: int, downsample: int, latent_channels: int, widths: int, decoder: DecoderConfig
) -> TokenizerConfig:
    vit = ViTConfig(WIDTH, depth, heads=4, patch_size=8, image_size=RESOLUTION, mlp_width=4 * WIDTH)
    return TokenizerConfig(
        encoder=EncoderConfig("mini", layers=(0, depth // 2, -1), scale_factor=1.0, vit=vit),
        fusion=FusionConfig(layer_widths=(widths,) * 3, decompress_factor=4),
        bottleneck=BottleneckConfig(initial_logvar=-6.0),
        decoder=decoder,
        resolution=RESOLUTION,
        latent_channels=latent_channels,
        downsample=downsample,
    )


def train_arm(arm: Arm, pool: Pool, steps: int, batch_size: int, advance: Advance) -> None:
    """L1 at every scale, KL, and the VF loss with its adaptive weight; the same images for every arm."""
    device = pool.images.device
    optimizer = torch.optim.Adam(arm.trained(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    generator = torch.Generator(device).manual_seed(0)
    balance = torch.ones((), device=device)
    arm.train()
    for step in range(steps):
        images = to_unit(pool.batch(step, batch_size)["image"])
        features = None if arm.kind == "plain" else arm.tokenizer.encoder(images).layers
        posterior = arm.posterior(images, features)
        latents = posterior.sample(generator=generator)
        image, smaller = arm.tokenizer.decode(latents, return_multiscale=True)
        reconstruction = l1_loss(image, images) + 0.1 * multiscale_l1_loss(smaller, images)
        loss = reconstruction + KL * posterior.kl().mean()
        if features is not None:
            alignment = arm.tokenizer.alignment_loss(latents, features)
            if step % ADAPTIVE_EVERY == 0:
                balance = _balance(reconstruction, alignment, latents, arm.last_encoder_weight)
            loss = loss + ALIGNMENT[arm.kind] * balance * alignment
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(arm.trained(), 1.0)
        optimizer.step()
        schedule.step()
        advance()
    arm.eval().requires_grad_(False)


def _balance(reconstruction: Tensor, alignment: Tensor, latents: Tensor, weight: Tensor) -> Tensor:
    """VA-VAE's adaptive weight; both losses reach the encoder's last weight through the latents alone."""
    at_weight = []
    for loss in (reconstruction, alignment):
        (at_latents,) = torch.autograd.grad(loss, latents, retain_graph=True)
        at_weight += torch.autograd.grad(latents, weight, at_latents, retain_graph=True)
    return gradient_ratio(*at_weight)


@dataclass(frozen=True)
class Encoded:
    """A pool's latents, and what the frozen encoder says of it."""

    latents: Tensor  # float32 [N, z, h, w], sampled, before normalisation
    means: Tensor  # [N, z], of the posterior's mean over positions


@torch.no_grad()
def encode_pool(arm: Arm, pool: Pool) -> Encoded:
    generator = torch.Generator(pool.images.device).manual_seed(1)
    latents, means = [], []
    for images in in_parts(pool.images):
        posterior = arm.posterior(images, arm.tokenizer.features(images) if arm.kind == "vfm" else None)
        latents.append(posterior.sample(generator=generator))
        means.append(posterior.mean.mean(dim=(2, 3)))
    return Encoded(torch.cat(latents), torch.cat(means))


@torch.no_grad()
def encoder_targets(tokenizer: Tokenizer, pool: Pool, patch: int) -> Tensor:
    """The frozen encoder's last tokens of a pool, averaged over each token of the diffusion models.

    `patch`: latent positions along one axis of such a token. [N, tokens, WIDTH].
    """
    side = tokenizer.config.resolution // tokenizer.config.downsample
    found = []
    for images in in_parts(pool.images):
        blank = torch.zeros(len(images), tokenizer.config.latent_channels, side, side, device=images.device)
        at_latents = tokenizer.alignment_pair(blank, tokenizer.features(images))[1]
        grid = at_latents.transpose(1, 2).unflatten(2, (side, side))
        found.append(F.avg_pool2d(grid, patch).flatten(2).transpose(1, 2))
    return torch.cat(found)


@torch.no_grad()
def reconstructed(arm: Arm, latents: Tensor) -> Tensor:
    """Latents -> images uint8."""
    return torch.cat([to_uint8(arm.tokenizer.decode(part)) for part in latents.split(4 * PART)])
