"""What every frozen foundation model of this package has in common.

In: images [B, 3, H, W], float in [-1, 1] or uint8. Out: `Features`, float32. In between, in this order: to
[0, 1], resize by `scale_factor`, subtract the family's mean and divide by its std, run the model; without
gradients, unless the caller asks for those of the images or the parameters are to be trained.

Legend for shape comments: B batch, H W image, h w token grid, N = h*w patch tokens, C encoder width.

The layer convention (used in configurations and in `Features.layers`), for a model of `depth` blocks:

     0     tokens after patch embedding and absolute position embedding, before everything else (so before the
           extra LayerNorm that CLIP models put in front of their blocks)
     k     output of the k-th block, 1 <= k <= depth
    -1     after the final LayerNorm
    -2     output of the last block, before that LayerNorm; -3 the block before it, and so on
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae.serialization import check_fields

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class ViTConfig:
    """Dimensions of an unpublished or small member of a family, replacing those of the table.

    `image_size` is the square side the position embedding is made for; `mlp_width` the number of hidden units
    of the MLP (of its gated product, for models with a gated MLP).
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    image_size: int
    mlp_width: int

    def __post_init__(self) -> None:
        check_fields(self, "encoder.vit")
        if min(self.width, self.depth, self.heads, self.patch_size, self.image_size, self.mlp_width) < 1:
            raise ValueError(f"every dimension of a ViTConfig must be at least 1, got {self}")
        if self.width % self.heads:
            raise ValueError(f"encoder width {self.width} is not divisible by {self.heads} heads")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"encoder image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )


@dataclass(frozen=True)
class EncoderConfig:
    """Which frozen model sees the image, at what size, and which of its layers are used.

    Args:
        name: a key of `vfmvae.encoders.ENCODERS`.
        layers: layer indices in the convention of this module; any number, in any order.
        scale_factor: the image is resized by this before the encoder (2.0: a 256 px image is seen at 512 px).
        weights: a local file or directory; None means the table's own source (the hub; for `mini` the shipped
            file).
        vit: dimensions that replace the table's, for models that are not published.
    """

    name: str = "siglip2-large-patch16-512"
    layers: tuple[int, ...] = (0, 12, -1)
    scale_factor: float = 2.0
    weights: str | None = None
    vit: ViTConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self, "encoder")
        if not self.layers:
            raise ValueError(f"encoder {self.name}: layers is empty; name at least one, for example (-1,)")
        if not (math.isfinite(self.scale_factor) and self.scale_factor > 0):
            raise ValueError(f"encoder {self.name}: scale_factor must be positive, got {self.scale_factor}")


class Features(NamedTuple):
    """What an encoder says about a batch of images; everything float32."""

    layers: list[Tensor]  # one [B, N, C] per requested layer, patch tokens in raster order
    grid: tuple[int, int]  # (rows, columns), N = rows * columns
    pooled: Tensor  # [B, C]


@dataclass(frozen=True)
class Preprocessing:
    """How a family wants its pixels: in [0, 1], resized, then (x - mean) / std per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation


def resolve_layers(layers: Collection[int], depth: int) -> tuple[int, ...]:
    """Positions on the way through a model: 0 embeddings, k after block k, depth+1 after the final norm.

    Raises:
        ValueError: an index lies outside -(depth+2)..depth.
    """
    lowest = -(depth + 2)
    for index in layers:
        if not lowest <= index <= depth:
            raise ValueError(
                f"layer {index} does not exist: this encoder has {depth} blocks, so layers go from 0 "
                f"(embeddings) to {depth} (last block), and from -1 (after the final norm) down to {lowest} "
                f"(embeddings)"
            )
    return tuple(index if index >= 0 else index + depth + 2 for index in layers)


def _per_channel(values: tuple[float, float, float], like: Tensor) -> Tensor:
    """[3, 1, 1] beside `like`, filled there: copying a list to a GPU makes the host wait."""
    return torch.stack([torch.full((1, 1), value, dtype=like.dtype, device=like.device) for value in values])


def own_precision(device: torch.device, bfloat16: bool) -> AbstractContextManager[object]:
    """bfloat16 autocast on CUDA, or as asked, whatever surrounds it: features are a fixed target."""
    if not torch.amp.is_autocast_available(device.type):  # meta
        return nullcontext()
    dtype = feature_dtype(device, bfloat16)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def feature_dtype(device: torch.device, always_bfloat16: bool) -> torch.dtype:
    """What an encoder multiplies in on a device."""
    return torch.bfloat16 if always_bfloat16 or device.type == "cuda" else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Tensors keep their dtypes inside, whatever surrounds it."""
    if not torch.amp.is_autocast_available(device.type):  # meta
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class FrozenEncoder(nn.Module):
    """A foundation model that is looked at, and trained only where its parameters require gradients.

    Subclasses build the model and give `tokens`; this class owns everything around it. The module stays in
    eval mode whatever `train()` is called with.
    """

    always_bfloat16: bool = False
    """Run under bfloat16 autocast on every device, not on CUDA alone."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        width: int,
        depth: int,
        patch_size: int,
        multiple: int,
        pixels: Preprocessing,
    ) -> None:
        """`multiple`: what the sides of the model's input must be divisible by, at least `patch_size`."""
        super().__init__()
        self.config = config
        self.width = width
        self.depth = depth
        self.patch_size = patch_size
        self.preprocessing = pixels
        self._multiple = multiple
        self._positions = resolve_layers(config.layers, depth)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks in order; each is run by calling it, so that it can be compiled alone."""
        raise NotImplementedError

    @property
    def image_multiple(self) -> int:
        """The sides of images given to `forward` must be multiples of this."""
        scale = Fraction(self.config.scale_factor).limit_denominator(1000)
        step = self._multiple * scale.denominator
        return step // math.gcd(step, scale.numerator)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patch tokens for images of `height` x `width` pixels.

        Raises:
            ValueError: a side that, scaled, does not divide into patches; the message names the needed
                multiple.
        """
        rows, columns = (self._scaled(side, name) for side, name in ((height, "height"), (width, "width")))
        return rows // self.patch_size, columns // self.patch_size

    def forward(self, images: Tensor, image_gradients: bool = False) -> Features:
        """Features of images [B, 3, H, W], float in [-1, 1] or uint8, of any size that divides into patches.

        The model runs under bfloat16 autocast on CUDA, with `always_bfloat16` elsewhere too, otherwise in the
        dtype of its weights; the result is float32. A graph is recorded where a parameter requires a
        gradient, and with `image_gradients`, which is for losses that read images through the frozen model;
        else there is none, whatever the images require.

        Raises:
            ValueError: wrong shape or dtype, or a size that does not divide (the message names the multiple).
        """
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (image_gradients or trained)):
            pixels = self.prepare(images)
            with own_precision(pixels.device, self.always_bfloat16):
                outputs, pooled = self.tokens(pixels, set(self._positions))
            layers = [outputs[position].float() for position in self._positions]
            pooled = pooled.float()
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        return Features(layers, grid, pooled)

    def prepare(self, images: Tensor) -> Tensor:
        """The model's own input: resized, normalised, in the dtype of the weights. Errors as in `forward`."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif images.is_floating_point():
            # 16-bit pixels would lose their last digits here; the cast comes last.
            images = (images.to(torch.promote_types(images.dtype, torch.float32)) + 1) / 2
        else:
            raise ValueError(f"images must be floating point in [-1, 1] or uint8, got {images.dtype}")
        size = [self._scaled(images.shape[-2], "height"), self._scaled(images.shape[-1], "width")]
        if size != list(images.shape[-2:]):
            shrinks = size[0] < images.shape[-2] or size[1] < images.shape[-1]
            mode = self.preprocessing.interpolation
            images = F.interpolate(images, size, mode=mode, align_corners=False, antialias=shrinks)
        mean = _per_channel(self.preprocessing.mean, images)
        std = _per_channel(self.preprocessing.std, images)
        return ((images - mean) / std).to(next(self.parameters()).dtype)

    def tokens(self, pixels: Tensor, wanted: set[int]) -> tuple[dict[int, Tensor], Tensor]:
        """Normalised pixels [B, 3, H, W] -> ({position: [B, N, C]} for `wanted`, pooled [B, C])."""
        raise NotImplementedError

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict, in any format that this family is published in, under this module's own names.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; the message names it.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Does nothing: an encoder stays in eval mode, also where it is trained."""
        del mode
        super().train(False)
        return self

    def _scaled(self, side: int, name: str) -> int:
        scaled = round(side * self.config.scale_factor)
        if scaled == 0 or scaled % self._multiple:
            raise ValueError(
                f"image {name} {side} does not fit the encoder {self.config.name}: times scale_factor "
                f"{self.config.scale_factor:g} it is {scaled} px, not a multiple of {self._multiple}; use "
                f"image sides that are multiples of {self.image_multiple}"
            )
        return scaled
