"""The published diffusion transformers in float64, written from their description, one plain function each.

Works on published parameter names and arguments, in the published direction of time: `forward` gives what the
published models give. Shares no code with vfmvae; attention, positions and rotations are written out.
`random_state` draws a checkpoint for given arguments, every value far from its initialisation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Arguments = dict[str, Any]


class Published(NamedTuple):
    velocity: Tensor
    class_velocity: Tensor | None
    projected: list[Tensor]
    blocks: list[Tensor]
    """All tokens after each block."""


def forward(
    state: State, arguments: Arguments, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None = None
) -> Published:
    p = {name: tensor.double() for name, tensor in state.items()}
    patch, depth, heads = (arguments[k] for k in ("patch_size", "depth", "num_heads"))
    x = torch.nn.functional.conv2d(
        x.double(), p["x_embedder.proj.weight"], p["x_embedder.proj.bias"], stride=patch
    )
    side = x.shape[-1]
    tokens = x.flatten(2).mT
    if class_token is not None:
        embedded = _linear(p, "cls_projectors2", class_token.double())
        embedded = _standardised(embedded, 1e-6) * p["wg_norm.weight"] + p["wg_norm.bias"]
        tokens = torch.cat([embedded[:, None], tokens], dim=1)
    tokens = tokens + p["pos_embed"]
    c = _times(p, t.double()) + p["y_embedder.embedding_table.weight"][y]
    blocks, projected = [], []
    for number in range(depth):
        tokens = _block(p, f"blocks.{number}.", arguments, tokens, c, heads, side)
        blocks.append(tokens)
        if number + 1 == arguments.get("encoder_depth"):
            projected = [_projector(p, f"projectors.{i}.", tokens) for i in range(len(arguments["z_dims"]))]
    shift, scale = _linear(p, "final_layer.adaLN_modulation.1", _silu(c)).split(tokens.shape[-1], dim=1)
    last = _norm(p, "final_layer.norm_final", arguments, tokens)
    last = last * (1 + scale[:, None]) + shift[:, None]
    class_velocity = None
    if class_token is not None:
        class_velocity, last = _linear(p, "final_layer.linear_cls", last[:, 0]), last[:, 1:]
    image = _image(_linear(p, "final_layer.linear", last), side, patch)
    if arguments.get("learn_sigma"):
        image = image[:, : image.shape[1] // 2]
    return Published(image, class_velocity, projected, blocks)


def _block(
    p: State, name: str, arguments: Arguments, tokens: Tensor, c: Tensor, heads: int, side: int
) -> Tensor:
    width = tokens.shape[-1]
    rows = [row[:, None] for row in _linear(p, f"{name}adaLN_modulation.1", _silu(c)).split(width, dim=1)]
    if arguments.get("wo_shift"):
        (scale1, gate1, scale2, gate2), shift1, shift2 = rows, 0, 0
    else:
        shift1, scale1, gate1, shift2, scale2, gate2 = rows
    inside = _norm(p, f"{name}norm1", arguments, tokens) * (1 + scale1) + shift1
    tokens = tokens + gate1 * _attention(p, f"{name}attn.", arguments, inside, heads, side)
    inside = _norm(p, f"{name}norm2", arguments, tokens) * (1 + scale2) + shift2
    return tokens + gate2 * _mlp(p, f"{name}mlp.", arguments, inside)


def _attention(p: State, name: str, arguments: Arguments, x: Tensor, heads: int, side: int) -> Tensor:
    width = x.shape[-1] // heads
    query, key, value = _linear(p, f"{name}qkv", x).chunk(3, dim=-1)
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = query[..., part], key[..., part], value[..., part]
        if arguments.get("qk_norm") or (arguments.get("use_qknorm") and not arguments.get("use_rmsnorm")):
            q, k = (
                _standardised(z, 1e-5) * p[f"{name}{which}.weight"] + p[f"{name}{which}.bias"]
                for z, which in ((q, "q_norm"), (k, "k_norm"))
            )
        elif arguments.get("use_qknorm"):
            q, k = (_rms(z) * p[f"{name}{which}.weight"] for z, which in ((q, "q_norm"), (k, "k_norm")))
        if arguments.get("use_rope"):
            q, k = _rotated(q, side), _rotated(k, side)
        scores = torch.einsum("bnd,bmd->bnm", q, k) / math.sqrt(width)
        scores = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        outputs.append(scores / scores.sum(dim=-1, keepdim=True) @ v)
    return _linear(p, f"{name}proj", torch.cat(outputs, dim=-1))


def _mlp(p: State, name: str, arguments: Arguments, x: Tensor) -> Tensor:
    if arguments.get("use_swiglu"):
        joint = _linear(p, f"{name}w12", x)
        half = joint.shape[-1] // 2
        return _linear(p, f"{name}w3", _silu(joint[..., :half]) * joint[..., half:])
    x = _linear(p, f"{name}fc1", x)
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return _linear(p, f"{name}fc2", x)


def _projector(p: State, name: str, x: Tensor) -> Tensor:
    return _linear(p, f"{name}4", _silu(_linear(p, f"{name}2", _silu(_linear(p, f"{name}0", x)))))


def _times(p: State, t: Tensor) -> Tensor:
    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    waves = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], dim=1)
    return _linear(p, "t_embedder.mlp.2", _silu(_linear(p, "t_embedder.mlp.0", waves)))


def _image(patches: Tensor, side: int, patch: int) -> Tensor:
    """Token (row, column) holds patch rows, patch columns, channels, the last one fastest."""
    batch, channels = len(patches), patches.shape[-1] // patch**2
    image = patches.new_zeros(batch, channels, side * patch, side * patch)
    for token in range(side**2):
        row, column = divmod(token, side)
        for inner in range(patch**2):
            i, j = row * patch + inner // patch, column * patch + inner % patch
            image[:, :, i, j] = patches[:, token, inner * channels : (inner + 1) * channels]
    return image


def _rotated(x: Tensor, side: int) -> Tensor:
    """Neighbouring numbers as complex ones, turned."""
    angles = rotations(x.shape[-1], side)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(-2)


def _norm(p: State, name: str, arguments: Arguments, x: Tensor) -> Tensor:
    return _rms(x) * p[f"{name}.weight"] if arguments.get("use_rmsnorm") else _standardised(x, 1e-6)


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def _standardised(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _linear(p: State, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].mT + p[f"{name}.bias"]


def positions(width: int, side: int) -> Tensor:
    """[side^2, width]: the column in the first half, the row in the second; sines, then cosines."""
    table = torch.zeros(side**2, width, dtype=torch.float64)
    quarter = width // 4
    for token in range(side**2):
        for half, place in enumerate((token % side, token // side)):
            for i in range(quarter):
                angle = place * 10_000 ** (-2 * i / (width / 2))
                table[token, half * 2 * quarter + i] = math.sin(angle)
                table[token, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table


def rotations(head_width: int, side: int) -> Tensor:
    """Angles [side^2, head_width / 2]: the first half turns with the row, the second with the column."""
    pairs = head_width // 4  # per axis
    angles = torch.zeros(side**2, 2 * pairs, dtype=torch.float64)
    for token in range(side**2):
        for i in range(pairs):
            frequency = 10_000 ** (-2 * i / (2 * pairs))
            angles[token, i] = (token // side) * frequency
            angles[token, pairs + i] = (token % side) * frequency
    return angles


def random_state(arguments: Arguments, class_token: int | None = None, seed: int = 0) -> State:
    """A float32 checkpoint that these arguments imply; `class_token`: REG's width of it."""
    a, generator, state = arguments, torch.Generator().manual_seed(seed), {}
    width, patch, side = a["hidden_size"], a["patch_size"], a["input_size"] // a["patch_size"]

    def layer(name: str, out: int, *into: int) -> None:
        draw = torch.randn(out, *into, generator=generator)
        state[f"{name}.weight"] = draw / math.sqrt(math.prod(into))
        state[f"{name}.bias"] = 0.2 * torch.randn(out, generator=generator)

    def norm(name: str, size: int, bias: bool) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)
        if bias:
            state[f"{name}.bias"] = 0.2 * torch.randn(size, generator=generator)

    layer("x_embedder.proj", width, a["in_channels"], patch, patch)
    layer("t_embedder.mlp.0", width, 256)
    layer("t_embedder.mlp.2", width, width)
    table = torch.randn(a["num_classes"] + 1, width, generator=generator)
    state["y_embedder.embedding_table.weight"] = table
    table = positions(width, side)
    if class_token is not None:
        table = torch.cat([torch.zeros(1, width), table])
        layer("cls_projectors2", width, class_token)
        norm("wg_norm", width, bias=True)
        layer("final_layer.linear_cls", class_token, width)
    state["pos_embed"] = table[None].float()
    rms = bool(a.get("use_rmsnorm"))
    hidden = int(width * a.get("mlp_ratio", 4))
    for number in range(a["depth"]):
        block = f"blocks.{number}."
        layer(f"{block}attn.qkv", 3 * width, width)
        layer(f"{block}attn.proj", width, width)
        if a.get("qk_norm") or a.get("use_qknorm"):
            norm(f"{block}attn.q_norm", width // a["num_heads"], bias=not rms)
            norm(f"{block}attn.k_norm", width // a["num_heads"], bias=not rms)
        if rms:
            norm(f"{block}norm1", width, bias=False)
            norm(f"{block}norm2", width, bias=False)
        if a.get("use_swiglu"):
            inner = hidden * 2 // 3
            layer(f"{block}mlp.w12", 2 * inner, width)
            layer(f"{block}mlp.w3", width, inner)
        else:
            layer(f"{block}mlp.fc1", hidden, width)
            layer(f"{block}mlp.fc2", width, hidden)
        layer(f"{block}adaLN_modulation.1", (4 if a.get("wo_shift") else 6) * width, width)
    for number, out in enumerate(a.get("z_dims", ())):
        for place, (into, size) in {
            0: (width, a["projector_dim"]),
            2: (a["projector_dim"], a["projector_dim"]),
            4: (a["projector_dim"], out),
        }.items():
            layer(f"projectors.{number}.{place}", size, into)
    if rms:
        norm("final_layer.norm_final", width, bias=False)
    layer("final_layer.adaLN_modulation.1", 2 * width, width)
    channels = a["in_channels"] * (2 if a.get("learn_sigma") else 1)
    layer("final_layer.linear", patch**2 * channels, width)
    return state
