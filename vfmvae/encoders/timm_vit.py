"""Frozen vision transformers over timm's classes: SigLIP, DINOv2, DINOv3, EVA-CLIP, CLIP, MAE and `mini`.

timm gives the modules and their parameter names. The way of the tokens through them is written out here
instead of calling timm's `forward_features`, because three things must be exact: the layer convention
(`vfmvae.encoders.base`), the interpolation of position embeddings (timm's antialiases, the models' own code
does not), and the activation.

Numerics follow the reference code of each family, as Hugging Face transformers runs it:
  SigLIP, SigLIP 2  tanh GELU in every block and in the pooling head; pooled = learned probe attending to the
                    tokens after the final LayerNorm, then x + mlp(LN(x)) (arXiv 2303.15343, 2502.14786)
  DINOv2            with registers the position embedding is interpolated with antialiasing, without them
                    not (arXiv 2304.07193, 2309.16588)
  DINOv3, EVA-CLIP  rotary embedding computed for the actual token grid (arXiv 2508.10104, 2303.15389)
  CLIP              quick GELU, LayerNorm before the blocks (arXiv 2103.00020)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models import eva, get_pretrained_cfg, vision_transformer
from torch import Tensor, nn

from vfmvae.encoders.base import EncoderConfig, FrozenEncoder, Preprocessing, ViTConfig
from vfmvae.encoders.timm_attention import use_ops_attention
from vfmvae.weights import check_names

OWN_PREFIX = "trunk."
# In checkpoints of the same models for other purposes: classifiers and pretraining heads.
_NOT_THE_ENCODER = ("head.", "decoder_", "mask_token")


@dataclass(frozen=True)
class TimmFamily:
    """What the members of a family share beyond their dimensions.

    `hugging_face` translates that library's parameter names to timm's (`vfmvae.encoders.hf_weights`), or
    returns None for a state dict that does not carry them. `activation` replaces timm's where the published
    model has another. `packed_gate`: the first MLP layer holds gate and value together.
    """

    preprocessing: Preprocessing
    pooling: Literal["attention", "class", "mean"]
    hugging_face: Callable[[Mapping[str, Tensor]], dict[str, Tensor] | None] | None = None
    activation: str | None = None
    antialias_positions: bool = False
    packed_gate: bool = False


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool
) -> Tensor:
    """Position embeddings [1, N, C] of the grid `old`, resampled bicubically to the grid `new`."""
    if old == new:
        return positions
    grid = positions.unflatten(1, old).permute(0, 3, 1, 2)  # [1, C, rows, columns]
    grid = F.interpolate(grid.float(), new, mode="bicubic", align_corners=False, antialias=antialias)
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)


class TimmEncoder(FrozenEncoder):
    """A timm vision transformer as a frozen encoder; its parameters have timm's names, under `trunk.`."""

    trunk: Any  # timm's VisionTransformer or Eva; their attributes are not typed

    def __init__(
        self, config: EncoderConfig, family: TimmFamily, model: str, vit: ViTConfig | None = None
    ) -> None:
        """`model`: timm's name, with or without a tag of weights. `vit`: dimensions that replace its own."""
        arguments = _model_arguments(family, vit)
        trunk: Any = timm.create_model(model, pretrained=False, num_classes=0, **arguments)
        patch_size = trunk.patch_embed.patch_size[0]
        super().__init__(
            config,
            width=trunk.embed_dim,
            depth=len(trunk.blocks),
            patch_size=patch_size,
            multiple=patch_size,
            pixels=family.preprocessing,
        )
        use_ops_attention(trunk)
        self.family = family
        self.trunk = trunk
        self.image_size: int = trunk.patch_embed.img_size[0]  # that the position embedding is made for
        self.has_class_token: bool = trunk.cls_token is not None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.trunk.blocks)

    def tokens(self, pixels: Tensor, wanted: set[int]) -> tuple[dict[int, Tensor], Tensor]:
        outputs, last = self.all_tokens(pixels, wanted)
        prefix = self.trunk.num_prefix_tokens
        return {position: outputs[position][:, prefix:] for position in wanted}, self._pool(last)

    def all_tokens(self, pixels: Tensor, wanted: set[int]) -> tuple[dict[int, Tensor], Tensor]:
        """({position: [B, prefix + N, C]}, those after the final norm); a class token, if any, is first."""
        trunk = self.trunk
        x = trunk.patch_embed.proj(pixels)  # [B, C, h, w]
        grid = (x.shape[-2], x.shape[-1])
        x = self._with_positions(x.flatten(2).transpose(1, 2), grid)  # [B, prefix + N, C]
        outputs = {0: x}
        x = trunk.norm_pre(x)
        rotary = getattr(trunk, "rope", None)  # only timm's Eva class has one
        extra = {} if rotary is None else {"rope": rotary.get_embed(shape=grid)}
        for index, block in enumerate(trunk.blocks, start=1):
            x = block(x, **extra)
            if index in wanted:
                outputs[index] = x
        x = trunk.norm(x)
        outputs[self.depth + 1] = x
        return outputs, x

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State dicts in the format of timm, of the original publication, or of Hugging Face."""
        if any(name.startswith(OWN_PREFIX) for name in state):
            own = {name.removeprefix(OWN_PREFIX): tensor for name, tensor in state.items()}
        else:
            own = self._to_timm(state)
        check_names(self.config.name, own, self.trunk.state_dict())
        return {OWN_PREFIX + name: tensor for name, tensor in own.items()}

    def _to_timm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converted = self.family.hugging_face(state) if self.family.hugging_face else None
        own = dict(state) if converted is None else converted
        for name, tensor in own.items():
            # timm would resample the kernel; here it means that the file belongs to another model.
            if (
                name.endswith(("patch_embed.proj.weight", "conv1.weight"))
                and tensor.shape[-1] != self.patch_size
            ):
                raise ValueError(
                    f"encoder {self.config.name}: {name} is {list(tensor.shape)}, a patch size of "
                    f"{tensor.shape[-1]} where {self.patch_size} is needed; the weights are of another model"
                )
        module = eva if isinstance(self.trunk, eva.Eva) else vision_transformer
        own = module.checkpoint_filter_fn(own, self.trunk, antialias=self.family.antialias_positions)
        return {name: tensor for name, tensor in own.items() if not name.startswith(_NOT_THE_ENCODER)}

    def _with_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Adds class and register tokens and the absolute position embedding to patch tokens [B, N, C]."""
        trunk = self.trunk
        given = (trunk.cls_token, getattr(trunk, "reg_token", None))
        prefix = [token.expand(x.shape[0], -1, -1) for token in given if token is not None]
        if trunk.pos_embed is None:
            return torch.cat([*prefix, x], dim=1)
        positions = trunk.pos_embed
        covered = 0 if trunk.no_embed_class else trunk.num_prefix_tokens  # prefix tokens that have a position
        native = tuple(trunk.patch_embed.grid_size)
        patches = resize_positions(positions[:, covered:], native, grid, self.family.antialias_positions)
        if covered:
            return torch.cat([*prefix, x], dim=1) + torch.cat([positions[:, :covered], patches], dim=1)
        return torch.cat([*prefix, x + patches], dim=1)

    def _pool(self, x: Tensor) -> Tensor:
        """Pooled features [B, C] from all tokens after the final norm [B, prefix + N, C]."""
        if self.family.pooling == "attention":
            return self.trunk.attn_pool(x)
        return x[:, 0] if self.family.pooling == "class" else x.mean(dim=1)


def _model_arguments(family: TimmFamily, vit: ViTConfig | None) -> dict[str, Any]:
    """What differs from timm's own definition of the model."""
    arguments: dict[str, Any] = {"dynamic_img_size": True}  # rotary embedding for any grid
    if family.pooling == "attention":
        arguments["global_pool"] = "map"
    elif family.pooling == "class":
        arguments["global_pool"] = "token"
    else:
        arguments |= {"global_pool": "avg", "class_token": False, "fc_norm": False}
    if family.activation is not None:
        arguments["act_layer"] = family.activation
    if vit is not None:
        hidden = vit.mlp_width * (2 if family.packed_gate else 1)
        arguments |= {
            "embed_dim": vit.width,
            "depth": vit.depth,
            "num_heads": vit.heads,
            "patch_size": vit.patch_size,
            "img_size": vit.image_size,
            "mlp_ratio": (hidden + 0.5) / vit.width,  # timm truncates width * ratio
        }
    return arguments


def hub_repository(model: str) -> str:
    """Where on the Hugging Face hub timm keeps the weights of `model` (a name with its tag)."""
    pretrained = get_pretrained_cfg(model)
    if pretrained is None or not pretrained.hf_hub_id:
        raise ValueError(f"this version of timm ({timm.__version__}) knows no published weights for {model}")
    return pretrained.hf_hub_id
