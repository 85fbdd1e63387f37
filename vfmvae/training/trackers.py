"""TensorBoard and Weights & Biases, for who asks: the numbers of metrics.jsonl and the pictures again.

Both count in images seen, as metrics.jsonl does. Neither is needed to train.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vfmvae.atomic import write_atomically


@dataclass(frozen=True)
class LogConfig:
    """Where a run's numbers go besides metrics.jsonl."""

    tensorboard: bool = False
    """Write event files to <run>/tensorboard."""
    wandb: bool = False
    """Send the run to Weights & Biases; with WANDB_MODE=offline in the environment, only write it to disk."""
    wandb_project: str = "vfmvae"
    """The project that a run of Weights & Biases is filed under."""

    def check_available(self) -> None:
        """ValueError with the remedy if a package that is asked for is not installed."""
        for name in ("tensorboard", "wandb"):
            if getattr(self, name) and find_spec(name) is None:
                raise ValueError(
                    f"log.{name} needs the package {name}, which is not installed: pip install {name}"
                )


class Tracker(Protocol):
    """What the training log asks of either."""

    def scalars(self, kind: str, values: Mapping[str, float], seen_images: int) -> None:
        """Record values under `kind`, "train" or "eval"; they may be NaN."""

    def picture(self, path: Path, seen_images: int) -> None:
        """Record a PNG of reconstructions or samples, under what its name begins with."""

    def close(self, failed: bool) -> None:
        """Flush everything; nothing is recorded afterwards."""


def open_trackers(
    config: LogConfig, folder: Path, seen_images: int, run_config: Mapping[str, Any]
) -> list[Tracker]:
    """Those that the config asks for, for the run in `folder` going on after `seen_images`.

    One process calls this: the one that logs. `run_config`: the run's whole configuration, shown by Weights &
    Biases. Raises ValueError for a missing package or login.
    """
    config.check_available()
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", seen_images))
    if config.wandb:
        trackers.append(WandbTracker(folder, config.wandb_project, run_config))
    return trackers


class TensorBoardTracker:
    """Event files in `folder`. What an earlier process recorded beyond `seen_images` disappears."""

    def __init__(self, folder: Path, seen_images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=seen_images + 1 if seen_images else None)

    def scalars(self, kind: str, values: Mapping[str, float], seen_images: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, seen_images)
        self._writer.flush()

    def picture(self, path: Path, seen_images: int) -> None:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(path.stem.partition("_")[0], pixels, seen_images, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbTracker:
    """One run of Weights & Biases per run folder: its id lies in <run>/wandb_id, so a resumed run goes on.

    The service cannot take points back: those between the checkpoint and the stop appear twice, at the same
    number of images.
    """

    def __init__(self, folder: Path, project: str, run_config: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                dir=str(folder),
                id=_wandb_id(folder / "wandb_id"),
                resume="allow",
                name=folder.resolve().name,
                config=dict(run_config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"log.wandb: {' '.join(str(error).split())}; run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self._run.define_metric("*", step_metric="seen_images")

    def scalars(self, kind: str, values: Mapping[str, float], seen_images: int) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({**named, "seen_images": seen_images})

    def picture(self, path: Path, seen_images: int) -> None:
        kind = path.stem.partition("_")[0]
        self._run.log({kind: self._image(str(path)), "seen_images": seen_images})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(path: Path) -> str:
    """The id that the file holds, or a new one, which is then written there."""
    if not path.exists():
        name = uuid.uuid4().hex[:12]
        write_atomically(path, lambda partial: partial.write_text(name + "\n", encoding="utf-8"))
    return path.read_text(encoding="utf-8").strip()
