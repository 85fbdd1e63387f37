"""The options of a diffusion transformer, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vfmvae.serialization import check_fields, check_lowest


@dataclass(frozen=True)
class TransformerConfig:
    """A diffusion transformer; the defaults are SiT-XL/1 on latents of 32 x 16 x 16."""

    latent_size: int = 16
    """Rows and columns of the latents."""
    channels: int = 32
    """Of the latents."""
    patch: int = 1
    """Latent rows and columns of a token."""
    width: int = 1152
    depth: int = 28
    heads: int = 16
    classes: int = 1000
    """Without the null class, whose label is this number."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over the width; SwiGLU takes two thirds of it."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm without affine, or RMSNorm with weights."""
    qk_norm: bool = False
    """Normalise queries and keys over each head."""
    swiglu: bool = False
    """SwiGLU in place of the MLP with tanh GELU."""
    rope: bool = False
    """2-D rotary positions, beside the sin-cos embedding."""
    block_shift: bool = True
    """Blocks are modulated by a shift too, not by scale and gate alone."""
    class_token_width: int | None = None
    """Of the encoder's class token that is denoised along (REG); None: there is none."""
    alignment_depth: int = 8
    """After so many blocks the projectors read the tokens."""
    alignment_widths: tuple[int, ...] = ()
    """Widths of the encoders that tokens are aligned with (REPA), a projector each."""
    projector: Literal["mlp", "conv"] = "mlp"
    """Three linear layers, or one 3 x 3 convolution (iREPA)."""
    projector_width: int = 2048
    """Hidden width of the MLP projectors."""
    learn_sigma: bool = False
    """The last layer has twice the channels, of which the second half is dropped (original SiT)."""
    published_time: Literal["noise", "data"] = "noise"
    """What t = 1 was in training. "data" (SiT, LightningDiT): the model is given 1 - t, and its velocity is
    turned around, so that outside t = 1 is noise always."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        names = ("latent_size", "channels", "patch", "width", "depth", "heads", "classes", "projector_width")
        check_lowest(self, "model", dict.fromkeys((*names, "alignment_depth", "alignment_widths"), 1))
        for what, whole, part, of_part in (
            ("latent_size", self.latent_size, self.patch, f"patches of {self.patch}"),
            ("width", self.width, self.heads, f"{self.heads} heads"),
            ("width", self.width, 4, "four, as the position embedding needs"),
        ):
            if whole % part:
                raise ValueError(f"model.{what} {whole} cannot be divided by {of_part}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"model.mlp_ratio is {self.mlp_ratio}; it must be above 0")
        if self.rope and (self.width // self.heads) % 4:
            raise ValueError(
                f"model.rope turns pairs along two axes; 4 must divide the heads' width"
                f" {self.width // self.heads} (model.width / model.heads)"
            )
        if self.class_token_width is not None and self.class_token_width < 1:
            raise ValueError(f"model.class_token_width is {self.class_token_width}; it must be at least 1")
        if self.alignment_widths and self.alignment_depth > self.depth:
            raise ValueError(
                f"model.alignment_depth {self.alignment_depth} is more than model.depth {self.depth}"
            )
        if self.class_token_width is not None and self.projector == "conv" and self.alignment_widths:
            raise ValueError(
                "model.projector 'conv' looks at a token's neighbours, and a class token"
                " (model.class_token_width) has none; use 'mlp'"
            )

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.latent_size // self.patch

    @property
    def tokens(self) -> int:
        """Tokens in all, the class token included."""
        return self.grid**2 + (self.class_token_width is not None)


SIZES: dict[str, dict[str, Any]] = {
    "B": {"depth": 12, "width": 768, "heads": 12, "alignment_depth": 4},
    "L": {"depth": 24, "width": 1024, "heads": 16, "alignment_depth": 8},
    "XL": {"depth": 28, "width": 1152, "heads": 16, "alignment_depth": 8},
}
"""Published sizes, for `TransformerConfig(**SIZES["XL"], ...)`."""
