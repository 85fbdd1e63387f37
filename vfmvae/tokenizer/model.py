"""The VFM-VAE tokenizer (arXiv 2510.18457): image -> features -> posterior -> latent -> image.

Shapes: images [B, 3, H, W] in [-1, 1] (or uint8); features one [B, N, C] per encoder layer; latents [B, z, h,
w] with h = H / downsample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.encoders import EncoderConfig, build_encoder
from vfmvae.images import check_image_shape, check_images, check_is_tensor, to_unit
from vfmvae.serialization import check_fields
from vfmvae.tokenizer.bottleneck import (
    BottleneckConfig,
    DiscreteBottleneck,
    DiscretePosterior,
    GaussianBottleneck,
    Posterior,
)
from vfmvae.tokenizer.decoder import INPUT_STRIDE, Decoder, DecoderConfig
from vfmvae.tokenizer.fusion import FusionConfig, LatentFusion, LatentProjection, map_to_tokens, tokens_to_map
from vfmvae.tokenizer.style import StyleMapping, share_of_part


@dataclass(frozen=True)
class AlignmentConfig:
    """Margins and weights of the two terms of the alignment loss."""

    distance_margin: float = 0.0
    cosine_margin: float = 0.0
    distance_weight: float = 1.0
    cosine_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "alignment")


@dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer; the defaults are the published f16d32 model over SigLIP2-L."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    resolution: int = 256
    """Image size that the model is trained at; any multiple of `Tokenizer.image_multiple` can be encoded."""
    latent_channels: int = 32
    downsample: int = 16
    """Image pixels per latent position."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.downsample not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(
                f"downsample is {self.downsample}; it must be a power of two from 1 to {INPUT_STRIDE}"
            )
        if self.resolution < 1 or self.resolution % INPUT_STRIDE:
            raise ValueError(f"resolution is {self.resolution}; it must be a multiple of {INPUT_STRIDE}")
        if self.latent_channels < 1:
            raise ValueError(f"latent_channels is {self.latent_channels}; it must be at least 1")
        if len(self.fusion.layer_widths) != len(self.encoder.layers):
            raise ValueError(
                f"fusion.layer_widths has {len(self.fusion.layer_widths)} entries"
                f" for {len(self.encoder.layers)} encoder layers {self.encoder.layers}; one each is needed"
            )


class TokenizerOutput(NamedTuple):
    """What one training forward computes."""

    reconstruction: Tensor  # [B, 3, H, W]
    multiscale: list[Tensor]  # [B, 3, H/2, W/2], ... [B, 3, H/32, W/32]
    latents: Tensor  # [B, z, h, w], sampled
    posterior: Posterior | DiscretePosterior
    features: list[Tensor]  # [B, N, C] per encoder layer


class Tokenizer(nn.Module):
    """Frozen encoder, latent fusion, bottleneck, decompression, style mapping and decoder.

    Fusion and decoder compute in the dtype of the parameters, or in `compute_dtype` where that is set
    (parameters stay as they are). Moments, latents and images are float32 either way (float64 for float64
    parameters). The encoder computes in the dtype of its own parameters, and under bfloat16 autocast on CUDA.

    How exact float32 is on CUDA follows torch's global settings, and none is changed here. By default matrix
    products are full float32 (torch.set_float32_matmul_precision may allow TF32), while cuDNN's convolutions
    use TF32, about three decimal digits, until torch.backends.cudnn.allow_tf32 is switched off.

    `fused` selects fast operations (True) or the plain reference (False); both share parameters. One
    implementation cannot be named here, since no name exists for every operation: the functions of
    `vfmvae.ops` take names.
    """

    def __init__(
        self,
        config: TokenizerConfig,
        encoder_weights: str | Path | Mapping[str, Tensor] | None = "pretrained",
        fused: bool = True,
    ) -> None:
        """`encoder_weights`: "pretrained", a file or folder, a state dict, or None for random ones.

        Raises ValueError for parts that do not fit each other, and where the weights cannot be had.
        """
        if isinstance(config, str | Path):
            raise ValueError(
                f"a Tokenizer is built from a TokenizerConfig; to load {str(config)!r}, use vfmvae.load"
            )
        if not isinstance(config, TokenizerConfig):
            raise ValueError(
                f"a Tokenizer is built from a TokenizerConfig, not from a {type(config).__name__}"
            )
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.encoder = build_encoder(config.encoder, encoder_weights)
        z = config.latent_channels
        discrete = config.bottleneck.kind == "discrete"
        self.fusion = LatentFusion(
            config.fusion, self.encoder.width, self._token_ratio(), z if discrete else 2 * z
        )
        self.bottleneck = DiscreteBottleneck(config.bottleneck, z) if discrete else GaussianBottleneck()
        if not discrete:
            nn.init.constant_(self.fusion.final.last.bias[z:], config.bottleneck.initial_logvar)
        width = z * config.fusion.decompress_factor
        self.decompress = LatentProjection(
            z, width, config.fusion.decompress, config.fusion.decompress_depth, expand_first=True
        )
        # The alignment loss compares these with the encoder's last layer.
        self.align = nn.Linear(z, self.encoder.width, bias=False)
        nn.init.xavier_normal_(self.align.weight, gain=0.5)
        self.style = StyleMapping(width, config.decoder.style_width, config.decoder.style_pooled)
        self.decoder = Decoder(config.decoder, width, config.downsample)
        self.fused = fused

    @contextmanager
    def averaging(self, number: int, parts: int) -> Iterator[None]:
        """While entered, a forward in training mode counts in the running statistics (mean style, usage of
        codes) as part `number`, 0 for the first, of a batch in so many equal parts; of 0 parts, not at all.
        """
        with ExitStack() as stack:
            stack.enter_context(self.style.averaging(share_of_part(number, parts) if parts else 0.0))
            if isinstance(self.bottleneck, DiscreteBottleneck):
                stack.enter_context(self.bottleneck.counting(number, parts))
            yield

    def _token_ratio(self) -> int:
        """Encoder tokens per latent position along one axis."""
        config = self.config
        ratio = config.downsample * config.encoder.scale_factor / self.encoder.patch_size
        if ratio < 1 or abs(ratio - round(ratio)) > 1e-6:
            raise ValueError(
                f"encoder {config.encoder.name!r} (patch {self.encoder.patch_size}) at scale_factor"
                f" {config.encoder.scale_factor} gives {ratio:g} tokens per latent position and axis"
                f" with downsample"
                f" {config.downsample}; a whole number is needed: try scale_factor"
                f" {self.encoder.patch_size / config.downsample:g} or a multiple of it"
            )
        return round(ratio)

    @property
    def fused(self) -> bool:
        """Whether fast operations run; may be set at any time."""
        return self._fused

    @fused.setter
    def fused(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(
                f"fused is {value!r}; a tokenizer takes True or False (names of implementations belong to"
                f" the functions of vfmvae.ops)"
            )
        self._fused = value
        module: Any
        for module in self.modules():
            if module is not self and "fused" in type(module).__dict__:
                module.fused = value

    @property
    def image_multiple(self) -> int:
        """Heights and widths must be multiples of this."""
        return INPUT_STRIDE

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that fusion and decoder compute in."""
        return self.compute_dtype or self.align.weight.dtype

    def train(self, mode: bool = True) -> Tokenizer:
        """Training mode for all but the encoder, which is frozen."""
        super().train(mode)
        self.encoder.eval()
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Patch tokens of each layer in `config.encoder.layers`, [B, N, C] float32, without gradients.

        Raises ValueError for images of a wrong shape, range or size, or with NaN.
        """
        return self.encoder(check_images(images, self.image_multiple)).layers

    def encode(self, images: Tensor) -> Posterior | DiscretePosterior:
        """Images -> posterior over latents; the latent map is [B, z, H/downsample, W/downsample]."""
        return self.fuse(self.features(images), self._latent_size(images))

    def fuse(self, features: Sequence[Tensor], latent_size: tuple[int, int]) -> Posterior | DiscretePosterior:
        """`features` of images -> posterior over latents of size (h, w)."""
        self._check_features(features, latent_size)
        moments = self.fusion([tokens.to(self.dtype) for tokens in features], latent_size)
        return self.bottleneck(moments.to(torch.promote_types(moments.dtype, torch.float32)))

    @overload
    def decode(
        self, latents: Tensor, return_multiscale: Literal[False] = False, truncation: float = 1.0
    ) -> Tensor: ...

    @overload
    def decode(
        self, latents: Tensor, return_multiscale: Literal[True], truncation: float = 1.0
    ) -> tuple[Tensor, list[Tensor]]: ...

    def decode(
        self, latents: Tensor, return_multiscale: bool = False, truncation: float = 1.0
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Latents [B, z, h, w] -> image [B, 3, H, W], about [-1, 1] and not clamped, in float32 (or float64).

        Args:
            return_multiscale: also give the five smaller images, index 0 = half size.
            truncation: 1 keeps the style vector, towards 0 it approaches the average style.
        """
        self._check_latents(latents, max(1, INPUT_STRIDE // self.config.downsample))
        z_map = self.decompressed(latents)
        images = self.decoder(z_map, self.style(z_map, truncation), multiscale=return_multiscale)
        return (images[0], images[1:]) if return_multiscale else images[0]

    def decode_indices(self, indices: Tensor) -> Tensor:
        """`posterior.indices` [B, codebooks, h, w], any integer dtype -> image, as `decode` gives it.

        Raises ValueError for a Gaussian tokenizer, a wrong shape or dtype, and indices that no codebook has.
        """
        if not isinstance(self.bottleneck, DiscreteBottleneck):
            raise ValueError("this tokenizer's latents are Gaussian and have no indices; use decode")
        return self.decode(self.bottleneck.lookup(indices))

    def decompressed(self, latents: Tensor) -> Tensor:
        """Latents [B, z, h, w] -> the map that decoder and style see, [B, z * decompress_factor, h, w]."""
        tokens = map_to_tokens(latents.to(self.dtype))
        return tokens_to_map(self.decompress(tokens), (latents.shape[2], latents.shape[3]))

    def alignment_loss(self, latents: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Distance of projected latents [B, z, h, w] from the encoder's last layer; a scalar.

        `features`: what `features(images)` returned; its layer -1 is averaged over each latent position.
        Raises ValueError where their shapes do not fit the latents'.
        """
        prediction, target = self.alignment_pair(latents, features)
        margins = self.config.alignment
        return ops.vf_alignment_loss(
            prediction,
            target,
            margins.distance_margin,
            margins.cosine_margin,
            margins.distance_weight,
            margins.cosine_weight,
            fused=self.fused,
        )

    def alignment_pair(self, latents: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The two sides of the alignment loss, each [B, h*w, C]: projected latents, and features without
        gradient.
        """
        if -1 not in self.config.encoder.layers:
            raise ValueError(
                f"alignment needs the encoder's last layer; encoder.layers {self.config.encoder.layers}"
                f" lacks -1"
            )
        self._check_latents(latents, multiple=1)
        height, width = latents.shape[-2:]
        self._check_features(features, (height, width), len(latents))
        ratio = self.fusion.ratio
        last = features[self.config.encoder.layers.index(-1)].detach()
        target = F.avg_pool2d(tokens_to_map(last, (height * ratio, width * ratio)), ratio)
        prediction = F.linear(map_to_tokens(latents.to(self.align.weight.dtype)), self.align.weight)
        return prediction, map_to_tokens(target)

    @property
    def last_fusion_weight(self) -> Tensor:
        """The weight that the adaptive alignment weight compares gradient norms at."""
        return self.fusion.final.last.weight

    @property
    def last_decoder_weight(self) -> Tensor:
        """The weight that the adaptive adversarial weight compares gradient norms at."""
        last: Any = self.decoder.blocks[-1]
        return last.to_rgb.weight

    def forward(
        self, images: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """One training forward: encode, sample, decode at every scale. Values are not checked (no device
        wait).
        """
        check_image_shape(images, self.image_multiple)
        images = to_unit(images) if images.dtype == torch.uint8 else images
        features = self.encoder(images).layers
        posterior = self.fuse(features, self._latent_size(images))
        latents = posterior.sample(noise, generator)
        reconstruction, multiscale = self.decode(latents, return_multiscale=True)
        return TokenizerOutput(reconstruction, multiscale, latents, posterior, features)

    def save(self, path: str | Path) -> None:
        """Write `path`/config.json and `path`/model.safetensors; see vfmvae.load."""
        # Imported here: files.py builds Tokenizers, so it imports this module.
        from vfmvae.tokenizer.files import save_tokenizer

        save_tokenizer(self, Path(path))

    def _latent_size(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.config.downsample, images.shape[-1] // self.config.downsample

    def _check_latents(self, latents: Tensor, multiple: int) -> None:
        channels = self.config.latent_channels
        needed = f"[B, {channels}, h, w] with B at least 1, and h and w in multiples of {multiple}"
        check_is_tensor(latents, "latents", needed)
        if (
            latents.ndim != 4
            or not len(latents)
            or latents.shape[1] != channels
            or any(s % multiple or not s for s in latents.shape[2:])
        ):
            raise ValueError(f"latents have shape {tuple(latents.shape)}; needed is {needed}")
        if not latents.is_floating_point():
            raise ValueError(f"latents have dtype {latents.dtype}; needed is a floating point dtype")

    def _check_features(
        self, features: Sequence[Tensor], latent_size: tuple[int, int], batch: int | None = None
    ) -> None:
        layers, ratio = self.config.encoder.layers, self.fusion.ratio
        tokens = latent_size[0] * ratio * latent_size[1] * ratio
        needed = f"one [{batch or 'B'}, {tokens}, {self.encoder.width}] for each of encoder.layers {layers}"
        for one in features:
            check_is_tensor(one, "features", needed)
        shapes = [tuple(one.shape) for one in features]
        batch = shapes[0][0] if batch is None and shapes and shapes[0] else batch
        if shapes != [(batch, tokens, self.encoder.width)] * len(layers):
            raise ValueError(f"features have the shapes {shapes}; needed is {needed}")
