"""Perceptual distance: how far apart two images are in the features of a frozen network.

In: images [B, 3, H, W], float in [-1, 1] or uint8. Out: the distance of each pair, [B] in float32; 0 for
equal images.

Two networks, one interface (`PerceptualNetwork`):

    LPIPS             VGG16 with the published linear layers (Zhang et al., arXiv 1801.03924, version 0.1)
    FeatureDistance   the tokens of a frozen encoder, without learned weights: needs no download with `mini`

Parameters never train; the gradient passes through them to the images. Legend for shape comments: C channels
of a layer, h w its positions, N tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.encoders import EncoderConfig, FrozenEncoder, build_encoder
from vfmvae.encoders.base import without_autocast
from vfmvae.images import check_image_shape, to_unit
from vfmvae.weights import check_names, read_hub_weights, read_weights

PerceptualName = Literal["lpips-vgg", "mini"]

LINEAR_LAYERS = Path(__file__).parent / "lpips_vgg.safetensors"
LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
# LPIPS v0.1: ImageNet's mean and standard deviation, moved to [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST_IMAGE = 16  # four poolings leave one position
VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width, number of convolutions
TORCHVISION_FILE = "vgg16-397923af.pth"
HUB_REPOSITORY = "timm/vgg16.tv_in1k"


def perceptual_network(
    name: PerceptualName, weights: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> PerceptualNetwork:
    """The frozen network of that name, on the CPU.

    Args:
        name: "lpips-vgg", or "mini": how far the textures and edges of 8 px patches are apart for the small
            encoder of this package. Its numbers compare with each other, not with LPIPS.
        weights: a file or directory; None for the usual source: `load_vgg`'s, or the file in this package.
        dtype: what the network computes in; distances are float32 always.

    Raises:
        ValueError: another name; weights that are not there or do not fit.
    """
    if name == "lpips-vgg":
        return LPIPS(load_vgg(weights), dtype)
    if name == "mini":
        source = None if weights is None else str(weights)
        encoder = build_encoder(EncoderConfig("mini", (1, 2, 3, 4, 5, 6), scale_factor=1.0, weights=source))
        return FeatureDistance(encoder.to(dtype))
    raise ValueError(f"unknown perceptual network {name!r}; known: {', '.join(get_args(PerceptualName))}")


class PerceptualNetwork(nn.Module):
    """Images to feature maps, and the distance of two sets of maps."""

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] of several layers; the gradient passes to the images.

        Raises ValueError for images of a shape, dtype or size that the network does not take.
        """
        raise NotImplementedError

    def distance(self, a: list[Tensor], b: list[Tensor], *, fused: ops.Fused = True) -> Tensor:
        """[B], from the `features` of two batches; `fused` as for `ops.lpips_distance`."""
        raise NotImplementedError

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance of each pair, [B]; the target's features are computed without a graph."""
        with torch.no_grad():
            of_target = self.features(target)
        return self.distance(self.features(prediction), of_target)


class LPIPS(PerceptualNetwork):
    """Learned perceptual image patch similarity, version 0.1 with VGG16; lower is closer.

    Images are at least 16 x 16. Feature maps are [B, 64, H, W], [B, 128, H/2, W/2], ... [B, 512, H/16, W/16]
    in `dtype` and channels-last memory, whatever autocast surrounds the call.
    """

    def __init__(self, vgg: VGG16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.vgg = vgg.eval().requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)
        for name, weight in load_file(LINEAR_LAYERS).items():
            self.register_buffer(name, weight)

    def features(self, images: Tensor) -> list[Tensor]:
        check_image_shape(images)
        if min(images.shape[-2:]) < SMALLEST_IMAGE:
            raise ValueError(
                f"LPIPS needs images of at least {SMALLEST_IMAGE} x {SMALLEST_IMAGE} pixels, not"
                f" {images.shape[-2]} x {images.shape[-1]}"
            )
        x = to_unit(images) if images.dtype == torch.uint8 else images.float()
        # Channel by channel with Python numbers: constants on the device would be rounded to its dtype.
        scaled = [
            (x[:, c] - shift) / scale for c, (shift, scale) in enumerate(zip(SHIFT, SCALE, strict=True))
        ]
        with without_autocast(x.device):
            pixels = torch.stack(scaled, dim=1).to(self.dtype, memory_format=torch.channels_last)
            return self.vgg(pixels)

    def distance(self, a: list[Tensor], b: list[Tensor], *, fused: ops.Fused = True) -> Tensor:
        distances = [
            ops.lpips_distance(x, y, self.get_buffer(name), fused=fused)
            for x, y, name in zip(a, b, LAYERS, strict=True)
        ]
        return torch.stack(distances).sum(0)


class FeatureDistance(PerceptualNetwork):
    """The same distance on the tokens of a frozen encoder, without learned weights: mean over its layers and
    positions of the squared difference of unit vectors, between 0 and 4.

    Images of any size that the encoder takes. The encoder sees them as it always does, resized by its
    `scale_factor` and under bfloat16 autocast on CUDA.
    """

    def __init__(self, encoder: FrozenEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def features(self, images: Tensor) -> list[Tensor]:
        tokens = self.encoder(images, image_gradients=True).layers
        return [layer.transpose(1, 2).unsqueeze(-1) for layer in tokens]  # [B, C, N, 1]

    def distance(self, a: list[Tensor], b: list[Tensor], *, fused: ops.Fused = True) -> Tensor:
        distances = [ops.lpips_distance(x, y, fused=fused) for x, y in zip(a, b, strict=True)]
        return torch.stack(distances).mean(0)


class VGG16(nn.Module):
    """The convolutions of VGG16 (arXiv 1409.1556) under torchvision's names (`features.0.weight`)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, convolutions in VGG_STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] -> the last activation of each stage, full size to a sixteenth."""
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return [*maps, x]


def load_vgg(path: str | Path | None = None) -> VGG16:
    """VGG16 with ImageNet weights.

    Args:
        path: torchvision's file, timm's, or a safetensors file with their names; None for torchvision's file
            in torch's download cache, else timm's from the Hugging Face hub (or its cache).

    Raises:
        ValueError: no weights there, or of another model; the message says where and what to do.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_FILE
    if path is None and cached.is_file():
        path = cached
    try:
        state = read_hub_weights(HUB_REPOSITORY, "VGG16") if path is None else read_weights(path)
    except ValueError as error:
        looked = f"{cached} does not exist; " if path is None else ""
        raise ValueError(
            f"LPIPS needs ImageNet weights of VGG16: {looked}{error}; torchvision's {TORCHVISION_FILE} fits"
            f" too, and the perceptual network 'mini' needs no download"
        ) from error
    vgg = VGG16()
    state = {name: tensor for name, tensor in state.items() if name.startswith("features.")}  # no classifier
    check_names("VGG16", state, vgg.state_dict())
    vgg.load_state_dict(state)
    return vgg
