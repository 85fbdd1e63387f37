"""Do latents of a foundation model let diffusion converge sooner? Measured from end to end at small scale.

    python benchmarks/convergence.py --budget gpu     one GPU, made for 8 minutes
    python benchmarks/convergence.py --budget cpu     a smoke test for two cores; little is learnt

Data are drawn scenes (vfmvae.data.scenes) of 15 classes. An encoder of the `mini` class is trained on them
without labels, as `mini` itself is. Three tokenizers with latents of one size and the same decoder are
trained on the same images: (a) a plain VAE, (b) one whose encoder is trained towards the frozen one by the
VF loss (VA-VAE), (c) VFM-VAE, which fuses layers of the frozen encoder. Then the same small SiT is trained on
the latents of each, with and without REPA, by three seeds, and measured at a series of steps:

    distance   Frechet distance of samples (EMA weights, Euler, no guidance, every class as often) from the
               scenes, in the features of a classifier of another architecture
    accuracy   share of samples that the classifier gives the class they were asked for
    cknna      of each block with the encoder on held-out scenes: t = 0.5, null class, mean over tokens

The line at the end is how many times sooner (c) reaches the distance that (a) ends with. The tokenizers are
trained once each: the spread is that of the diffusion models' seeds. Written: a JSON file, a plot and sample
pictures (PNG) beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from common import RESULTS, one_line, print_table, provenance, write_result
from convergence_budgets import BUDGETS, Budget
from convergence_diffusion import (
    Latents,
    Reach,
    Run,
    Stack,
    alignment,
    balanced_labels,
    block_alignment,
    median_of,
    normalised,
    sample_noise,
    steps_to_reach,
    train_runs,
)
from convergence_models import (
    KINDS,
    NAMES,
    Arm,
    Classifier,
    Encoded,
    Kind,
    classified,
    draw_pool,
    encode_pool,
    encoder_targets,
    reconstructed,
    tokenizer_config,
    train_arm,
    train_classifier,
)
from convergence_plot import draw_curves, picture_grid
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vfmvae.data.scenes import CLASSES
from vfmvae.diffusion.config import TransformerConfig
from vfmvae.diffusion.sampling import sample
from vfmvae.images import to_unit
from vfmvae.metrics.frechet import feature_statistics, frechet_distance
from vfmvae.metrics.reconstruction import psnr
from vfmvae.pretrain_mini import PLACE_RESOLUTION, RESOLUTION, WIDTH, PretrainConfig, pretrain
from vfmvae.training.device import pick_device

TRAIN_SEED, HELD_OUT_SEED, PLACES_SEED, ENCODER_SEED = 11, 12, 13, 7


def main() -> None:
    options = read_options()
    device = pick_device(options.device or ("cuda" if options.budget == "gpu" else "cpu"))
    path = options.json or RESULTS / f"convergence-{device.type}.json"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(1)  # of each worker
    measurement = Convergence(options.budget, BUDGETS[options.budget], device, options.threads, path)
    result, pictures = measurement.run()
    picture_grid(pictures, path.with_name(path.stem + "-samples.png"))
    show(result, one_line(provenance(device)))
    print(draw_curves(result, path))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/convergence.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--budget", choices=tuple(BUDGETS), required=True)
    parser.add_argument("--device", help="by default cuda for gpu, cpu for cpu")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU that are used")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


class Convergence:
    """The measurement, stage after stage; `run` is the order."""

    def __init__(self, name: str, budget: Budget, device: torch.device, threads: int, path: Path) -> None:
        """`path`: of the JSON file, which is written after every measurement, complete or not."""
        self.budget = budget
        self.device = device
        self.path = path
        self.console = Console()
        self.writing = Lock()
        # Models that do not depend on each other train side by side on a CPU, each in one thread: for small
        # operations two threads wait more than they compute. A GPU is fed by one.
        self.threads = threads
        self.workers = threads if device.type == "cpu" else 1
        self.spent: dict[str, dict[str, float]] = {}
        self.result: dict[str, Any] = {"budget": name, **provenance(device), "complete": False}
        self.result |= {"sizes": asdict(budget), "seconds": self.spent}

    def run(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What was measured, and pictures: scenes, and each tokenizer's reconstructions and samples."""
        self.draw()
        self.train_encoder_and_classifier()
        self.result["tokenizers"] = self.train_tokenizers()
        runs = self.train_diffusion()
        self.result |= {"steps_to_reach": reaching(runs, self.budget), "complete": True}
        write_result(self.path, self.result)
        return self.result, self.pictures

    def draw(self) -> None:
        budget = self.budget
        with self.stage("scenes"):
            self.pool = draw_pool(budget.images, RESOLUTION, TRAIN_SEED, self.device, self.threads)
            self.held_out = draw_pool(budget.held_out, RESOLUTION, HELD_OUT_SEED, self.device, self.threads)
            self.places = draw_pool(budget.places, PLACE_RESOLUTION, PLACES_SEED, self.device, self.threads)
        self.pictures = {"scenes": self.held_out.images[: 2 * len(CLASSES)].cpu()}

    def train_encoder_and_classifier(self) -> None:
        """The frozen encoder of (b), (c), REPA and CKNNA, without labels; and the classifier, with them."""
        budget = self.budget
        config = PretrainConfig(
            steps=budget.encoder_steps,
            seed=ENCODER_SEED,
            batch_size=budget.encoder_batch,
            device=str(self.device),
            dtype="bf16" if self.device.type == "cuda" else "fp32",
        )
        torch.manual_seed(0)
        self.classifier = Classifier(len(CLASSES), budget.classifier_width).to(self.device)

        def encoder() -> None:
            model = pretrain(config, self.console, self.places, budget.encoder_depth)
            self.encoder_state = model.state_dict()

        def classifier() -> None:
            train_classifier(self.classifier, self.pool, budget.classifier_steps, 64)

        with self.stage("encoder and classifier"):
            self.side_by_side(lambda train: train(), (encoder, classifier))
        features, _ = classified(self.classifier, self.pool.images, self.pool.labels)
        self.reference = feature_statistics(features)
        _, accuracy = classified(self.classifier, self.held_out.images, self.held_out.labels)
        chance = 1 / len(CLASSES)
        self.result["classifier"] = {"accuracy": accuracy, "chance": chance}
        self.say(f"classifier: {accuracy:.1%} of held-out scenes named ({chance:.1%} is chance)")

    def train_tokenizers(self) -> dict[Kind, Any]:
        """Train the three; what each reconstructs, and how its latents agree with the encoder."""
        budget = self.budget
        config = tokenizer_config(
            budget.encoder_depth,
            budget.downsample,
            budget.latent_channels,
            budget.fusion_width,
            budget.decoder,
        )
        self.arms: dict[Kind, Arm] = {}
        for kind in KINDS:
            torch.manual_seed(0)  # the same decoder to begin with
            self.arms[kind] = Arm(kind, config, self.encoder_state).to(self.device)
        self.trained = {kind: arm.trained() for kind, arm in self.arms.items()}
        steps, size = budget.tokenizer_steps, budget.tokenizer_batch
        with self.stage("tokenizers"), self.progress("tokenizers", len(KINDS) * steps) as advance:
            self.side_by_side(lambda arm: train_arm(arm, self.pool, steps, size, advance), self.arms.values())
        with self.stage("latents"):
            vfm = self.arms["vfm"].tokenizer
            self.targets = encoder_targets(vfm, self.pool, budget.patch)
            self.encoder_features = encoder_targets(vfm, self.held_out, budget.patch).mean(dim=1)
            encoded = {kind: encode_pool(arm, self.pool) for kind, arm in self.arms.items()}
            held_out = {kind: encode_pool(arm, self.held_out) for kind, arm in self.arms.items()}
        self.scales: dict[Kind, tuple[Tensor, Tensor]] = {}
        self.latents: dict[Kind, Tensor] = {}
        self.held_out_latents: dict[Kind, Tensor] = {}
        found: dict[Kind, Any] = {}
        for kind in KINDS:
            self.latents[kind], mean, std = normalised(encoded[kind].latents)
            self.scales[kind] = mean, std
            self.held_out_latents[kind] = (held_out[kind].latents - mean) / std
            found[kind] = self.measure_tokenizer(kind, held_out[kind])
        return found

    def measure_tokenizer(self, kind: Kind, encoded: Encoded) -> dict[str, float]:
        images = reconstructed(self.arms[kind], encoded.latents)
        features, accuracy = classified(self.classifier, images, self.held_out.labels)
        self.pictures[f"{kind} reconstructions"] = images[: 2 * len(CLASSES)].cpu()
        found = {
            "trained_parameters": sum(p.numel() for p in self.trained[kind]),
            "psnr": psnr(to_unit(images), to_unit(self.held_out.images)).mean().item(),
            "distance": frechet_distance(feature_statistics(features), self.reference),
            "accuracy": accuracy,
            "cknna": alignment(encoded.means, self.encoder_features, self.budget.neighbours),
        }
        self.say(
            f"{NAMES[kind]}: reconstructions at {found['psnr']:.1f} dB, distance {found['distance']:.3f},"
            f" {accuracy:.1%} named; CKNNA of latents {found['cknna']:.3f}"
        )
        return found

    def train_diffusion(self) -> list[dict[str, Any]]:
        """Train every run; its curves."""
        budget = self.budget
        config = TransformerConfig(
            latent_size=RESOLUTION // budget.downsample,
            channels=budget.latent_channels,
            patch=budget.patch,
            width=budget.width,
            depth=budget.depth,
            heads=budget.heads,
            classes=len(CLASSES),
            alignment_depth=budget.alignment_depth,
            alignment_widths=(WIDTH,),
            projector_width=2 * budget.width,
        )
        runs = [Run(kind, repa, seed) for kind in KINDS for repa in (False, True) for seed in budget.seeds]
        parts = [runs[number :: self.workers] for number in range(self.workers)]
        stacks = [Stack(config, part, self.device, budget.rate) for part in parts if part]
        latents = Latents(self.latents, self.pool.labels, self.targets)
        curves: dict[Run, list[dict[str, Any]]] = {run: [] for run in runs}
        self.result["runs"] = [{**run._asdict(), "curve": curve} for run, curve in curves.items()]

        def train(stack: Stack) -> None:
            def measure(step: int) -> None:
                for number, run in enumerate(stack.runs):
                    curves[run].append({"step": step, **self.measure_run(stack, number, run)})
                    advance()
                with self.writing:
                    write_result(self.path, self.result)

            train_runs(stack, latents, budget.batch, budget.evaluate_at, measure, advance)

        total = len(stacks) * budget.evaluate_at[-1] + len(runs) * len(budget.evaluate_at)
        with self.stage("diffusion"), self.progress("diffusion models", total) as advance:
            self.side_by_side(train, stacks)
        return self.result["runs"]

    def measure_run(self, stack: Stack, number: int, run: Run) -> dict[str, Any]:
        budget, model = self.budget, stack.averaged(number)
        labels = balanced_labels(budget.samples, len(CLASSES), self.device)
        noise = sample_noise(budget.samples, model.config, self.device)
        with torch.no_grad():
            drawn = sample(model, noise, labels, sampler="euler", steps=budget.sampling_steps)
        mean, std = self.scales[run.kind]
        images = reconstructed(self.arms[run.kind], drawn.float() * std + mean)
        if run.seed == budget.seeds[0]:  # the last step's remain
            name = f"{run.kind} samples{' with REPA' if run.repa else ''}"
            self.pictures[name] = images[: 2 * len(CLASSES)].cpu()
        features, accuracy = classified(self.classifier, images, labels)
        return {
            "distance": frechet_distance(feature_statistics(features), self.reference),
            "accuracy": accuracy,
            "cknna": block_alignment(
                model, self.held_out_latents[run.kind], self.encoder_features, budget.neighbours
            ),
        }

    # Plumbing ---------------------------------------------------------------------------------------------

    def side_by_side(self, work: Callable[[Any], None], on: Iterable[Any]) -> None:
        """`work` on each, in threads where there are several workers; the first error ends it."""
        if self.workers == 1:
            for one in on:
                work(one)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(work, on))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note how long it takes, and for how much of that the CPU computes."""
        start, cpu = time.perf_counter(), time.process_time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.spent[name] = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        with Progress(console=self.console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def reaching(runs: Sequence[dict[str, Any]], budget: Budget) -> dict[str, Any]:
    """Steps of (a) over those of (c), and of (b), to (a)'s last distance; by seed, and their spread."""

    def curve(kind: Kind, repa: bool, seed: int) -> list[float]:
        (found,) = [r for r in runs if (r["kind"], r["repa"], r["seed"]) == (kind, repa, seed)]
        return [point["distance"] for point in found["curve"]]

    found: dict[str, Any] = {}
    for repa in (False, True):
        for kind in KINDS[1:]:
            reached = [
                steps_to_reach(budget.evaluate_at, curve("plain", repa, seed), curve(kind, repa, seed))
                for seed in budget.seeds
            ]
            found[f"{kind}{' with REPA' if repa else ''}"] = {
                "seeds": [reach._asdict() for reach in reached],
                "median": median_of(reached)._asdict(),
            }
    return found


def show(result: dict[str, Any], where: str) -> None:
    """The last measurement of every kind, and the line that this is about."""
    rows = []
    for kind in KINDS:
        for repa in (False, True):
            ends = [r["curve"][-1] for r in result["runs"] if (r["kind"], r["repa"]) == (kind, repa)]
            rows.append(
                [NAMES[kind] + (" + REPA" if repa else "")]
                + [_spread([end[what] for end in ends]) for what in ("distance", "accuracy")]
                + [_spread([max(end["cknna"]) for end in ends])]
            )
    steps = result["sizes"]["evaluate_at"][-1]
    headings = (f"after {steps} steps", "distance", "accuracy", "CKNNA, best block")
    print_table("mean over seeds (lowest to highest)", headings, rows)
    for name, reach in result["steps_to_reach"].items():
        kind, _, repa = name.partition(" ")
        seeds = ", ".join(str(Reach(**seed)) for seed in reach["seeds"])
        print(
            f"steps (a) needs / steps {NAMES[kind][:3]} needs to reach (a)'s final distance"
            f"{', ' + repa if repa else ''}: {Reach(**reach['median'])} (seeds: {seeds})"
        )
    wall, cpu = (sum(part[what] for part in result["seconds"].values()) for what in ("wall", "cpu"))
    print(f"{wall:.0f} s in all, {cpu:.0f} s of CPU time; {where}")


def _spread(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
