"""How well a tokenizer reconstructs held-out images, measured now and then while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from vfmvae.data import Fault, ImageSource, validation_batches
from vfmvae.images import to_uint8, to_unit
from vfmvae.losses.perceptual import PerceptualNetwork
from vfmvae.metrics.reconstruction import lpips, psnr, ssim
from vfmvae.training.forward import TrainingForward

HELD_OUT_IMAGES = 64


@dataclass
class Evaluation:
    """Held-out images, their reconstructions (uint8 [N, 3, R, R]), the mean of each measure by name, and the
    images that could not be read.
    """

    images: Tensor
    reconstructions: Tensor
    quality: dict[str, float]
    faults: list[Fault]


@torch.no_grad()
def evaluate(
    forward: TrainingForward,
    held_out: ImageSource,
    batch_size: int,
    distances: dict[str, PerceptualNetwork],
) -> Evaluation:
    """Reconstruct the first held-out images from the posterior's mode, rounded to 8 bits.

    `distances`: perceptual networks by the name of what they measure. The tokenizer is in training mode
    afterwards. ValueError if none of them can be read.
    """
    tokenizer = forward.tokenizer.eval()
    device = tokenizer.align.weight.device
    originals: list[Tensor] = []
    faults: list[Fault] = []
    reconstructions: list[Tensor] = []
    measured: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], **{name: [] for name in distances}}
    for batch in islice(validation_batches(held_out, batch_size), -(-HELD_OUT_IMAGES // batch_size)):
        faults += batch["faults"]
        if not batch["key"]:
            continue
        images = batch["image"][: HELD_OUT_IMAGES - len(originals) * batch_size].to(device)
        decoded = to_uint8(forward.reconstruct(images))
        originals.append(images)
        reconstructions.append(decoded)
        pair = to_unit(decoded), to_unit(images)
        measured["psnr"].append(psnr(*pair))
        measured["ssim"].append(ssim(*pair))
        for name, network in distances.items():
            measured[name].append(lpips(*pair, network))
    tokenizer.train()
    if not originals:
        first = faults[0]
        raise ValueError(f"none of the first held-out images can be read; {first.key}: {first.reason}")
    quality = {name: torch.cat(values).double().mean().item() for name, values in measured.items()}
    return Evaluation(torch.cat(originals).cpu(), torch.cat(reconstructions).cpu(), quality, faults)
