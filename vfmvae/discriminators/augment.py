"""Differentiable augmentation of what a discriminator sees (arXiv 2006.10738): colour, translation, cutout.

Images [B, 3, H, W] in [-1, 1] and uniform numbers [B, AUGMENT_UNIFORMS] in [0, 1) -> images of the same
shape, which may leave [-1, 1]. Every image has draws of its own, and the same draws give the same image. All
of it can be differentiated twice, and nothing waits for the device.

The numbers decide, column by column: brightness, saturation, contrast, shift down, shift right, row and
column of the erased square.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AUGMENT_UNIFORMS = 7
"""How many uniform numbers `augment` takes per image."""

MAX_SHIFT = 1 / 8
"""Largest translation, as a fraction of the image's side."""
ERASED_SIDE = 0.2
"""Side of the erased square, as a fraction of the image's."""


def augment(images: Tensor, uniforms: Tensor) -> Tensor:
    """Colour, then translation, then cutout, each image by its row of `uniforms`; see this module.

    Raises:
        ValueError: `uniforms` is not [B, AUGMENT_UNIFORMS].
    """
    if uniforms.shape != (len(images), AUGMENT_UNIFORMS):
        raise ValueError(
            f"uniforms are {list(uniforms.shape)}; augmenting {len(images)} images takes "
            f"[{len(images)}, {AUGMENT_UNIFORMS}]"
        )
    images = change_colour(images, uniforms[:, :3])
    images = translate(images, uniforms[:, 3:5])
    return erase_square(images, uniforms[:, 5:7])


def change_colour(images: Tensor, uniforms: Tensor) -> Tensor:
    """Brightness + U(-0.5, 0.5), then saturation times U(0, 2), then contrast times U(0.5, 1.5).

    Saturation is about a pixel's mean over the channels, contrast about the image's mean. `uniforms`: [B, 3].
    """
    brightness, saturation, contrast = uniforms.to(images.dtype)[:, :, None, None, None].unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (saturation * 2) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def translate(images: Tensor, uniforms: Tensor) -> Tensor:
    """Shift by whole pixels, up to an eighth of the side either way, each as likely; zeros move in.

    `uniforms`: [B, 2], down and right.
    """
    limits = [int(side * MAX_SHIFT + 0.5) for side in images.shape[-2:]]
    down, right = ((uniforms[:, axis] * (2 * limit + 1)).long() - limit for axis, limit in enumerate(limits))
    return _Shift.apply(images, down, right)


def erase_square(images: Tensor, uniforms: Tensor) -> Tensor:
    """Zeros in a square of a fifth of the side, whose centre is anywhere in the image; it may be cut off.

    `uniforms`: [B, 2], row and column of the centre.
    """
    rows, columns = (
        _covered(side, uniforms[:, axis], images.device) for axis, side in enumerate(images.shape[-2:])
    )
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


def _covered(side: int, uniforms: Tensor, device: torch.device) -> Tensor:
    """Which rows (or columns) the square covers, [B, side]."""
    erased = int(side * ERASED_SIDE + 0.5)
    # A square of even side has its centre between pixels, so there is one place more.
    centre = (uniforms * (side + 1 - erased % 2)).long()
    first = (centre - erased // 2)[:, None]
    position = torch.arange(side, device=device)
    return (position >= first) & (position < first + erased)


class _Shift(torch.autograd.Function):
    """Images shifted by (down, right) [B] pixels, zeros moving in; the gradient is shifted back.

    Autograd of the indexing would add up gradients index by index, which is slow, and in an order of its own.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, down: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(down, right)
        batch, channels, height, width = images.shape
        rows = torch.arange(height, device=images.device) - down[:, None]  # [B, H], where pixels come from
        columns = torch.arange(width, device=images.device) - right[:, None]  # [B, W]
        inside = ((rows >= 0) & (rows < height))[:, None, :, None]
        inside = inside & ((columns >= 0) & (columns < width))[:, None, None, :]  # [B, 1, H, W]
        image = torch.arange(batch, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        rows = rows.clamp(0, height - 1)[:, None, :, None]
        columns = columns.clamp(0, width - 1)[:, None, None, :]
        return images[image, channel, rows, columns].masked_fill(~inside, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        down, right = ctx.saved_tensors
        return _Shift.apply(gradient, -down, -right), None, None
