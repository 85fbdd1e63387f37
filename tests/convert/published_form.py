"""The published VFM-VAE generator as plain functions of a published checkpoint: a second opinion.

Written from the description of the published system alone (Bi et al., arXiv 2510.18457), it shares nothing
with the package: parameters carry their published names, options are the published arguments, operations
are the textbook ones. What a converted tokenizer computes must equal what these functions compute.

Legend: B batch, C channels, n tokens, h x w latent grid, H x W image. Token grids stay maps
[B,C,rows,columns]. Images are [B,3,H,W] in [-1,1]; state and images have one dtype, in which all is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

State = Mapping[str, Tensor]
Arguments = Mapping[str, Any]

ENCODER = "vfm_encoder.encoder.vision_model.vision_model"
NUM_BLOCKS = 6
ACTIVATIONS = {"lrelu": lambda x: F.leaky_relu(x, 0.2), "gelu": F.gelu, "silu": F.silu}


def part(state: State, prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, without it."""
    return {name[len(prefix) + 1 :]: x for name, x in state.items() if name.startswith(prefix + ".")}


# --- 1. Frozen encoder -------------------------------------------------------------------------------------


def siglip(arguments: Arguments) -> SiglipVisionModel:
    """The Hugging Face encoder, without its outer wrapper (older releases have one more level of names)."""
    config = {name: x for name, x in arguments["vfm_config"].items() if name != "model_type"}
    model = SiglipVisionModel(SiglipVisionConfig(**config))
    return getattr(model, "vision_model", model)


def features(state: State, arguments: Arguments, images: Tensor) -> list[Tensor]:
    """The token maps [B,C,rows,columns] of `patch_from_layers`."""
    encoder = siglip(arguments).eval().to(images.dtype)
    encoder.load_state_dict(part(state, ENCODER))
    pixels = (images + 1) / 2
    scale = arguments["scale_factor"]
    if scale != 1:
        size = [round(side * scale) for side in images.shape[-2:]]
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=scale < 1)
    pixels = (pixels - 0.5) / 0.5
    with torch.no_grad():
        out = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    # 0: embeddings, k: after block k, -1: after the final normalisation, -2: after the last block, ...
    layers = [*out.hidden_states, out.last_hidden_state]
    rows = pixels.shape[-2] // arguments["vfm_config"]["patch_size"]
    return [layers[i].transpose(1, 2).unflatten(2, (rows, -1)) for i in arguments["patch_from_layers"]]


# --- 2. Multi-scale latent fusion and bottleneck -----------------------------------------------------------


def layer_norm(x: Tensor, p: State, name: str, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def linear(x: Tensor, p: State, name: str) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def attention_projection(x: Tensor, p: State) -> Tensor:
    """One AttnProjection block, tokens [B,n,in] -> [B,n,out]."""
    width_out, width_in = p["proj.weight"].shape
    compresses = width_in > width_out
    heads = width_in // width_out if compresses else max(1, width_out // width_in)
    bias = torch.cat([p["attn.q_bias"], p["attn.zero_k_bias"], p["attn.v_bias"]])
    qkv = F.linear(layer_norm(x, p, "norm1"), p["attn.qkv.weight"], bias)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B,heads,n,d]
    attended = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v
    if compresses:
        attended = F.adaptive_avg_pool1d(attended.mean(dim=1), width_out)
    else:
        attended = attended.transpose(1, 2).flatten(2)
    y = linear(layer_norm(x, p, "norm3"), p, "proj") + linear(attended, p, "attn.proj")
    hidden = layer_norm(layer_norm(y, p, "norm2"), p, "mlp.norm", eps=1e-6)
    gate = F.gelu(linear(hidden, p, "mlp.w0"), approximate="tanh")
    return y + linear(gate * linear(hidden, p, "mlp.w1"), p, "mlp.w2")


def project(x: Tensor, p: State, how: str) -> Tensor:
    """A stack of AttnProjection blocks or a 1x1 convolution on a map."""
    if how == "conv":
        return F.conv2d(x, p["weight"], p["bias"])
    tokens = x.flatten(2).transpose(1, 2)
    for j in range(len({name.split(".")[1] for name in p})):
        tokens = attention_projection(tokens, part(p, f"blocks.{j}"))
    return tokens.transpose(1, 2).unflatten(2, x.shape[-2:])


def token_ratio(arguments: Arguments) -> int:
    """Side of the token grid / side of the latent grid."""
    scaled = arguments["scale_factor"] * arguments["resolution_compression_factor"]
    return int(scaled // arguments["vfm_config"]["patch_size"])


def compress(state: State, arguments: Arguments, maps: list[Tensor]) -> Tensor:
    """The output of the fusion: moments [B,2z,h,w], or the codes to be quantised [B,vocab_width,h,w]."""
    how, ratio = arguments["how_to_compress"], token_ratio(arguments)
    small = [project(x, part(state, f"ldm_adapter.patch_quants.{i}.0"), how) for i, x in enumerate(maps)]
    merged = torch.cat([F.pixel_unshuffle(x, ratio) for x in small], dim=1)
    return project(merged, part(state, "ldm_adapter.final_quant"), how)


class Gaussian(NamedTuple):
    mean: Tensor  # [B,z,h,w]
    logvar: Tensor  # [B,z,h,w]
    kl: Tensor  # mean over the batch

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + torch.exp(self.logvar / 2) * noise


def gaussian(moments: Tensor) -> Gaussian:
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))
    return Gaussian(mean, logvar, kl.mean())


class Quantised(NamedTuple):
    indices: Tensor  # [B,codebooks,h,w]
    latents: Tensor  # the codes with straight-through gradient, [B,vocab_width,h,w]
    quantization_loss: Tensor
    entropy_loss: Tensor


def quantise(state: State, arguments: Arguments, x: Tensor) -> Quantised:
    indices, latents, losses, entropies = [], [], [], []
    for i, chunk in enumerate(x.chunk(arguments["num_codebooks"], dim=1)):
        table = F.normalize(state[f"ldm_adapter.quantizer.codebooks.{i}.codebook.weight"], dim=1)
        unit = F.normalize(chunk, dim=1).permute(0, 2, 3, 1)  # [B,h,w,d]
        index = (unit @ table.T).argmax(dim=-1)
        code = table[index]
        commitment, codebook = F.mse_loss(code.detach(), unit), F.mse_loss(code, unit.detach())
        losses.append(arguments["vocab_beta"] * commitment + codebook)
        distance = (unit.unsqueeze(-2) - table).square().sum(dim=-1).flatten(0, 2)  # [B*h*w,vocab]
        p = torch.softmax(-distance / arguments["entropy_temp"], dim=-1)
        log_p = torch.log_softmax(-distance / arguments["entropy_temp"], dim=-1)
        mean_p = p.mean(dim=0)
        entropies.append(-(p * log_p).sum(dim=-1).mean() + (mean_p * torch.log(mean_p + 1e-7)).sum())
        indices.append(index)
        latents.append((unit + (code - unit).detach()).permute(0, 3, 1, 2))
    mean_loss, mean_entropy = torch.stack(losses).mean(), torch.stack(entropies).mean()
    return Quantised(torch.stack(indices, dim=1), torch.cat(latents, dim=1), mean_loss, mean_entropy)


# --- 3. Alignment to the foundation model ------------------------------------------------------------------


def vf_loss(state: State, arguments: Arguments, latents: Tensor, maps: list[Tensor]) -> Tensor:
    target = maps[arguments["patch_from_layers"].index(-1)]
    target = F.avg_pool2d(target.detach(), token_ratio(arguments)).flatten(2)  # [B,C,n]
    projected = F.conv2d(latents, state["ldm_adapter.linear_proj.weight"]).flatten(2)
    a, b = F.normalize(target, dim=1), F.normalize(projected, dim=1)
    distance = torch.relu((b.mT @ b - a.mT @ a).abs() - arguments["distmat_margin"]).mean()
    cosine = torch.relu(1 - arguments["cos_margin"] - (a * b).sum(dim=1)).mean()
    return arguments["distmat_weight"] * distance + arguments["cos_weight"] * cosine


# --- 4. Decompression and style ----------------------------------------------------------------------------


def decompress(state: State, arguments: Arguments, latents: Tensor) -> Tensor:
    return project(latents, part(state, "ldm_adapter.post_quant"), arguments["how_to_decompress"])


def equalised(x: Tensor, p: State, name: str, lr_mult: float = 1.0) -> Tensor:
    weight = p[f"{name}.weight"]
    return F.linear(x, weight * (lr_mult / math.sqrt(weight.shape[1])), p[f"{name}.bias"] * lr_mult)


def style(state: State, decompressed: Tensor, truncation: float = 1.0) -> Tensor:
    """The one style vector [B,w] that every layer gets; the average style if `truncation` is 0."""
    s = decompressed.mean(dim=(2, 3))
    s = s / torch.sqrt(s.square().mean(dim=1, keepdim=True) + 1e-8)
    s = F.leaky_relu(equalised(s, state, "mapping.mlp.fc0", lr_mult=0.01), 0.2)
    s = equalised(s, state, "mapping.mlp.fc1", lr_mult=0.01)
    return state["mapping.x_avg"] + truncation * (s - state["mapping.x_avg"])


# --- 5. Decoder --------------------------------------------------------------------------------------------


def group_norm(x: Tensor, p: State, name: str, groups: int) -> Tensor:
    return F.group_norm(x, groups, p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def style_split(w: Tensor, p: State, name: str) -> Tensor:
    m1, m2, m3 = equalised(w, p, f"{name}.proj").chunk(3, dim=1)
    return m1 * m2 + m3


def modulated(x: Tensor, weight: Tensor, v: Tensor, demodulate: bool) -> Tensor:
    """A 1x1 convolution with weights of its own for each sample."""
    per_sample = weight.flatten(1) * v.unsqueeze(1)  # [B,out,in]
    if demodulate:
        per_sample = per_sample * torch.rsqrt(per_sample.square().sum(dim=2, keepdim=True) + 1e-8)
    return torch.einsum("boi,bihw->bohw", per_sample, x)


def latent_branch(zd: Tensor, p: State, arguments: Arguments, block: int) -> Tensor:
    """The decompressed map at the resolution of the input of a block (`z_convs.{block}`)."""
    shrink = 64 / arguments["resolution_compression_factor"] / 2**block  # 2 * grid / resolution of the block
    x = F.pixel_unshuffle(zd, int(shrink)) if shrink > 1 else zd
    first, last = (1, 2) if shrink > 1 else (0, 1) if shrink == 1 else (0, 2)
    x = F.conv2d(x, p[f"{first}.0.weight"], padding=1, groups=x.shape[1])
    x = F.conv2d(x, p[f"{first}.1.weight"])
    x = group_norm(x, p, f"{first}.2", min(32, x.shape[1]))
    x = ACTIVATIONS[arguments["activation_for_concat_z"]](x)
    if shrink < 1:
        x = F.pixel_shuffle(x, int(1 / shrink))
    x = F.conv2d(x, p[f"{last}.0.weight"])
    return group_norm(x, p, f"{last}.1", min(32, x.shape[1]))


def upsample(x: Tensor, p: State, arguments: Arguments, block: int, norm_first: bool) -> Tensor:
    if norm_first:
        x = group_norm(x, p, "norm", min(32, x.shape[1] // 4))
    x = F.conv2d(x, p["depthwise.weight"], padding=1, groups=x.shape[1])
    x = F.pixel_shuffle(F.conv2d(x, p["pointwise.weight"]), 2)
    if not norm_first:
        x = group_norm(x, p, "norm", min(32, x.shape[1] // 4))
    if arguments["use_gaussian_blur"]:
        row = torch.tensor([1.0, 2, 1] if block <= 2 else [1.0, 4, 6, 4, 1], dtype=x.dtype)
        kernel = torch.outer(row, row) / row.sum() ** 2
        assert torch.equal(p["blur_weight"], kernel.expand_as(p["blur_weight"])), "the blur is fixed"
        x = F.pad(x, [len(row) // 2] * 4, mode="replicate")
        x = F.conv2d(x, p["blur_weight"], groups=x.shape[1])
    return x


def convnext(x: Tensor, p: State, w: Tensor, arguments: Arguments) -> Tensor:
    channels, kernel = x.shape[1], p["dwconv.weight"].shape[-1]
    y = F.conv2d(x, p["dwconv.weight"], p["dwconv.bias"], padding=kernel // 2, groups=channels)
    if arguments["legacy"]:
        noise = p["noise_const"][None, None]
        noise = F.interpolate(noise, y.shape[-2:], mode="bilinear", align_corners=False)
        y = y + noise * p["noise_strength"]
    y = group_norm(y, p, "norm", min(32, channels // 4))
    y = modulated(y, p["pwconv1.weight"], style_split(w, p, "affine_pw1"), demodulate=True)
    y = F.gelu(y + p["pwconv1.bias"])
    return x + p["gamma"] * F.conv2d(y, p["pwconv2.weight"], p["pwconv2.bias"])


def channel_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * math.sqrt(x.shape[1]) * gamma


def self_attention(x: Tensor, p: State) -> Tensor:
    null = p["attn.null_kv"]
    heads = null.shape[1]
    y = channel_rms_norm(x, p["attn.norm.gamma"])
    q, k, v = (
        F.conv2d(y, p[f"attn.to_{name}.weight"]).unflatten(1, (heads, -1)).flatten(3).mT for name in "qkv"
    )  # each [B,heads,H*W,d]
    k, v = (
        torch.cat([null[i].unsqueeze(1).expand(len(x), -1, -1, -1), t], dim=2) for i, t in enumerate((k, v))
    )
    attended = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v
    attended = attended.mT.flatten(1, 2).unflatten(2, x.shape[-2:])
    x = x + F.conv2d(attended, p["attn.to_out.weight"])
    y = F.conv2d(channel_rms_norm(x, p["ff.0.gamma"]), p["ff.1.weight"], p["ff.1.bias"])
    return x + F.conv2d(F.gelu(y), p["ff.3.weight"], p["ff.3.bias"])


def count(p: State, name: str) -> int:
    """How many modules the list `name` of a block holds."""
    return len({key.split(".")[1] for key in p if key.startswith(name + ".")})


def decode(state: State, arguments: Arguments, latents: Tensor) -> list[Tensor]:
    """The reconstruction and the smaller images, largest first: [B,3,H,W], [B,3,H/2,W/2], ..."""
    zd = decompress(state, arguments, latents)
    w = style(state, zd)
    images: list[Tensor] = []
    x = skip = None
    for i in range(NUM_BLOCKS):
        p = part(state, f"synthesis.blocks.{i}")
        inputs = [] if x is None else [x]
        if i in arguments["concat_z_block_indices"]:
            inputs.append(latent_branch(zd, part(state, f"synthesis.z_convs.{i}"), arguments, i))
        x = upsample(torch.cat(inputs, 1), part(p, "seperate_upsample_conv"), arguments, i, norm_first=i > 0)
        x = convnext(x, part(p, "conv0"), w, arguments)
        for j in range(count(p, "convs1")):
            x = convnext(x, part(p, f"convs1.{j}"), w, arguments)
        for j in range(count(p, "self_attns")):
            x = self_attention(x, part(p, f"self_attns.{j}"))
        if skip is None:
            skip = x
        else:
            skip = upsample(skip, part(p, "last_upsample_conv"), arguments, i, norm_first=True) + x
        v = style_split(w, p, "torgb.affine") / math.sqrt(x.shape[1])
        images.append(modulated(skip, p["torgb.weight"], v, demodulate=False) + p["torgb.bias"])
    return images[::-1]
