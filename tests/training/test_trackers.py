"""TensorBoard's files read back by TensorBoard, Weights & Biases offline, and what is said without them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import run_python
from vfmvae.training import trackers
from vfmvae.training.trackers import LogConfig, TensorBoardTracker, open_trackers


def test_nothing_is_opened_unless_asked_for(tmp_path: Path) -> None:
    assert open_trackers(LogConfig(), tmp_path, 0, {}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    LogConfig().check_available()
    with pytest.raises(ValueError, match=rf"log\.{name} needs .* not installed: pip install {name}"):
        LogConfig(**{name: True}).check_available()


def test_tensorboard_reads_what_was_written_and_a_resumed_run_takes_back_what_came_after(
    tmp_path: Path,
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.new("RGB", (5, 3), (10, 20, 30)).save(tmp_path / "reconstructions_000000000004.png")
    first = TensorBoardTracker(tmp_path, seen_images=0)
    for seen_images in (4, 8, 12):
        first.scalars("train", {"l1": seen_images / 4, "kl": math.nan}, seen_images)
    first.picture(tmp_path / "reconstructions_000000000004.png", 4)
    first.close(failed=True)
    second = TensorBoardTracker(tmp_path, seen_images=8)
    second.scalars("train", {"l1": 30.0}, 12)
    second.scalars("eval", {"psnr": 20.0}, 12)
    second.close(failed=False)

    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/l1")] == [(4, 1.0), (8, 2.0), (12, 30.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/psnr")] == [(12, 20.0)]
    (picture,) = events.Images("reconstructions")
    assert (picture.step, picture.width, picture.height) == (4, 5, 3)
    (tmp_path / "back.png").write_bytes(picture.encoded_image_string)
    assert np.asarray(Image.open(tmp_path / "back.png"))[0, 0].tolist() == [10, 20, 30]


WANDB = """
import sys
from pathlib import Path
from vfmvae.training.trackers import LogConfig, open_trackers
folder = Path(sys.argv[1])
(tracker,) = open_trackers(LogConfig(wandb=True), folder, 0, {"seed": 424242})
tracker.scalars("train", {"l1": 0.5, "kl": float("nan")}, 8)
tracker.picture(folder / "reconstructions_000000000004.png", 8)
tracker.close(failed=False)
"""


def test_weights_and_biases_offline_keeps_one_run_per_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (5, 3)).save(run / "reconstructions_000000000004.png")
    for _ in range(2):
        run_python("-c", WANDB, str(run), env={"WANDB_MODE": "offline", "HOME": str(tmp_path)})
    name = (run / "wandb_id").read_text().strip()
    files = sorted((run / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert files and not set((run / "wandb").glob("offline-run-*")) - {file.parent for file in files}
    written = files[0].read_bytes()
    for text in (b"train/l1", b"seen_images", b"reconstructions", b"424242", b"vfmvae"):
        assert text in written, text


def test_weights_and_biases_without_a_login_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    program = """
import sys
from pathlib import Path
from vfmvae.training.trackers import WandbTracker
try:
    WandbTracker(Path(sys.argv[1]), "project", {})
except ValueError as error:
    print(error)
"""
    environment = {name: "" for name in os.environ if name.startswith("WANDB_")}
    output = run_python(
        "-c", program, str(tmp_path), env={**environment, "HOME": str(tmp_path), "NETRC": "/dev/null"}
    )
    sentence = output.strip().splitlines()[-1]
    assert sentence.startswith("log.wandb: ")
    assert sentence.endswith("run `wandb login`, or set WANDB_MODE=offline")
