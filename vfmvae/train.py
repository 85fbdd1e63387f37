"""Train a tokenizer.

    python -m vfmvae.train --fused                         the demo: embedded photographs, minutes on a CPU
    python -m vfmvae.train --fused --data PATH             a folder of images instead
    python -m vfmvae.train --run-dir runs/demo --resume    go on after a stop

A run folder holds config.json, metrics.jsonl, checkpoints/, model.safetensors and reconstructions.png;
`vfmvae.load(run folder)` gives the tokenizer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vfmvae.cli import command
from vfmvae.config import LossConfig, TrainConfig
from vfmvae.data import ImageSource, open_data, validation_batches
from vfmvae.images import to_uint8, to_unit
from vfmvae.losses.alignment import adaptive_weight
from vfmvae.losses.reconstruction import l1_loss, multiscale_l1_loss
from vfmvae.metrics.reconstruction import psnr, ssim
from vfmvae.serialization import to_json
from vfmvae.tokenizer import Posterior, Tokenizer, TokenizerOutput
from vfmvae.tokenizer.files import write_model
from vfmvae.train_arguments import parse_arguments
from vfmvae.training.checkpoint import load_checkpoint, save_checkpoint
from vfmvae.training.device import compute_dtype, pick_device
from vfmvae.training.figures import save_reconstructions
from vfmvae.training.logging import TrainingLog
from vfmvae.training.optim import learning_rate
from vfmvae.training.run_folder import RunFolder
from vfmvae.training.state import TrainingState

HELD_OUT_IMAGES = 64


def generator_step(
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    draw: torch.Generator,
    weights: LossConfig,
) -> dict[str, Tensor]:
    """One update from images [B, 3, R, R] uint8; returns the losses, still on the device."""
    output = tokenizer(images, generator=draw)
    losses = tokenizer_losses(tokenizer, output, to_unit(images), weights)
    optimizer.zero_grad(set_to_none=True)
    losses["total"].backward()
    optimizer.step()
    return losses


def tokenizer_losses(
    tokenizer: Tokenizer, output: TokenizerOutput, images: Tensor, weights: LossConfig
) -> dict[str, Tensor]:
    """Every term that has a weight, unweighted, and their weighted sum as "total"."""
    losses = {"l1": l1_loss(output.reconstruction, images)}
    total = weights.l1 * losses["l1"]
    if weights.multiscale_l1:
        losses["multiscale_l1"] = multiscale_l1_loss(output.multiscale, images)
        total = total + weights.multiscale_l1 * losses["multiscale_l1"]
    if weights.alignment:
        losses["alignment"] = tokenizer.alignment_loss(output.latents, output.features)
        weight = weights.alignment
        if weights.adaptive_alignment:
            weight = weight * adaptive_weight(total, losses["alignment"], tokenizer.last_fusion_weight)
        total = total + weight * losses["alignment"]
    posterior = output.posterior
    if isinstance(posterior, Posterior):
        losses["kl"] = posterior.kl().mean()
        total = total + weights.kl * losses["kl"]
    else:
        losses["quantization"], losses["entropy"] = posterior.quantization_loss, posterior.entropy_loss
        total = total + weights.quantization * losses["quantization"] + weights.entropy * losses["entropy"]
    return losses | {"total": total}


@dataclass
class Evaluation:
    """Held-out images, their reconstructions (uint8 [N, 3, R, R]) and mean quality."""

    images: Tensor
    reconstructions: Tensor
    psnr: float
    ssim: float


@torch.no_grad()
def evaluate(
    tokenizer: Tokenizer, held_out: ImageSource, batch_size: int, device: torch.device
) -> Evaluation:
    """Reconstruct held-out images from the posterior's mode."""
    tokenizer.eval()
    originals, reconstructions = [], []
    for batch in validation_batches(held_out, batch_size):
        images = batch["image"].to(device)
        originals.append(images)
        reconstructions.append(to_uint8(tokenizer.decode(tokenizer.encode(images).mode())))
        if sum(len(images) for images in originals) >= HELD_OUT_IMAGES:
            break
    tokenizer.train()
    a, b = torch.cat(originals)[:HELD_OUT_IMAGES], torch.cat(reconstructions)[:HELD_OUT_IMAGES]
    return Evaluation(
        a, b, psnr(to_unit(b), to_unit(a)).mean().item(), ssim(to_unit(b), to_unit(a)).mean().item()
    )


def train(config: TrainConfig, folder: RunFolder, console: Console) -> None:
    """Train from the folder's newest checkpoint, or from the start, to the last step."""
    started = time.perf_counter()
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(config.tokenizer, fused=config.fused).to(device).train()
    tokenizer.compute_dtype = compute_dtype(config.dtype, device)
    data = open_data(config.data, "train", config.tokenizer.resolution, config.seed)
    held_out = open_data(config.data, "validation", config.tokenizer.resolution, config.seed)
    parameters = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        parameters, lr=config.optimizer.learning_rate, betas=config.optimizer.betas, fused=True
    )
    state = TrainingState(tokenizer, "encoder.", optimizer)
    checkpoint = folder.newest_checkpoint()
    if checkpoint is not None:
        load_checkpoint(checkpoint, state)
        folder.forget_after(state.step)
    else:
        first = evaluate(tokenizer, held_out, config.batch_size, device)
        state.initial = {"psnr": first.psnr, "ssim": first.ssim}
    _announce(console, config, folder, state.step, tokenizer)

    log = TrainingLog(folder.metrics, console, state.step, config.steps, config.log_every, config.batch_size)
    draw = torch.Generator(device)
    try:
        with log:
            for step in range(state.step, config.steps):
                rate = learning_rate(config.optimizer, step / config.steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                images = data.batch(step, config.batch_size)["image"].to(device, non_blocking=True)
                draw.manual_seed(
                    config.seed * 1_000_003 + step
                )  # draws depend on the step alone, so resume is exact
                losses = generator_step(tokenizer, optimizer, images, draw, config.losses)
                state.step = step + 1
                log.step(state.step, losses, rate)
                if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                    save_checkpoint(folder.checkpoints, state.step, state)
    except KeyboardInterrupt:
        save_checkpoint(folder.checkpoints, state.step, state)
        console.print(f"stopped at step {state.step}; go on with: {folder.resume_command()}", soft_wrap=True)
        raise
    save_checkpoint(folder.checkpoints, state.step, state)
    last = evaluate(tokenizer, held_out, config.batch_size, device)
    folder.write(folder.model, lambda path: write_model(tokenizer, path))
    folder.write(folder.figure, lambda path: save_reconstructions(path, last.images, last.reconstructions))
    _summarise(console, state.initial, last, time.perf_counter() - started, folder)


def _announce(
    console: Console, config: TrainConfig, folder: RunFolder, step: int, tokenizer: Tokenizer
) -> None:
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    device = tokenizer.align.weight.device
    console.print(
        f"{folder.path}: {trained / 1e6:.1f} M trained parameters, {config.tokenizer.resolution} px,"
        f" batch {config.batch_size}, {device}, {tokenizer.dtype},"
        f" {'fused' if config.fused else 'reference'} operations, from step {step}",
        highlight=False,
        soft_wrap=True,
    )


def _summarise(
    console: Console, initial: dict[str, float], last: Evaluation, seconds: float, folder: RunFolder
) -> None:
    table = Table(title="held-out images", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("PSNR (dB)", f"{initial['psnr']:.2f}", f"{last.psnr:.2f}")
    table.add_row("SSIM", f"{initial['ssim']:.3f}", f"{last.ssim:.3f}")
    table.add_row("seconds", "", f"{seconds:.0f}")
    console.print(table)
    for what, path in (
        ("reconstructions", folder.figure),
        ("tokenizer", folder.model),
        ("metrics", folder.metrics),
    ):
        console.print(f"{what:16}{path}", highlight=False, soft_wrap=True)


@command
def main() -> None:
    launch, folder = parse_arguments()
    if launch.dry_run:
        print(to_json(launch.run), end="")
        return
    if launch.run.losses.unavailable():
        terms = launch.run.losses.unavailable()
        raise ValueError(
            f"losses.{' and losses.'.join(terms)}: not yet available; to train without:"
            f" {' '.join(f'--losses.{term} 0' for term in terms)}"
        )
    if launch.resume:
        folder.resume(to_json(launch.run))
    else:
        folder.start(to_json(launch.run))
    train(launch.run, folder, Console())


if __name__ == "__main__":
    main()
