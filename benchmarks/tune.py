"""Which tiles suit this GPU: times every entry and candidate of kernels/tuned.py at the full-size shapes.

    python benchmarks/tune.py                     about a minute; prints ms and TFLOP/s
    python benchmarks/tune.py --write             and puts the fastest into kernels/tuned.py
    python benchmarks/tune.py --kernel forward    one kernel only

Candidates must not spill: tests/ops/test_mlp_triton.py compiles them for sm_90.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import tyro
from torch import Tensor
from triton.testing import do_bench

from vfmvae.kernels import modulated_mlp, modulated_mlp_backward, modulated_mlp_wide, tuned
from vfmvae.kernels.tuned import TILES, WIDE, Tile

SIDES = {128: 256, 256: 128, WIDE: 64}
"""Channels -> side of the map in the published decoder at 256 px; WIDE is 512 channels."""


@dataclass
class Options:
    """Time the tiles of the matrix kernels. Example: python benchmarks/tune.py --batch 16 --write"""

    batch: int = 8
    kernel: str | None = None
    write: bool = False


def main() -> None:
    options = tyro.cli(Options, prog="python benchmarks/tune.py")
    for name in TILES if options.kernel is None else [options.kernel]:
        for channels in TILES[name]:
            if channels in SIDES:
                TILES[name][channels] = fastest(name, channels, options.batch)
    if options.write:
        write(Path(tuned.__file__))


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
    pixels, hidden = side * side, 4 * channels
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    x, grad, out = (normal(batch, pixels, channels) for _ in range(3))
    first, second = normal(hidden, channels), normal(hidden, channels)
    scale = normal(batch, hidden, dtype=torch.float32).abs() * channels**-0.5
    bias, last = (normal(size, dtype=torch.float32) for size in (hidden, channels))
    contract = second.t().contiguous()
    product = 2.0 * batch * pixels * channels * hidden
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


def write(path: Path) -> None:
    card, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    measured = f"{card}, {date}, Triton {triton.__version__}, torch {torch.__version__}"
    text = path.read_text(encoding="utf-8")
    lines = "\n".join(table(measured))
    text = re.sub(r"(?<=replaces these lines\n).*?(?=\n# end)", lambda _: lines, text, flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: written")


def table(measured: str) -> Iterator[str]:
    yield f"MEASURED = {measured!r}".replace("'", '"')
    yield "TILES: dict[str, dict[int, Tile]] = {"
    for name, tiles in TILES.items():
        entries = (f"{'WIDE' if c == WIDE else c}: Tile{tuple(t)}" for c, t in tiles.items())
        yield f'    "{name}": {{{", ".join(entries)}}},'
    yield "}"


if __name__ == "__main__":
    main()
