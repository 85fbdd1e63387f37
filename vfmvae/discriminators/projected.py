"""The projected discriminator (StyleGAN-T, arXiv 2301.09515): heads on tokens of a frozen vision transformer.

Images [B, 3, H, W] in [-1, 1] -> logits [B, layers * N], one per token of each layer; positive means real.

Legend for shape comments: B batch, N patch tokens, C width of the backbone.

When spectral norms are iterated: every forward in training mode does one power iteration, as the published
code does, which makes three per step (real images, generated images, and the generator's pass). A step that
keeps the discriminator in eval mode, because it takes another number of passes, calls
`iterate_spectral_norms` itself; nothing else depends on the mode. The vectors are buffers: a state dict with
them resumes exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vfmvae.discriminators.augment import augment
from vfmvae.discriminators.layers import SLOPE, LocalBatchNorm, SpectralConv1d, iterate_together
from vfmvae.encoders import EncoderConfig, ViTConfig, build_encoder
from vfmvae.encoders.base import Interpolation, resolve_layers
from vfmvae.encoders.timm_vit import TimmEncoder
from vfmvae.images import check_image_shape, to_unit
from vfmvae.serialization import check_fields

CROP_PROBABILITY = 0.5
CONDITION_WIDTH = 64


@dataclass(frozen=True)
class ProjectedDiscriminatorConfig:
    """Which frozen model judges, by which layers; the defaults are the published ones.

    Args:
        backbone: a name of `vfmvae.encoders.ENCODERS`. Published is DINO ViT-S/16, at 224 px; "mini" needs no
            download, sees 64 px and has layers 0 to 6: (0, 2, 4, 6) spread over it.
        layers: layers with a head each, in the convention of `vfmvae.encoders.base`.
        c_dim: width of a condition vector; 0 for none.
        interpolation: how images are resized to the backbone. The published system takes that of the
            tokenizer's encoder: bilinear for SigLIP and MAE, bicubic for the others.
        weights: a local file or folder with the backbone's weights; None means the table's own source.
        vit: dimensions that replace the table's, for backbones that are not published.
    """

    backbone: str = "dino-small-patch16"
    layers: tuple[int, ...] = (0, 3, 6, 9, 12)
    c_dim: int = 0
    interpolation: Interpolation = "bilinear"
    weights: str | None = None
    vit: ViTConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self, "discriminator")
        if self.c_dim < 0:
            raise ValueError(f"discriminator c_dim is {self.c_dim}; it must be 0 (no condition) or positive")


class ProjectedDiscriminator(nn.Module):
    """Augmentation, resize, frozen backbone, and one head per layer of it.

    The backbone is never trained; gradients pass through it to the images. It computes in `dtype`, and the
    heads with it, their parameters and statistics in float32; logits are float32.
    """

    def __init__(
        self,
        config: ProjectedDiscriminatorConfig,
        weights: str | Path | Mapping[str, Tensor] | None = "pretrained",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`weights`: of the backbone, as for `build_encoder`.

        Raises:
            ValueError: an unknown backbone, a layer it does not have, or weights that cannot be found.
        """
        super().__init__()
        self.config = config
        backbone = EncoderConfig(
            config.backbone, config.layers, scale_factor=1.0, weights=config.weights, vit=config.vit
        )
        encoder = build_encoder(backbone, weights)
        if not isinstance(encoder, TimmEncoder):
            raise ValueError(
                f"discriminator backbone {config.backbone!r} has no square input of its own; use "
                f"dino-small-patch16, mini or another vision transformer of timm"
            )
        self.encoder = encoder.to(dtype)
        self.positions = resolve_layers(config.layers, encoder.depth)
        self.heads = nn.ModuleList(ProjectedHead(encoder.width, config.c_dim) for _ in config.layers)

    def forward(
        self,
        images: Tensor,
        uniforms: Tensor,
        crop: Tensor,
        c: Tensor | None = None,
        double_backward: bool = False,
    ) -> Tensor:
        """Logits [B, layers * N] float32 of images [B, 3, H, W], float in [-1, 1] or uint8.

        Args:
            uniforms: [B, AUGMENT_UNIFORMS] in [0, 1), the draws of the augmentation.
            crop: [3] in [0, 1), draws for the whole batch: images larger than the backbone's input are
                cropped to it if the first is below 0.5, at the row and column of the other two; else resized.
            c: condition vectors [B, c_dim], exactly where the configuration has a c_dim.
            double_backward: for a gradient penalty; attention then runs in its plain form, as the fused ones
                can be differentiated only once.

        Raises:
            ValueError: wrong shapes; a batch that the local batch norm cannot cut into equal groups.
        """
        return self.judge(self.features(images, uniforms, crop, double_backward), c)

    def features(
        self,
        images: Tensor,
        uniforms: Tensor,
        crop: Tensor,
        double_backward: bool = False,
    ) -> list[Tensor]:
        """What the frozen part makes of images, [B, N, C] per layer; arguments as for `forward`."""
        check_image_shape(images)
        images = to_unit(images) if images.dtype == torch.uint8 else images
        images = self.resize(augment(images, uniforms), crop)
        with sdpa_kernel(SDPBackend.MATH) if double_backward else nullcontext():
            outputs, _ = self.encoder.all_tokens(self.encoder.prepare(images), set(self.positions))
        return [self.readout(outputs[position]) for position in self.positions]

    def judge(self, features: Sequence[Tensor], c: Tensor | None = None, batches: int = 1) -> Tensor:
        """Logits [B, layers * N] float32 of what `features` gave, by the heads, which are trained.

        `batches`: B images are so many batches one after another, which the batch norms keep apart.
        """
        logits = [head(x, c, batches) for head, x in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)

    def iterate_spectral_norms(self) -> None:
        """One power iteration in every head, for a step whose passes all run in eval mode."""
        iterate_together(module for module in self.modules() if isinstance(module, SpectralConv1d))

    def resize(self, images: Tensor, crop: Tensor) -> Tensor:
        """Images of any size -> [B, 3, S, S], the backbone's input, by a crop or a resize; see `forward`."""
        side = self.encoder.image_size
        height, width = images.shape[-2:]
        if (height, width) == (side, side):
            return images
        resized = F.interpolate(
            images,
            (side, side),
            mode=self.config.interpolation,
            align_corners=False,
            antialias=max(height, width) > side,
        )
        if min(height, width) <= side:
            return resized
        # Both, and the choice on the device: nothing else in a step waits for a number that was drawn there.
        choice, top, left = crop.unbind()
        rows, columns = (
            (u * (old - side + 1)).long() + torch.arange(side, device=images.device)
            for u, old in ((top, height), (left, width))
        )
        cropped = images.index_select(-2, rows).index_select(-1, columns)
        return torch.where(choice < CROP_PROBABILITY, cropped, resized)

    def readout(self, tokens: Tensor) -> Tensor:
        """All tokens [B, prefix + N, C] -> patch tokens [B, N, C], the class token added to each.

        A backbone without a class token adds nothing: its patch tokens carry what it knows of the whole.
        """
        patches = tokens[:, self.encoder.trunk.num_prefix_tokens :]
        return patches + tokens[:, :1] if self.encoder.has_class_token else patches


class ProjectedHead(nn.Module):
    """Tokens of one layer [B, N, C] -> logits [B, N] float32.

    Without a condition the last convolution gives the logit. With one [B, c_dim] it gives 64 numbers, and the
    logit is their scalar product with an equalised linear map of the condition, over sqrt(64).
    """

    def __init__(self, width: int, c_dim: int = 0) -> None:
        super().__init__()
        self.first = _Block(width, kernel=1)
        self.residual = _Block(width, kernel=9)
        self.last = SpectralConv1d(width, CONDITION_WIDTH if c_dim else 1)
        self.condition = _Condition(c_dim) if c_dim else None

    def forward(self, tokens: Tensor, c: Tensor | None = None, batches: int = 1) -> Tensor:
        if (c is None) != (self.condition is None):
            raise ValueError(
                "the discriminator has a condition and was given none"
                if c is None
                else "the discriminator was given a condition but has c_dim 0"
            )
        x = self.first(tokens.transpose(1, 2), batches)  # [B, C, N]
        x = (self.residual(x, batches) + x) * 0.5**0.5
        x = self.last(x)  # [B, 1 or 64, N]
        logits = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.condition is not None:
            assert c is not None
            logits = (logits * self.condition(c)[:, :, None]).sum(dim=1) * CONDITION_WIDTH**-0.5
        return logits.flatten(1)


class _Block(nn.Module):
    """Convolution, local batch norm, leaky ReLU; [B, C, N] -> the same."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = SpectralConv1d(width, width, kernel)
        self.norm = LocalBatchNorm(width, SLOPE)

    def forward(self, x: Tensor, batches: int) -> Tensor:
        return self.norm(self.conv(x), batches)


class _Condition(nn.Module):
    """Condition vectors [B, c_dim] -> [B, 64], linear; the weight is divided by sqrt(c_dim) in use."""

    def __init__(self, c_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CONDITION_WIDTH, c_dim))
        self.bias = nn.Parameter(torch.zeros(CONDITION_WIDTH))

    def forward(self, c: Tensor) -> Tensor:
        if c.ndim != 2 or c.shape[1] != self.weight.shape[1]:
            raise ValueError(f"conditions are {list(c.shape)}; needed is [B, {self.weight.shape[1]}]")
        return F.linear(c.to(self.weight.dtype), self.weight * self.weight.shape[1] ** -0.5, self.bias)
