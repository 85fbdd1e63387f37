"""Train `mini`, the small frozen encoder in this repository, on the embedded photographs without labels.

    python -m vfmvae.pretrain_mini --output mini.safetensors

Every step draws places (128 px crops of the training regions) and two 64 px views of each, with their own
crop, mirroring, colours and blur; the second view also loses a part of its patches. Three terms:

    scene   the pooled features of two views of one place are closer than those of other places (SimCLR,
            arXiv 2002.05709)
    place   a patch is closer to the features of the other view at its own spot in the photograph than to
            those elsewhere in that view (DenseCL, arXiv 2011.09157; here the geometry gives the pairs)
    pixels  a linear map of the patch tokens gives back the patch, missing ones included (SimMIM,
            arXiv 2111.09886), so that the tokens keep what a decoder needs

Images are [B, 3, 64, 64] in [-1, 1].
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vfmvae.atomic import write_atomically
from vfmvae.cli import command, parse, usage
from vfmvae.data import ImageBatch, Photographs
from vfmvae.data.views import Views, draw_views, grid_points, to_grey
from vfmvae.images import to_unit
from vfmvae.training.device import compute_dtype, pick_device

RESOLUTION = 64
PATCH = 8
GRID = RESOLUTION // PATCH
PLACE_RESOLUTION = 128
WIDTH = 128
HIDDEN_SHARE = 0.3
LOG_EVERY = 50
TEMPERATURE = 0.1
LOSS_WEIGHTS = {"scene": 1.0, "place": 1.0, "pixels": 4.0}


@dataclass(frozen=True)
class PretrainConfig:
    """Train `mini`, write it, and print how it compares with random weights.
    Example: python -m vfmvae.pretrain_mini --output mini.safetensors
    """

    output: Path = Path("mini.safetensors")
    """file to write"""
    steps: int = 2000
    """optimizer steps"""
    seed: int = 0
    """of the weights, the crops and the augmentations"""
    batch_size: int = 64
    """places per step, two views each"""
    device: str = "auto"
    """where to train: a torch device, or auto for CUDA where there is one"""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """of the matrix products; parameters stay fp32"""
    learning_rate: float = 1.5e-3
    """peak, after a warm-up of a twentieth of the steps; a cosine brings it to zero"""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")
        if self.batch_size < 2:
            raise ValueError(f"batch_size {self.batch_size} must be at least 2: places tell each other apart")
        if self.output.is_dir():
            raise ValueError(f"output {self.output} is a folder; name the file to write")


def build_mini(depth: int = 6) -> VisionTransformer:
    """The architecture of `mini` with random weights: patch 8, width 128, 6 blocks, 1.2 M parameters."""
    return VisionTransformer(
        img_size=RESOLUTION,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=depth,
        num_heads=4,
        mlp_ratio=4,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
    )


def random_mini(seed: int) -> VisionTransformer:
    """`mini` before training, in eval mode: what its measures are compared with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_mini().eval()


# Losses ---------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """What training needs beside the encoder and nobody keeps: projections, the pixel map, the mask token."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, WIDTH))
        self.place = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
        self.pixels = nn.Linear(WIDTH, 3 * PATCH * PATCH)
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))


def encode(model: VisionTransformer, images: Tensor) -> Tensor:
    """Patch tokens [B, N, C] after the final norm."""
    return _encode_patches(model, model.patch_embed(images))


def _encode_patches(model: VisionTransformer, patches: Tensor) -> Tensor:
    assert model.pos_embed is not None
    return model.norm(model.blocks(patches + model.pos_embed))


def scene_loss(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric InfoNCE over the batch: row i of `first` [B, C] belongs to row i of `second` [B, C]."""
    first, second = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
    logits = first @ second.t() / TEMPERATURE
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target))


def place_loss(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
    """InfoNCE within each image: token n of `first` [B, N, C] belongs to the point target[:, n] of `second`.

    target: [B, N, 2] in the coordinates of the second view; tokens whose point is outside take no part.
    Points less than a patch away are neither right nor wrong.
    """
    side = math.isqrt(second.shape[1])
    maps = second.float().transpose(1, 2).unflatten(2, (side, side))
    sampled = F.grid_sample(maps, target[:, :, None], mode="bilinear", align_corners=False)  # [B, C, N, 1]
    keys = F.normalize(sampled.squeeze(3).transpose(1, 2), dim=-1)
    inside = (target.abs() <= 1 - 1 / side).all(dim=-1)  # [B, N]
    own = torch.eye(first.shape[1], dtype=torch.bool, device=first.device)
    near = ((target[:, :, None] - target[:, None]).abs() < 2 / side).all(dim=-1) & ~own  # [B, N, N]
    logits = F.normalize(first.float(), dim=-1) @ keys.transpose(1, 2) / TEMPERATURE
    logits = logits.masked_fill(near | ~inside[:, None], -torch.inf)
    if not inside.any():
        return logits.new_zeros(())
    return F.cross_entropy(logits[inside], own.nonzero()[:, 1].expand_as(inside)[inside])


def pixel_loss(predicted: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of predicted patches [B, N, 3 * 64] against the patches of images [B, 3, H, W]."""
    return F.mse_loss(predicted.float(), F.unfold(images, PATCH, stride=PATCH).transpose(1, 2))


def pretraining_losses(
    model: VisionTransformer,
    heads: Heads,
    first: Views,
    second: Views,
    hidden: Tensor,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The three terms, unweighted; patches of the second view where `hidden` [B, N] is true are not seen.

    The networks run under autocast to `dtype` (None: float32), the losses in float32.
    """
    points = grid_points(GRID, hidden.device).expand(len(hidden), -1, -1)
    target = second.from_place(first.to_place(points))
    with torch.autocast(hidden.device.type, dtype=dtype, enabled=dtype is not None):
        patches = model.patch_embed(second.images)
        patches = torch.where(hidden[..., None], heads.mask_token.to(patches.dtype), patches)
        a, b = encode(model, first.images), _encode_patches(model, patches)
        scenes = heads.scene(a.mean(dim=1)), heads.scene(b.mean(dim=1))
        places = heads.place(a), heads.place(b)
        pixels = heads.pixels(b)
    return {
        "scene": scene_loss(*scenes),
        "place": place_loss(*places, target),
        "pixels": pixel_loss(pixels, second.images),
    }


# Training -------------------------------------------------------------------------------------------------


class Places(Protocol):
    """Where places come from: uint8 [B, 3, 128, 128] by the number of the step, as of an `ImageSource`."""

    def batch(self, step: int, batch_size: int, /) -> ImageBatch: ...


def pretrain(
    config: PretrainConfig, console: Console, places: Places | None = None, depth: int = 6
) -> VisionTransformer:
    """The trained encoder in eval mode on the CPU; the same for the same config on the same machine.

    `places`: if not given, the embedded photographs. `depth`: blocks of the encoder.
    """
    torch.manual_seed(config.seed)
    with usage():
        device = pick_device(config.device)
    if places is None:
        places = Photographs("train", PLACE_RESOLUTION, config.seed)
    model, heads = build_mini(depth).to(device), Heads().to(device)
    parameters = [*model.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, config.steps))
    with Progress(console=console) as progress:
        task = progress.add_task("pretraining mini", total=config.steps)
        for step, losses in enumerate(_losses(config, places, model, heads, device)):
            total = torch.stack([LOSS_WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1)
            if step % LOG_EVERY == 0 or step == config.steps - 1:
                values = {name: loss.item() for name, loss in losses.items()}
                if not all(math.isfinite(value) for value in values.values()):
                    raise FloatingPointError(
                        f"losses {values} at step {step} are not finite; try --dtype fp32"
                    )
                line = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                console.print(f"step {step:5d}  {line}", highlight=False)
    return model.eval().cpu()


def _losses(
    config: PretrainConfig, source: Places, model: VisionTransformer, heads: Heads, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The losses of every step, computed when asked for: with the parameters as they are then."""
    generator = torch.Generator().manual_seed(config.seed)
    dtype = compute_dtype(config.dtype, device)
    for step in range(config.steps):
        places = to_unit(source.batch(step, config.batch_size)["image"]).contiguous().to(device)
        first, second = draw_views(places, RESOLUTION, generator), draw_views(places, RESOLUTION, generator)
        hidden = (torch.rand(config.batch_size, GRID * GRID, generator=generator) < HIDDEN_SHARE).to(device)
        yield pretraining_losses(model, heads, first, second, hidden, dtype)


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def save_mini(model: VisionTransformer, config: PretrainConfig) -> None:
    """Write the weights in float16 under their timm names; the header says what they are and whence."""
    state = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "what": "vfmvae encoder `mini`: ViT, 64 px, patch 8, width 128, depth 6, 4 heads; images in [-1, 1]",
        "trained_on": "training regions of the photographs in scikit-image, self-supervised",
        "command": f"python -m vfmvae.pretrain_mini --steps {config.steps} --seed {config.seed} "
        f"--batch-size {config.batch_size} --dtype {config.dtype} --learning-rate {config.learning_rate}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
        "license": "Apache-2.0",
    }

    def write(path: Path) -> None:
        path.write_bytes(save(state, metadata=metadata))

    write_atomically(config.output, write)


# Measures -------------------------------------------------------------------------------------------------


@torch.no_grad()
def linear_probe(model: VisionTransformer, train_crops: int = 2048, seed: int = 1) -> float:
    """Share of held-out crops whose scene a linear classifier on the mean-pooled tokens names.

    Ridge regression onto one-hot scenes, trained on crops of the training regions and tested on the
    validation crops. Every crop is grey with random brightness and contrast: colour and exposure do not tell.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = Photographs("train", RESOLUTION, seed), Photographs("validation", RESOLUTION)

    def features(source: Photographs, count: int) -> tuple[Tensor, Tensor]:
        batch = source.batch(0, count)
        grey = to_grey(to_unit(batch["image"]))
        mean = grey.mean(dim=(1, 2, 3), keepdim=True)
        contrast, brightness = torch.rand(2, count, 1, 1, 1, generator=generator)
        grey = mean + (0.5 + contrast) * (grey - mean) + 0.6 * (brightness - 0.5)
        images = grey.clamp(-1, 1).expand(-1, 3, -1, -1)
        pooled = torch.cat([encode(model, part).mean(dim=1) for part in images.split(256)])
        return pooled.double(), batch["label"]

    x, y = features(train, train_crops)
    u, v = features(test, len(test))
    mean, scale = x.mean(dim=0), x.std(dim=0)
    x, u = (x - mean) / scale, (u - mean) / scale
    one_hot = F.one_hot(y, len(train.classes)).double()
    one_hot_mean = one_hot.mean(dim=0)
    ridge = 1e-4 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(x.t() @ x + ridge, x.t() @ (one_hot - one_hot_mean))
    return ((u @ weight + one_hot_mean).argmax(dim=1) == v).double().mean().item()


@torch.no_grad()
def patch_retrieval(model: VisionTransformer, places: int = 128, seed: int = 1) -> float:
    """Share of patch tokens whose most similar token in another view of the place is at most one patch off.

    The views of held-out places are augmented like those of training (`draw_views`); similarity is the cosine
    after the mean token of each view is taken away.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = Photographs("validation", PLACE_RESOLUTION)
    images = to_unit(held_out.batch(0, places)["image"]).contiguous()
    first, second = draw_views(images, RESOLUTION, generator), draw_views(images, RESOLUTION, generator)
    tokens = [encode(model, view.images) for view in (first, second)]
    a, b = (F.normalize(t - t.mean(dim=1, keepdim=True), dim=-1) for t in tokens)
    points = grid_points(GRID, images.device).expand(len(images), -1, -1)
    target = second.from_place(first.to_place(points))
    found = points.gather(1, (a @ b.transpose(1, 2)).argmax(dim=2)[..., None].expand(-1, -1, 2))
    near = ((found - target).abs() <= 2 / GRID).all(dim=-1)
    inside = (target.abs() <= 1 - 1 / GRID).all(dim=-1)
    return near[inside].double().mean().item()


@command
def main() -> None:
    """Train `mini`, write it, and print how it compares with random weights."""
    config = parse(PretrainConfig, "pretrain_mini")
    console = Console()
    model = pretrain(config, console)
    save_mini(model, config)
    console.print(f"wrote {config.output}", highlight=False, soft_wrap=True)
    table = Table("", "scene probe", "patch retrieval", title="held-out regions (%)", title_justify="left")
    models = {"mini": model} | {f"random weights, seed {seed}": random_mini(seed) for seed in range(3)}
    for name, candidate in models.items():
        table.add_row(name, f"{100 * linear_probe(candidate):.1f}", f"{100 * patch_retrieval(candidate):.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
