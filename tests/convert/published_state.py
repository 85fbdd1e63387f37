"""Random published VFM-VAE checkpoints: the parameter names and shapes that published arguments imply.

Every value is far from its initialisation, so that no parameter can be lost or swapped unseen: norms are not
1 and 0, residual scales and output layers that training starts near zero are of order one. Constants of
the published system (blur weights, the zero key bias) are constants here too. All tensors are float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.convert.published_form import ENCODER, NUM_BLOCKS, Arguments, siglip, token_ratio


class _Draw:
    """A checkpoint in the making: each method adds the parameters of one kind of module."""

    def __init__(self, seed: int) -> None:
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int, mean: float = 0.0, std: float = 1.0) -> None:
        self.state[name] = mean + std * torch.randn(shape, generator=self.generator)

    def norm(self, name: str, width: int) -> None:
        self.normal(f"{name}.weight", width, mean=1.0, std=0.2)
        self.normal(f"{name}.bias", width, std=0.2)

    def weight(self, name: str, *shape: int) -> None:
        """A weight that keeps the variance of its input."""
        self.normal(f"{name}.weight", *shape, std=1 / math.sqrt(math.prod(shape[1:])))

    def layer(self, name: str, *shape: int) -> None:
        self.weight(name, *shape)
        self.normal(f"{name}.bias", shape[0], std=0.2)

    def projection(
        self, name: str, how: str, layers: int, width_in: int, width_out: int, compresses: bool
    ) -> None:
        """One convolution, or a stack that changes the width in its last (compressing) or first block."""
        if how == "conv":
            self.layer(name, width_out, width_in, 1, 1)
            return
        wide = [width_in if compresses else width_out] * (layers - 1)
        widths = [width_in, *wide, width_out]
        for j in range(layers):
            self.attention_projection(f"{name}.blocks.{j}", widths[j], widths[j + 1])

    def attention_projection(self, name: str, width_in: int, width_out: int) -> None:
        inner = width_in if width_in > width_out else width_out
        self.norm(f"{name}.norm1", width_in)
        self.norm(f"{name}.norm3", width_in)
        self.norm(f"{name}.norm2", width_out)
        self.norm(f"{name}.mlp.norm", width_out)
        self.layer(f"{name}.proj", width_out, width_in)
        self.weight(f"{name}.attn.qkv", 3 * inner, width_in)
        self.normal(f"{name}.attn.q_bias", inner)
        self.normal(f"{name}.attn.v_bias", inner)
        self.state[f"{name}.attn.zero_k_bias"] = torch.zeros(inner)
        self.layer(f"{name}.attn.proj", width_out, width_out)
        self.layer(f"{name}.mlp.w0", 2 * width_out, width_out)
        self.layer(f"{name}.mlp.w1", 2 * width_out, width_out)
        self.layer(f"{name}.mlp.w2", width_out, 2 * width_out)

    def encoder(self, arguments: Arguments) -> None:
        for name, x in siglip(arguments).named_parameters():
            full = f"{ENCODER}.{name}"
            if x.ndim > 1:
                self.normal(full, *x.shape, std=1 / math.sqrt(x[0].numel()))
            else:
                self.normal(full, *x.shape, mean=float(name.endswith("weight")), std=0.2)

    def convnext(self, name: str, width: int, style: int, block: int, legacy: bool) -> None:
        kernel = 5 if block <= 1 else 7
        self.layer(f"{name}.dwconv", width, 1, kernel, kernel)
        if legacy:
            self.normal(f"{name}.noise_const", 8 * 2**block, 8 * 2**block)
            self.normal(f"{name}.noise_strength")
        self.norm(f"{name}.norm", width)
        self.style_split(f"{name}.affine_pw1", width, style)
        self.weight(f"{name}.pwconv1", 4 * width, width, 1, 1)
        self.normal(f"{name}.pwconv1.bias", 1, 4 * width, 1, 1)
        self.layer(f"{name}.pwconv2", width, 4 * width, 1, 1)
        self.normal(f"{name}.gamma", 1, width, 1, 1)

    def style_split(self, name: str, width: int, style: int) -> None:
        self.normal(f"{name}.proj.weight", 3 * width, style)
        self.normal(f"{name}.proj.bias", 3 * width, mean=1.0, std=0.3)

    def self_attention(self, name: str, width: int) -> None:
        self.normal(f"{name}.attn.norm.gamma", width, 1, 1, mean=1.0, std=0.3)
        self.normal(f"{name}.attn.null_kv", 2, 8, width // 8)
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            self.weight(f"{name}.attn.{layer}", width, width, 1, 1)
        self.normal(f"{name}.ff.0.gamma", width, 1, 1, mean=1.0, std=0.3)
        self.layer(f"{name}.ff.1", 4 * width, width, 1, 1)
        self.layer(f"{name}.ff.3", width, 4 * width, 1, 1)

    def upsample(self, name: str, width_in: int, width_out: int, block: int, first: bool, blur: bool) -> None:
        self.norm(f"{name}.norm", width_out if first else width_in)
        self.weight(f"{name}.depthwise", width_in, 1, 3, 3)
        self.weight(f"{name}.pointwise", 4 * width_out, width_in, 1, 1)
        if blur:
            row = torch.tensor([1.0, 2, 1] if block <= 2 else [1.0, 4, 6, 4, 1])
            kernel = torch.outer(row, row) / row.sum() ** 2
            self.state[f"{name}.blur_weight"] = kernel.repeat(width_out, 1, 1, 1)

    def latent_branch(self, name: str, width: int, mapped: int, shrink: float) -> None:
        """`shrink`: side of the latent grid / side of the map that the branch gives."""
        first, last = (1, 2) if shrink > 1 else (0, 1) if shrink == 1 else (0, 2)
        inside = int(width * max(shrink, 1) ** 2)
        middle = int(mapped / min(shrink, 1) ** 2)
        self.weight(f"{name}.{first}.0", inside, 1, 3, 3)
        self.weight(f"{name}.{first}.1", middle, inside, 1, 1)
        self.norm(f"{name}.{first}.2", middle)
        self.weight(f"{name}.{last}.0", mapped, mapped, 1, 1)
        self.norm(f"{name}.{last}.1", mapped)


def random_state(arguments: Arguments, seed: int = 0) -> dict[str, Tensor]:
    """A random generator with the published names and shapes for published arguments."""
    draw = _Draw(seed)
    draw.encoder(arguments)
    latent_width = _bottleneck(draw, arguments)
    width = latent_width * arguments["decompress_factor"]
    how, layers = arguments["how_to_decompress"], arguments["attnproj_post_quant_layers"]
    draw.projection("ldm_adapter.post_quant", how, layers, latent_width, width, compresses=False)
    style = arguments["z_dim_for_mapping_mlp_output"]
    for i, out in enumerate((width, style)):  # stored: 100 times the weights and biases in effect
        draw.normal(f"mapping.mlp.fc{i}.weight", out, width, std=100.0)
        draw.normal(f"mapping.mlp.fc{i}.bias", out, std=20.0)
    draw.normal("mapping.x_avg", style)
    _synthesis(draw, arguments, width, style)
    return draw.state


def _bottleneck(draw: _Draw, arguments: Arguments) -> int:
    """Fusion, quantiser and the projection of the VF loss. Returns the latent's width."""
    how, layers = arguments["how_to_compress"], arguments["attnproj_quant_layers"]
    dims = list(zip(arguments["patch_in_dimensions"], arguments["patch_out_dimensions"], strict=True))
    for i, (width_in, width_out) in enumerate(dims):
        draw.projection(f"ldm_adapter.patch_quants.{i}.0", how, layers, width_in, width_out, compresses=True)
    fused = sum(width_out for _, width_out in dims) * token_ratio(arguments) ** 2
    discrete = arguments["compression_mode"] == "discrete"
    latent = arguments["vocab_width"] if discrete else arguments["z_dimension"]
    channels = latent if discrete else 2 * latent
    draw.projection("ldm_adapter.final_quant", how, layers, fused, channels, compresses=True)
    if discrete:
        books = arguments["num_codebooks"]
        codes = arguments["vocab_size"] // books
        for i in range(books):
            name = f"ldm_adapter.quantizer.codebooks.{i}"
            draw.normal(f"{name}.codebook.weight", codes, latent // books)
            draw.state[f"{name}.vocab_usage"] = torch.rand(codes, generator=draw.generator)
    if arguments["use_vf_loss"]:
        draw.weight("ldm_adapter.linear_proj", arguments["vfm_config"]["hidden_size"], latent, 1, 1)
    return latent


def _synthesis(draw: _Draw, arguments: Arguments, latent_width: int, style: int) -> None:
    options = arguments["synthesis_kwargs"]
    blur, legacy = arguments["use_gaussian_blur"], arguments["legacy"]
    before = 0
    for i in range(NUM_BLOCKS):
        name = f"synthesis.blocks.{i}"
        width = min(options["channel_base"] // (8 * 2**i), options["channel_max"])  # resolution * 256 / image
        width_in = before
        if i in arguments["concat_z_block_indices"]:
            mapped = arguments["concat_z_mapped_dims"][i]
            width_in += mapped
            shrink = 64 / arguments["resolution_compression_factor"] / 2**i
            draw.latent_branch(f"synthesis.z_convs.{i}", latent_width, mapped, shrink)
        draw.upsample(f"{name}.seperate_upsample_conv", width_in, width, i, i == 0, blur)
        per_residual_block = 3 if arguments["add_additional_convnext"] and i <= 3 else 2
        draw.convnext(f"{name}.conv0", width, style, i, legacy)
        for j in range(options["num_res_blocks"] * per_residual_block):
            draw.convnext(f"{name}.convs1.{j}", width, style, i, legacy)
        if arguments["use_self_attn"] and i in arguments["attn_block_indices"]:
            depth = arguments["attn_depths"][arguments["attn_block_indices"].index(i)]
            for j in range(depth):
                draw.self_attention(f"{name}.self_attns.{j}", width)
        if i > 0:
            draw.upsample(f"{name}.last_upsample_conv", before, width, i, False, blur)
        draw.style_split(f"{name}.torgb.affine", width, style)
        draw.normal(f"{name}.torgb.weight", 3, width, 1, 1)
        draw.normal(f"{name}.torgb.bias", 1, 3, 1, 1)
        before = width
