"""Adam and the average of the weights over all tensors that the published full-size model trains.

    python benchmarks/optimizer.py                               full size on a GPU, the demo's on a CPU
    python benchmarks/optimizer.py --size demo --device cpu

Sides: "torch", its fused Adam, then one foreach operation for the average; "triton", one kernel for both;
"apex", FusedAdam, then the same foreach operation, where NVIDIA apex is installed. All begin with the same
numbers and must end with the same, or the command fails. Gradients lie elsewhere in every update, as they may
in training without CUDA graphs.

ms is the device's time, during which its queue is full; host_ms is how long Python takes to fill it (on a
CPU both are the time of a call). The sides take turns, and ratios to torch are medians over the turns. The
floor is the time that 7 + 2 words per parameter take at the rate of a large copy (6 + 2 with a first beta of
0, where the first moment need not be read).

The JSON goes to benchmarks/results/optimizer-DEVICE.json unless --json says otherwise, row by row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from common import (
    RESULTS,
    Ceilings,
    Stopwatch,
    measure_ceilings,
    one_line,
    print_table,
    provenance,
    write_result,
)
from torch import Tensor, nn

from vfmvae.recipes import demo, vfm_vae_siglip2_large
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.parts import set_trained
from vfmvae.training.averaging_adam import AveragingAdam
from vfmvae.training.device import pick_device
from vfmvae.training.ema import EMA
from vfmvae.training.guard import guarded_update
from vfmvae.training.optim import OptimizerConfig, build_optimizer, check_available

Name = Literal["torch", "triton", "apex"]
BETAS = ((0.0, 0.99), (0.9, 0.999))
"""The published recipe's, and the usual ones."""
RATE, EMA_BETA = 0.01, 0.9
TOLERANCE = 1e-6
"""Of parameters and averages of about 0.02, which a few updates have moved by 1e-2 and 1e-3 each."""


class Side:
    """Parameters, what updates them, and their averages."""

    def __init__(self, name: Name, starts: Sequence[Tensor], betas: tuple[float, float]) -> None:
        config = OptimizerConfig(implementation=name, learning_rate=RATE, betas=betas)
        self.model = nn.ParameterList(start.clone() for start in starts)
        self.optimizer = build_optimizer(config, self.model.parameters())
        self.ema = EMA(self.model)
        self.skip = torch.zeros((), device=starts[0].device)
        self.moved: frozenset[nn.Parameter] = frozenset()
        if isinstance(self.optimizer, AveragingAdam):
            self.optimizer.follow(self.ema.of_parameters())
            self.optimizer.set_average_weight(1 - EMA_BETA)
            self.moved = self.optimizer.averaged

    def update(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.model, gradients, strict=True):
            parameter.grad = gradient
        if self.optimizer.defaults.get("fused"):
            guarded_update(self.optimizer, self.skip)
        else:  # apex: a guarded update waits for the device
            self.optimizer.step()
        self.ema.update(EMA_BETA, self.moved)


def main() -> None:
    options = read_options()
    device = pick_device(options.device)
    shapes = trained_shapes(options.size or ("full" if device.type == "cuda" else "demo"))
    ceilings = measure_ceilings(device, torch.float32)
    numbers = sum(shape.numel() for shape in shapes)
    result: dict[str, Any] = {**provenance(device), "ceilings": ceilings.as_dict()}
    result |= {"parameters": numbers, "tensors": len(shapes), "left_out": {}, "rows": []}
    names = available(device, result["left_out"])
    path = options.json or RESULTS / f"optimizer-{device.type}.json"
    for betas in BETAS:
        for row in measured(names, shapes, betas, device, ceilings, options.repeats):
            result["rows"].append(row)
            write_result(path, result)
    show(result, {**provenance(device), **ceilings.as_dict()})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/optimizer.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=("demo", "full"), help="by default full on CUDA, else demo")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def trained_shapes(size: str) -> list[torch.Size]:
    """Of everything that the first stage of a recipe trains."""
    config = vfm_vae_siglip2_large() if size == "full" else demo()
    with torch.device("meta"):
        tokenizer = Tokenizer(config.tokenizer, None, True)
    return [parameter.shape for parameter in set_trained(tokenizer, config.stages[0].trains).values()]


def available(device: torch.device, left_out: dict[str, str]) -> list[Name]:
    """The sides that can be measured here; why not the others goes to `left_out`."""
    found: list[Name] = []
    for name in get_args(Name):
        try:
            check_available(OptimizerConfig(implementation=name), device)
            found.append(name)
        except ValueError as objection:
            left_out[name] = str(objection)
            print(objection, flush=True)
    return found


def measured(
    names: Sequence[Name],
    shapes: Sequence[torch.Size],
    betas: tuple[float, float],
    device: torch.device,
    ceilings: Ceilings,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """A row per side."""
    torch.manual_seed(0)
    starts = [0.02 * torch.randn(shape, device=device) for shape in shapes]
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(2)]
    sides = {name: Side(name, starts, betas) for name in names}
    for side in sides.values():
        for number in range(4):
            side.update(gradients[number % 2])
    check_agreement(sides)
    numbers = sum(shape.numel() for shape in shapes)
    floor_s = 4 * (8 if betas[0] == 0 else 9) * numbers / ceilings.copy_bytes_per_second
    times = race(sides, gradients, device, repeats)
    for name, (on_device, on_host) in times.items():
        ratios = [a / b for a, b in zip(times["torch"][0], on_device, strict=True)]
        median = statistics.median(on_device)
        yield {
            "by": name,
            "betas": list(betas),
            "ms": 1e3 * median,
            "host_ms": 1e3 * statistics.median(on_host),
            "times_faster": statistics.median(ratios),
            "share": floor_s / median,
        }


def check_agreement(sides: dict[Name, Side]) -> None:
    """Leave with a sentence where a side has other parameters or averages than torch."""
    expected = sides["torch"]
    for name, side in sides.items():
        of_side = [*side.model.parameters(), *side.ema.of_parameters().values()]
        of_torch = [*expected.model.parameters(), *expected.ema.of_parameters().values()]
        worst = max((a - b).abs().max().item() for a, b in zip(of_side, of_torch, strict=True))
        if not worst <= TOLERANCE:
            raise SystemExit(f"{name} does not compute what torch does: a number differs by {worst:.3g}")


def race(
    sides: dict[Name, Side], gradients: Sequence[Sequence[Tensor]], device: torch.device, repeats: int
) -> dict[Name, tuple[list[float], list[float]]]:
    """Seconds of every update on the device and on the host, the sides taking turns."""
    watch, turns = Stopwatch(device), count()
    watch.SLEEP_CYCLES *= 20  # Python needs milliseconds to queue the kernels of hundreds of tensors
    times: dict[Name, tuple[list[float], list[float]]] = {name: ([], []) for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            given = gradients[next(turns) // len(sides) % 2]
            on_host: list[float] = []
            times[name][0].append(watch.seconds(timed(lambda: side.update(given), on_host)))  # noqa: B023
            times[name][1].append(on_host[0])
    return times


def timed(run: Callable[[], None], into: list[float]) -> Callable[[], None]:
    """`run`, noting how long the call takes."""

    def call() -> None:
        start = time.perf_counter()
        run()
        into.append(time.perf_counter() - start)

    return call


def show(result: dict[str, Any], where: dict[str, Any]) -> None:
    rows = [
        [
            row["by"],
            str(tuple(row["betas"])),
            f"{row['ms']:.3f}",
            f"{row['times_faster']:.2f}x",
            f"{row['share']:.0%}",
            f"{row['host_ms']:.2f}",
        ]
        for row in result["rows"]
    ]
    size = f"{result['parameters'] / 1e6:.1f} M parameters in {result['tensors']} tensors"
    title = f"Adam and the average of {size}"
    print_table(title, ("by", "betas", "ms", "faster than torch", "share of the floor", "host ms"), rows)
    print(one_line(where))


if __name__ == "__main__":
    main()
