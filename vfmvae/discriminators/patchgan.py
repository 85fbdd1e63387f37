"""The multi-scale PatchGAN (pix2pixHD, arXiv 1711.11585): is each patch real, at three sizes of the image.

Images [B, 3, H, W] in [-1, 1] -> per scale, finest first, the features of four layers and a map of logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae.discriminators.layers import SLOPE, LocalBatchNorm
from vfmvae.images import check_image_shape, to_unit

INITIAL_STD = 0.02


class PatchOutput(NamedTuple):
    """What one scale says about a batch, in the dtype that the discriminator computes in."""

    features: list[Tensor]  # the four layers before the logits, [B, 64, h, w] .. [B, 512, h, w]
    logits: Tensor  # [B, 1, h, w]; one is real


class PatchDiscriminator(nn.Module):
    """The same network with weights of its own at each scale; scale k sees the image halved k times.

    Convolutions run in `dtype`; parameters and statistics are float32. Training and eval mode are the same.
    """

    def __init__(self, width: int = 64, num_scales: int = 3, dtype: torch.dtype = torch.float32) -> None:
        """`width`: channels of the first layer; they double up to the fourth (64, 128, 256, 512)."""
        super().__init__()
        self.scales = nn.ModuleList(PatchNetwork(width) for _ in range(num_scales))
        self.dtype = dtype

    def forward(self, images: Tensor) -> list[PatchOutput]:
        """Raises ValueError for images of a wrong shape, and a batch that the local batch norm cannot cut."""
        check_image_shape(images)
        images = (to_unit(images) if images.dtype == torch.uint8 else images).to(self.dtype)
        outputs = []
        for index, network in enumerate(self.scales):
            if index:
                images = F.avg_pool2d(images, 3, stride=2, padding=1, count_include_pad=False)
            outputs.append(network(images))
        return outputs


class PatchNetwork(nn.Module):
    """Four layers and a convolution to logits; one scale of the PatchGAN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                PatchLayer(3, width, stride=2),
                PatchLayer(width, 2 * width, stride=2, normalise=True),
                PatchLayer(2 * width, 4 * width, stride=2, normalise=True),
                PatchLayer(4 * width, 8 * width, stride=1, normalise=True),
            ]
        )
        self.last = PatchConv(8 * width, 1, stride=1)

    def forward(self, x: Tensor) -> PatchOutput:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return PatchOutput(features, self.last(x))


class PatchConv(nn.Conv2d):
    """4x4 convolution, padding 2, in the dtype of its input; [B, C, h, w] -> [B, D, h // stride + 1, ...]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=4, stride=stride, padding=2)
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, padding=2)


class PatchLayer(nn.Module):
    """Convolution, local batch norm where asked for, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, normalise: bool = False) -> None:
        super().__init__()
        self.conv = PatchConv(in_channels, out_channels, stride)
        self.norm = LocalBatchNorm(out_channels, SLOPE) if normalise else nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
