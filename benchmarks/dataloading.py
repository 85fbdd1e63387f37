"""Images and latents per second of the data loaders, and how long a training step would wait for them.

    python benchmarks/dataloading.py                   a generated JPEG set, every backend and format
    python benchmarks/dataloading.py --only latents

The JPEGs are cut from the embedded photographs at sizes like ImageNet's. Backends take turns, and ratios are
medians over the turns: on a shared machine a slow moment meets all. Each reads with as many processes as
serve it best here: the DataLoader one per core, DALI one that reads beside its threads. Beside ours stands
DALI with its own reader, which keeps no exact order, also with filters that reach less far than Lanczos.

"waits" is the share of the time that a loop spends waiting for its next batch if a step takes as long as
--step-rate says; the step is a sleep, as one on a GPU leaves the host's cores to the loader.

Latents are read by this project's reader and, as the published LightningDiT loader does it, by opening a
safetensors file for every item, in one process each.

The JSON goes to benchmarks/results/dataloading-DEVICE.json unless --output says otherwise.
"""

from __future__ import annotations

import importlib.util
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import RESULTS, print_table, provenance, write_result
from latent_reading import measure_latents
from PIL import Image
from rich.progress import track

from vfmvae.cli import command, parse
from vfmvae.data import ImageLoader, choose_backend, open_data
from vfmvae.data.photographs import PHOTOGRAPHS, region

SIZES = ((500, 375), (500, 375), (500, 375), (375, 500), (500, 333), (333, 500), (640, 480), (1024, 768))
PER_SHARD = 250
WAITING_STEPS = 6
OWN_READER = {
    "DALI, its own reader": "LANCZOS3",
    "the same, cubic filter": "CUBIC",
    "the same, triangular filter": "TRIANGULAR",
}


@dataclass
class Options:
    """Measure the data loaders. Example: python benchmarks/dataloading.py --images 500 --repeats 2"""

    only: Literal["all", "images", "latents"] = "all"
    """What to measure."""
    images: int = 1000
    """JPEGs to generate."""
    latents: int = 4096
    """Latents to generate, 32 x 16 x 16 in float32."""
    resolution: int = 256
    """Of the crops."""
    batch_size: int = 32
    """Images of a batch."""
    batches: int = 12
    """Batches of one turn, after two that warm up."""
    repeats: int = 5
    """Turns."""
    step_rate: float = 60.0
    """Images per second that training would take."""
    device: str = "cpu"
    """Where batches go; on cuda DALI decodes there."""
    output: Path | None = None
    """The JSON file."""


def main() -> None:
    options = parse(Options, "dataloading")
    device = torch.device(options.device)
    result: dict[str, Any] = {**provenance(device), "cores": len(os.sched_getaffinity(0))}
    if options.only != "latents":
        result["images"] = measure_images(options, device)
        result["dali"] = _version("nvidia.dali")
    if options.only != "images":
        result["latents"] = measure_latents(options.latents, options.repeats)
    show(result)
    write_result(options.output or RESULTS / f"dataloading-{device.type}.json", result)


def measure_images(options: Options, device: torch.device) -> list[dict[str, Any]]:
    """One row per backend and format."""
    with tempfile.TemporaryDirectory() as scratch:
        formats = write_images(Path(scratch), options.images)
        runs = readers(formats, options, device)
        rates: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
        waits: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
        for _ in track(range(options.repeats), "reading images", transient=True):
            for name, start in runs.items():
                rate, wait = _one_turn(start, options)
                rates[name].append(rate)
                waits[name].append(wait)
    rows = []
    for name, found in rates.items():
        row = {"format": name[0], "by": name[1], "images_per_second": statistics.median(found)}
        base = rates.get((name[0], "DataLoader"))
        if base is not None:
            row["times_faster"] = statistics.median(a / b for a, b in zip(found, base, strict=True))
        row["waits"] = statistics.median(waits[name])
        rows.append(row)
    return rows


def _one_turn(start: Callable[[], Iterator[Any]], options: Options) -> tuple[float, float]:
    """Images per second without a step, and the share of the time that is waited with one."""
    warm_up, count, size = 2, options.batches, options.batch_size
    batches = start()
    for _ in islice(batches, warm_up):
        pass
    begun = time.perf_counter()
    for _ in islice(batches, count):
        pass
    rate = count * size / (time.perf_counter() - begun)
    step, waits = size / options.step_rate, []
    for _ in range(warm_up + WAITING_STEPS):
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        time.sleep(step)
    waited = sum(waits[warm_up:])
    total = waited + WAITING_STEPS * step
    if hasattr(batches, "close"):
        batches.close()
    return rate, waited / total


def readers(
    formats: dict[str, str], options: Options, device: torch.device
) -> dict[tuple[str, str], Callable[[], Iterator[Any]]]:
    """What starts reading, by format and backend."""
    cores = len(os.sched_getaffinity(0))
    found: dict[tuple[str, str], Callable[[], Iterator[Any]]] = {}
    for name, path in formats.items():
        source = open_data(path, "train", options.resolution)
        loader = partial(ImageLoader, source, options.batch_size, device=device)
        torch_loader = partial(loader, backend="torch", workers=cores)
        found[name, "DataLoader"] = lambda make=torch_loader: iter(make())
        if choose_backend(source, "auto", device) == "dali":
            dali_loader = partial(loader, backend="dali", workers=1)
            found[name, "DALI"] = lambda make=dali_loader: iter(make())
    if ("folder", "DALI") in found:
        for name, filter_name in OWN_READER.items():
            found["folder", name] = partial(own_reader, formats["folder"], options, device, filter_name)
    return found


def own_reader(folder: str, options: Options, device: torch.device, filter_name: str) -> Iterator[Any]:
    """DALI as one finds it in its examples: readers.file, a random part decoded and resized, mirrored."""
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"

    @pipeline_def
    def pipeline() -> Any:
        encoded, label = fn.readers.file(file_root=folder, random_shuffle=True, initial_fill=256)
        image = fn.decoders.image_random_crop(
            encoded,
            random_area=[0.25, 1.0],
            random_aspect_ratio=[1.0, 1.0],
            output_type=types.RGB,
            device="mixed" if on_gpu else "cpu",
        )
        side = options.resolution
        kind = getattr(types, f"INTERP_{filter_name}")
        image = fn.resize(image, size=[side, side], interp_type=kind, antialias=True)
        return fn.flip(image, horizontal=fn.random.coin_flip()), label

    built = pipeline(
        batch_size=options.batch_size,
        num_threads=len(os.sched_getaffinity(0)),
        device_id=torch.cuda.current_device() if on_gpu else None,
    )
    built.build()
    while True:
        images, _ = built.run()
        if on_gpu:
            yield torch.from_dlpack(images.as_tensor())
        else:
            yield torch.from_numpy(np.array(images.as_array()))


def write_images(folder: Path, count: int) -> dict[str, str]:
    """JPEGs of ten classes as a folder and as tar shards (and parquet, where there is a package for it)."""
    rng = np.random.default_rng(0)
    photographs = [region(photograph, "train") for photograph in PHOTOGRAPHS]
    files: list[tuple[str, int, bytes]] = []
    for number in track(range(count), "writing images", transient=True):
        photograph = photographs[number % len(photographs)]
        width, height = SIZES[int(rng.integers(len(SIZES)))]
        share = rng.uniform(0.6, 1.0) * min(photograph.width / width, photograph.height / height)
        left = rng.uniform(0, photograph.width - share * width)
        top = rng.uniform(0, photograph.height - share * height)
        box = (left, top, left + share * width, top + share * height)
        data = io.BytesIO()
        photograph.resize((width, height), Image.Resampling.BICUBIC, box=box).save(data, "JPEG", quality=93)
        files.append((f"{number:06d}", number % 10, data.getvalue()))
    for name, label, contents in files:
        path = folder / "folder" / f"class{label}" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    formats = {"folder": str(folder / "folder"), "shards": str(folder / "shards")}
    (folder / "shards").mkdir()
    for first in range(0, count, PER_SHARD):
        with tarfile.open(folder / "shards" / f"train-{first // PER_SHARD:04d}.tar", "w") as shard:
            for name, label, contents in files[first : first + PER_SHARD]:
                for ending, stored in (("jpg", contents), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(stored)
                    shard.addfile(member, io.BytesIO(stored))
    if importlib.util.find_spec("datasets") is not None:
        formats["parquet"] = _write_parquet(folder / "parquet", files)
    return formats


def _write_parquet(folder: Path, files: list[tuple[str, int, bytes]]) -> str:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    folder.mkdir()
    columns = {
        "image": [{"bytes": contents, "path": f"{name}.jpg"} for name, _, contents in files],
        "label": [label for _, label, _ in files],
    }
    features = Features({"image": ImageColumn(), "label": ClassLabel(num_classes=10)})
    Dataset.from_dict(columns, features=features).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    return str(folder)


def show(result: dict[str, Any]) -> None:
    for name, columns in (
        ("images", ["format", "by", "images_per_second", "times_faster", "waits"]),
        ("latents", ["by", "latents_per_second", "times_faster"]),
    ):
        rows = result.get(name, [])
        if rows:
            print_table(name, columns, [[_cell(row.get(column)) for column in columns] for row in rows])


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        module = importlib.import_module(package)
    except ImportError:
        return None
    return str(module.__version__)


if __name__ == "__main__":
    command(main)()
