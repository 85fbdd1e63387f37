"""How far a run by fused operations ends from one by the reference, beside how far rounding alone takes one.

    python benchmarks/agreement.py                 three seeds, 50 steps of the demo's first stage, float32
    python benchmarks/agreement.py --seeds 1 --steps 20

Three runs per seed learn from the same images and draws: by the reference, by fused operations, and by the
reference from weights that differ in the last bits (each times 1 + 1e-7 of a normal number). A training run
enlarges every difference, so the second can be about as near to the first as the third is. Given are relative
differences to the first: of single losses, of their mean over the last ten steps, and of what the
averaged weights reach on held-out images.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, one_line, print_table, provenance, write_result

from vfmvae.recipes import demo
from vfmvae.train_job import Job
from vfmvae.train_step import training_step
from vfmvae.training.device import pick_device

NOISE = 1e-7
SHOWN_STEPS = (1, 10, 20, 30, 40)
LAST = 10


def main() -> None:
    options = read_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    result: dict[str, Any] = {**provenance(device), "steps": options.steps, "rows": []}
    for seed in range(options.seeds):
        print(f"seed {seed}", flush=True)
        reference = run(seed, options.steps, str(device), fused=False)
        others = {
            "fused": run(seed, options.steps, str(device), fused=True),
            "last bits": run(seed, options.steps, str(device), fused=False, noise=NOISE),
        }
        for name, other in others.items():
            result["rows"].append({"seed": seed, "run": name} | differences(other, reference))
    write_result(options.json or RESULTS / f"agreement-{device.type}.json", result)
    show(result)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/agreement.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, help="CPU threads; by default what torch takes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.steps < LAST or options.seeds < 1:
        parser.error(f"--steps {options.steps} and --seeds {options.seeds} must be at least {LAST} and 1")
    return options


def run(seed: int, steps: int, device: str, *, fused: bool, noise: float = 0.0) -> dict[str, Any]:
    """Losses of every step, and held-out measures of the averaged weights at the end."""
    job = Job(replace(demo(), seed=seed, device=device, dtype="fp32", fused=fused))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in job.tokenizer.parameters():
            if weight.requires_grad:
                weight.mul_(1 + noise * torch.randn(weight.shape, generator=generator).to(weight.device))
    job.enter_stage(0)
    losses = []
    for batch, _ in zip(job.batches(0), range(steps), strict=False):
        job.begin_step()
        losses.append(training_step(job, batch, job.weights()).losses["total"].item())
        job.state.step += 1
    return {"losses": losses, "held_out": job.evaluate().quality}


def differences(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Relative ones, with their sign."""
    losses, others = run["losses"], reference["losses"]
    found: dict[str, Any] = {
        f"step {n}": losses[n - 1] / others[n - 1] - 1 for n in SHOWN_STEPS if n < len(losses)
    }
    found["last step"] = losses[-1] / others[-1] - 1
    found[f"last {LAST}"] = sum(losses[-LAST:]) / sum(others[-LAST:]) - 1
    return found | {
        f"held-out {name}": value / reference["held_out"][name] - 1 for name, value in run["held_out"].items()
    }


def show(result: dict[str, Any]) -> None:
    rows = result["rows"]
    measures = [name for name in rows[0] if name not in ("seed", "run")]
    print_table(
        one_line({name: value for name, value in result.items() if name != "rows"}),
        ["relative difference", *(f"seed {row['seed']}, {row['run']}" for row in rows)],
        [[name, *(f"{row[name]:+.1e}" for row in rows)] for name in measures],
    )


if __name__ == "__main__":
    main()
