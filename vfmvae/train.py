"""Train a tokenizer.

    python -m vfmvae.train --fused                         the demo: embedded photographs, minutes on a CPU
    python -m vfmvae.train --fused --data PATH             a folder of images instead
    python -m vfmvae.train --run-dir runs/demo --resume    go on after a stop

A run folder holds config.json, metrics.jsonl, checkpoints/, model.safetensors and reconstructions.png;
`vfmvae.load(run folder)` gives the tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

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
from vfmvae.tokenizer import DiscretePosterior, Posterior, Tokenizer, TokenizerOutput
from vfmvae.tokenizer.files import write_model
from vfmvae.train_arguments import parse_arguments
from vfmvae.training.checkpoint import load_checkpoint, save_checkpoint, step_of
from vfmvae.training.device import compute_dtype, pick_device
from vfmvae.training.figures import save_reconstructions
from vfmvae.training.logging import TrainingLog
from vfmvae.training.optim import learning_rate, set_learning_rate
from vfmvae.training.run_folder import RunFolder
from vfmvae.training.safety import StopRequest, check_finite
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
    """Every term that has a weight, unweighted, and their weighted sum as "total"; images in [-1, 1]."""
    losses = reconstruction_losses(output, images, weights)
    others = bottleneck_losses(output.posterior, weights)
    total = weighted_sum({**losses, **others}, weights)
    if weights.alignment:
        others["alignment"] = tokenizer.alignment_loss(output.latents, output.features)
        alignment = weights.alignment * others["alignment"]
        if weights.adaptive_alignment:
            reconstruction = weighted_sum(losses, weights)
            alignment = alignment * adaptive_weight(
                reconstruction, others["alignment"], tokenizer.last_fusion_weight
            )
        total = total + alignment
    return {**losses, **others, "total": total}


def reconstruction_losses(output: TokenizerOutput, images: Tensor, weights: LossConfig) -> dict[str, Tensor]:
    """The terms that compare with images [B, 3, R, R] in [-1, 1]; at least one."""
    losses = {}
    if weights.l1:
        losses["l1"] = l1_loss(output.reconstruction, images)
    if weights.multiscale_l1:
        losses["multiscale_l1"] = multiscale_l1_loss(output.multiscale, images)
    return losses


def bottleneck_losses(posterior: Posterior | DiscretePosterior, weights: LossConfig) -> dict[str, Tensor]:
    """The terms that the latent's distribution has by itself."""
    losses = {}
    if isinstance(posterior, Posterior):
        if weights.kl:
            losses["kl"] = posterior.kl().mean()
        return losses
    if weights.quantization:
        losses["quantization"] = posterior.quantization_loss
    if weights.entropy:
        losses["entropy"] = posterior.entropy_loss
    return losses


def weighted_sum(losses: Mapping[str, Tensor], weights: LossConfig) -> Tensor:
    """The sum of each loss times the weight of its name; a scalar."""
    return torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()


@dataclass
class Evaluation:
    """Held-out images, their reconstructions (uint8 [N, 3, R, R]) and mean quality."""

    images: Tensor
    reconstructions: Tensor
    psnr: float
    ssim: float


@torch.no_grad()
def evaluate(tokenizer: Tokenizer, held_out: ImageSource, batch_size: int) -> Evaluation:
    """Reconstruct the first held-out images from the posterior's mode."""
    tokenizer.eval()
    originals, reconstructions = [], []
    for batch in islice(validation_batches(held_out, batch_size), -(-HELD_OUT_IMAGES // batch_size)):
        images = batch["image"].to(tokenizer.align.weight.device)
        originals.append(images)
        reconstructions.append(to_uint8(tokenizer.decode(tokenizer.encode(images).mode())))
    tokenizer.train()
    before, after = torch.cat(originals)[:HELD_OUT_IMAGES], torch.cat(reconstructions)[:HELD_OUT_IMAGES]
    pair = to_unit(after), to_unit(before)
    return Evaluation(before, after, psnr(*pair).mean().item(), ssim(*pair).mean().item())


@dataclass
class Job:
    """What a configuration becomes on a device; `state` is the part that checkpoints hold."""

    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    state: TrainingState
    data: ImageSource
    held_out: ImageSource
    device: torch.device


def prepare(config: TrainConfig) -> Job:
    """Open the data and build the tokenizer, randomly initialised. ValueError for what is not there."""
    device = pick_device(config.device)
    resolution = config.tokenizer.resolution
    data = open_data(config.data, "train", resolution, config.seed)
    held_out = open_data(config.data, "validation", resolution, config.seed)
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(config.tokenizer, fused=config.fused).to(device).train()
    tokenizer.compute_dtype = compute_dtype(config.dtype, device)
    parameters = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        parameters, lr=config.optimizer.learning_rate, betas=config.optimizer.betas, fused=True
    )
    state = TrainingState(tokenizer, "encoder.", optimizer)
    return Job(tokenizer, optimizer, state, data, held_out, device)


def resume(job: Job, config: TrainConfig, folder: RunFolder) -> None:
    """Take up the folder's newest checkpoint, or the start of the run where it has none."""
    checkpoint = folder.newest_checkpoint()
    if checkpoint is not None:
        load_checkpoint(checkpoint, job.state)
    if job.state.step > config.steps:
        raise ValueError(
            f"{folder.path} has done {job.state.step} steps already; --steps {config.steps} is fewer"
        )
    folder.begin(to_json(config), job.state.step)


def train(config: TrainConfig, folder: RunFolder, console: Console) -> None:
    """Train from the folder's newest checkpoint, or from the start, to the last step.

    Ctrl-C or SIGTERM ends the step, saves a checkpoint and exits with 128 + the signal's number.
    """
    started = time.perf_counter()
    job = prepare(config)
    resume(job, config, folder)
    state, draw = job.state, torch.Generator(job.device)
    announce(console, config, folder, job)
    if not state.initial:
        first = evaluate(job.tokenizer, job.held_out, config.batch_size)
        state.initial = {"psnr": first.psnr, "ssim": first.ssim}

    log = TrainingLog(folder.metrics, console, state.step, config.steps, config.log_every, config.batch_size)
    with log, StopRequest(lambda: console.print("stopping after this step")) as stop:
        while state.step < config.steps and not stop.signal:
            rate = learning_rate(config.optimizer, (state.step + 0.5) / config.steps)
            set_learning_rate(job.optimizer, rate)
            # Data and draws depend on seed and step alone, so a resumed run goes on exactly.
            images = job.data.batch(state.step, config.batch_size)["image"].to(job.device, non_blocking=True)
            draw.manual_seed(config.seed * 1_000_003 + state.step)
            losses = generator_step(job.tokenizer, job.optimizer, images, draw, config.losses)
            state.step += 1
            log.step(state.step, losses, rate)
            if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                save(job, folder)
        save(job, folder)
    if stop.signal:
        console.print(
            f"stopped after step {state.step}; go on with: {folder.resume_command()}", soft_wrap=True
        )
        raise SystemExit(128 + stop.signal)
    last = evaluate(job.tokenizer, job.held_out, config.batch_size)
    folder.write(folder.model, lambda path: write_model(job.tokenizer, path))
    folder.write(folder.figure, lambda path: save_reconstructions(path, last.images, last.reconstructions))
    summarise(console, state.initial, last, time.perf_counter() - started, folder)


def save(job: Job, folder: RunFolder) -> None:
    """Write a checkpoint of the state, unless this step has one."""
    newest = folder.newest_checkpoint()
    if newest is None or step_of(newest) != job.state.step:
        check_finite(job.tokenizer, job.state.step)
        save_checkpoint(folder.checkpoints, job.state.step, job.state)


def announce(console: Console, config: TrainConfig, folder: RunFolder, job: Job) -> None:
    """One line: what trains, how large it is, and on what."""
    trained = sum(p.numel() for p in job.tokenizer.parameters() if p.requires_grad)
    console.print(
        f"{folder.path}: {trained / 1e6:.1f} M trained parameters, {config.tokenizer.resolution} px,"
        f" batch {config.batch_size}, {job.device}, {str(job.tokenizer.dtype).removeprefix('torch.')},"
        f" {'fused' if config.fused else 'reference'} operations, from step {job.state.step}",
        highlight=False,
        soft_wrap=True,
    )


def summarise(
    console: Console, initial: dict[str, float], last: Evaluation, seconds: float, folder: RunFolder
) -> None:
    """The table at the end, and where the files are."""
    table = Table("", title="held-out images", title_justify="left")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("PSNR (dB)", f"{initial['psnr']:.2f}", f"{last.psnr:.2f}")
    table.add_row("SSIM", f"{initial['ssim']:.3f}", f"{last.ssim:.3f}")
    table.add_row("seconds", "", f"{seconds:.0f}")
    console.print(table)
    files = {"reconstructions": folder.figure, "tokenizer": folder.model, "metrics": folder.metrics}
    for what, path in files.items():
        console.print(f"{what:16}{path}", highlight=False, soft_wrap=True)


@command
def main() -> None:
    launch, folder = parse_arguments()
    if launch.dry_run:
        print(to_json(launch.run), end="")
        return
    launch.run.losses.check_available()
    if not launch.resume:
        folder.check_new()
    try:
        train(launch.run, folder, Console())
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{str(error).splitlines()[0]}; try a smaller --batch-size") from None


if __name__ == "__main__":
    main()
