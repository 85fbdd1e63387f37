"""Which tiles suit this GPU: times every entry and candidate of kernels/tuned.py at the full-size shapes.

    python benchmarks/tune.py                     about a minute; prints ms and TFLOP/s
    python benchmarks/tune.py --write             and puts the fastest into kernels/tuned.py
    python benchmarks/tune.py --kernel forward    one kernel only
    python benchmarks/tune.py --kernel limits     only up to how many channels kernels that keep hidden
                                                  numbers in registers are faster than matrix products

Candidates must not spill: tests/ops/test_mlp_triton.py compiles them for sm_90.
"""

from __future__ import annotations

import argparse
import datetime
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from vfmvae.kernels import modulated_mlp, modulated_mlp_backward, modulated_mlp_wide, tuned
from vfmvae.kernels.tuned import TILES, WIDE, Tile
from vfmvae.ops import mlp_triton

SIDES = {128: 256, 256: 128, WIDE: 64}
"""Channels -> side of the map in the published decoder at 256 px; WIDE is 512 channels."""


def read_options() -> argparse.Namespace:
    # argparse: a fresh GPU machine may not have tyro.
    parser = argparse.ArgumentParser(prog="python benchmarks/tune.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kernel", choices=(*TILES, "limits"), help="one kernel; without it all of them")
    parser.add_argument("--write", action="store_true", help="put the fastest into kernels/tuned.py")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    for name in TILES if options.kernel is None else {options.kernel} - {"limits"}:
        for channels in TILES[name]:
            if channels in SIDES:
                TILES[name][channels] = fastest(name, channels, options.batch)
    measured = list(tuned.LIMITS_MEASURED)
    if options.kernel in (None, "limits"):
        measured = [f"{versions()}; ms at batch {options.batch}"]
        for part in tuned.MOST_CHANNELS:
            tuned.MOST_CHANNELS[part] = limit(part, options.batch, measured)
    if options.write:
        write(Path(tuned.__file__), measured, tiles=options.kernel != "limits")


def limit(part: str, batch: int, measured: list[str]) -> int:
    """The most channels, of 64, 128 and 256, with which the fused kernels are faster; 64 are not measured."""
    most = 64
    for channels in (128, 256):
        fused, products = (do_bench(run, warmup=10, rep=100) for run in passes(part, channels, batch))
        line = f"{part}, {channels} channels: fused {fused:.3f}, products {products:.3f}"
        print(line, flush=True)
        measured.append(line)
        if fused <= products and most == channels // 2:
            most = channels
    return most


def passes(part: str, channels: int, batch: int) -> Iterator[Callable[[], object]]:
    """One pass at full size by the kernels that keep hidden numbers in registers, and by the others."""
    x, grad, out, first, second, scale, bias, last = tensors(channels, SIDES[channels], batch)
    contract = second.t().contiguous()
    if part == "forward":
        yield lambda: modulated_mlp.mlp_fwd(x, x, scale, first, second, bias, last, out)
        yield lambda: modulated_mlp_wide.wide_fwd(x, x, scale, first, contract, bias, last, out)
        return
    given = (grad, x, scale, first, bias, contract, last, part == "weights", out)
    yield lambda: mlp_triton.fused_gradients(*given)
    yield lambda: mlp_triton.wide_gradients(*given)


def fastest(name: str, channels: int, batch: int) -> Tile:
    run, flops = case(name, 512 if channels == WIDE else channels, SIDES[channels], batch)
    before = TILES[name][channels]
    found = []
    for tile in dict.fromkeys((before, *tuned.CANDIDATES.get(name, {}).get(channels, ()))):
        TILES[name][channels] = tile
        try:
            ms = do_bench(run, warmup=10, rep=60)
        except triton.runtime.errors.OutOfResources as error:
            print(f"{name:16} {channels if channels != WIDE else 512:4} {tile}: {error}")
            continue
        found.append((ms, tile))
        rate = f"{flops / ms / 1e9:6.0f} TFLOP/s{'  (the present one)' if tile == before else ''}"
        print(f"{name:16} {channels if channels != WIDE else 512:4} {tile}: {ms:7.3f} ms {rate}", flush=True)
    return min(found)[1] if found else before


def case(name: str, channels: int, side: int, batch: int) -> tuple[Callable[[], object], float]:
    """The launch of one kernel, and the FLOP of its products."""
    x, grad, out, first, second, scale, bias, last = tensors(channels, side, batch)
    contract = second.t().contiguous()
    product = 2.0 * x.numel() * len(first)
    narrow, backward, wide = modulated_mlp, modulated_mlp_backward, modulated_mlp_wide
    if name in ("expand", "contract"):  # both in one launch function: the other counts too
        return lambda: wide.wide_fwd(x, x, scale, first, contract, bias, last, out), 2 * product
    if name == "hidden_grad":
        return lambda: wide.hidden_grad(grad, x, scale, first, bias, contract, True), 2 * product
    if name == "forward":
        return lambda: narrow.mlp_fwd(x, x, scale, first, second, bias, last, out), 2 * product
    given = (grad, x, scale, first, bias, second)
    if name.startswith("input_grad"):
        of_scale = name == "input_grad_of_scale"
        return lambda: backward.mlp_input_grad(*given, out, of_scale), 3 * product
    return lambda: backward.mlp_weight_grad(*given), 4 * product


def tensors(channels: int, side: int, batch: int) -> tuple[Tensor, ...]:
    """x, grad, out [B, P, C]; W1 and the transpose of W2 [E, C]; d [B, E], b1 [E], b2 [C] in float32."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    hidden = 4 * channels
    x, grad, out = (normal(batch, side * side, channels) for _ in range(3))
    first, second = normal(hidden, channels), normal(hidden, channels)
    scale = normal(batch, hidden, dtype=torch.float32).abs() * channels**-0.5
    bias, last = (normal(size, dtype=torch.float32) for size in (hidden, channels))
    return x, grad, out, first, second, scale, bias, last


def versions() -> str:
    card, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    return f"{card}, {date}, Triton {triton.__version__}, torch {torch.__version__}"


def write(path: Path, measured: list[str], tiles: bool) -> None:
    text = path.read_text(encoding="utf-8")
    lines = "\n".join(table(versions() if tiles else tuned.MEASURED, measured))
    text = re.sub(r"(?<=replaces these lines\n).*?(?=\n# end)", lambda _: lines, text, flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: written")


def table(measured: str, limits: list[str]) -> Iterator[str]:
    yield f'MEASURED = "{measured}"'
    yield "LIMITS_MEASURED = ("
    yield from (f'    "{line}",' for line in limits)
    yield ")"
    most = ", ".join(f'"{part}": {channels}' for part, channels in tuned.MOST_CHANNELS.items())
    yield f"MOST_CHANNELS = {{{most}}}"
    yield "TILES: dict[str, dict[int, Tile]] = {"
    for name, tiles in TILES.items():
        entries = (f"{'WIDE' if c == WIDE else c}: Tile{tuple(t)}" for c, t in tiles.items())
        yield f'    "{name}": {{{", ".join(entries)}}},'
    yield "}"


if __name__ == "__main__":
    main()
