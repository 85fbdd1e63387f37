"""The two doors of the image range, and the check at every public function that takes images.

Inside the project an image is [B, 3, H, W], float in [-1, 1] or uint8 in [0, 255].
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_LIMIT = 4.0
"""Largest absolute value taken for an image in [-1, 1]: noise may leave the range, a forgotten 0..255 does
not pass.
"""


_NEEDED = (
    "[B, 3, H, W], uint8 or float in [-1, 1] (from an RGB picture:"
    " torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None])"
)


def to_unit(images: Tensor) -> Tensor:
    """uint8 images [..., 3, H, W] to float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1, both exactly.

    Raises ValueError for any other dtype: a float image has a range already, and guessing it hides mistakes.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"to_unit takes uint8 images, not {images.dtype}: float images must be in [-1, 1] already"
        )
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float images [..., 3, H, W] in [-1, 1] to uint8, clamped and rounded to nearest; computed in float32.

    The inverse of `to_unit` for every uint8 image. Values outside [-1, 1] are clamped: a reconstruction
    overshoots. Raises ValueError for integer input. NaN has no nearest pixel; it becomes 0.
    """
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes float images in [-1, 1], not {images.dtype}")
    scaled = images.to(torch.float32).add(1.0).mul_(127.5)
    return scaled.nan_to_num_(nan=0.0).clamp_(0.0, 255.0).round_().to(torch.uint8)


def check_is_tensor(value: object, name: str, layout: str) -> None:
    """ValueError unless `value` is a tensor; `layout` says which one is needed."""
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise ValueError(f"{name} must be a torch.Tensor, {layout}; this is a {kind}")


def check_images(images: Tensor, multiple: int = 1) -> Tensor:
    """Images as float in [-1, 1], or a ValueError that names what is wrong: layout, range, NaN, size.

    Shape and dtype are checked always; values of float images too, which waits for the device.
    """
    check_image_shape(images, multiple)
    if images.dtype == torch.uint8:
        return to_unit(images)
    largest = images.abs().amax().item()
    if not largest <= FLOAT_LIMIT:
        what = (
            "NaN or infinite values"
            if largest != largest or largest == float("inf")
            else f"values up to {largest:g}"
        )
        raise ValueError(f"the images hold {what}; float images must be in [-1, 1] (or pass uint8)")
    return images


def check_image_shape(images: Tensor, multiple: int = 1) -> None:
    """ValueError unless images are [B, 3, H, W], uint8 or float, with H and W multiples of `multiple`."""
    check_is_tensor(images, "images", _NEEDED)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; needed is [B, 3, H, W] with B at least 1")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; needed is uint8, or float in [-1, 1]")
    height, width = images.shape[-2:]
    if height % multiple or width % multiple or not height or not width:
        raise ValueError(
            f"images are {height} x {width}; this model needs height and width in multiples of {multiple}"
        )
