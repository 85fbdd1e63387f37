"""`vfmvae encode`: the latents are the tokenizer's, and no stop loses or spoils a shard."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vfmvae
from tests.commands import run, save_image, save_tiny
from tests.helpers import ROOT
from tests.tokenizer.tiny import DISCRETE, tiny_config, tiny_tokenizer
from vfmvae import encode as module
from vfmvae.data.latent_folder import settings_in
from vfmvae.data.latent_writer import LatentWriter
from vfmvae.data.latents import Latents
from vfmvae.data.ordered import open_in_order


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def encode(tiny: Path, output: Path, *more: str | Path) -> int:
    return run(
        module, "--tokenizer", tiny, "--output", output, "--images", "10", "--shard-images", "4", *more
    )


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_latents_of_photographs_are_samples_of_the_posterior(tiny: Path, tmp_path: Path) -> None:
    assert encode(tiny, tmp_path / "out", "--moments", "--seed", "5") == 0
    source = open_in_order(None, "train", 64, 10, seed=5)
    images, tokenizer = source.read(0, 10), vfmvae.load(tiny)
    latents = Latents(tmp_path / "out", "validation")
    batch = latents.read(0, 10)
    assert len(shards(tmp_path / "out")) == 3
    assert batch["key"] == images["key"] and torch.equal(batch["label"], images["label"])
    with torch.no_grad():
        posterior = tokenizer.encode(images["image"])
        mirrored = tokenizer.encode(images["image"].flip(-1))
    assert batch["moments"] is not None
    torch.testing.assert_close(batch["moments"], posterior.moments)
    noise = (batch["latent"] - posterior.mean) / posterior.std
    expected = np.random.default_rng((5, 7, 0)).standard_normal((8, 4, 4), dtype=np.float32)
    torch.testing.assert_close(noise[7], torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
    stored = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    flips = {name: torch.cat([shard[name] for shard in stored]) for name in ("latents_flip", "moments_flip")}
    torch.testing.assert_close(flips["moments_flip"], mirrored.moments)
    noise = (flips["latents_flip"] - mirrored.mean) / mirrored.std
    expected = np.random.default_rng((5, 7, 1)).standard_normal((8, 4, 4), dtype=np.float32)
    torch.testing.assert_close(noise[7], torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def test_the_mean_can_be_stored_in_sixteen_bits(tiny: Path, tmp_path: Path) -> None:
    for number in range(3):
        save_image(tmp_path / f"in/{number}.png", 90, 70, seed=number)
    arguments = [tmp_path / "in", "--part", "all", "--kind", "mean", "--storage", "bf16"]
    assert encode(tiny, tmp_path / "out", *arguments) == 0
    source = open_in_order(str(tmp_path / "in"), "all", 64)
    with torch.no_grad():
        mean = vfmvae.load(tiny).encode(source.read(0, 3)["image"]).mean
    batch = Latents(tmp_path / "out", "validation").read(0, 3)
    assert batch["moments"] is None and batch["latent"].dtype == torch.float32
    assert batch["key"] == ["0.png", "1.png", "2.png"]
    torch.testing.assert_close(batch["latent"], mean, rtol=2**-8, atol=1e-5)


def test_codes_of_a_discrete_tokenizer_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer(tiny_config(bottleneck=DISCRETE)).save(tmp_path / "discrete")
    assert encode(tmp_path / "discrete", tmp_path / "out") == 0
    with torch.no_grad():
        codes = vfmvae.load(tmp_path / "discrete").encode(
            open_in_order(None, "train", 64, 2).read(0, 2)["image"]
        )
    found = Latents(tmp_path / "out", "validation").read(0, 2)["latent"]
    torch.testing.assert_close(found, codes.mode(), atol=1e-5, rtol=1e-5)
    assert encode(tmp_path / "discrete", tmp_path / "other", "--moments") == 2
    assert "--moments: the latents of this tokenizer are codes" in capsys.readouterr().err


def test_the_batch_size_changes_rounding_at_most(tiny: Path, tmp_path: Path) -> None:
    assert encode(tiny, tmp_path / "one", "--batch-size", "1") == 0
    assert encode(tiny, tmp_path / "three", "--batch-size", "3") == 0
    one, three = (Latents(tmp_path / name, "validation").read(0, 10) for name in ("one", "three"))
    torch.testing.assert_close(one["latent"], three["latent"], atol=1e-5, rtol=1e-5)


def test_an_interrupted_run_goes_on_with_what_is_missing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(tiny, tmp_path / "whole") == 0
    encode_shard, begun = module.encode_shard, []

    def interrupted(*arguments: object) -> dict[str, torch.Tensor]:
        begun.append(arguments[2])
        if len(begun) == 2:
            raise KeyboardInterrupt
        return encode_shard(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "encode_shard", interrupted)
    assert encode(tiny, tmp_path / "out") == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["latents_00000.safetensors"]
    assert encode(tiny, tmp_path / "out") == 0
    assert begun == [range(0, 4), range(4, 8), range(4, 8), range(8, 10)]
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert (tmp_path / "out/manifest.json").read_text() == (tmp_path / "whole/manifest.json").read_text()
    capsys.readouterr()
    assert encode(tiny, tmp_path / "out") == 0
    assert "0 images encoded" in capsys.readouterr().out and len(begun) == 4


def test_a_killed_process_loses_one_shard_at_most(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--tokenizer", tiny, "--output", out, "--images", "2000", "--shard-images", "8"]
    arguments += ["--batch-size", "4", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-m", "vfmvae.encode", *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and len(shards(out)) < 3:
            time.sleep(0.02)
        process.kill()
    done = shards(out)
    assert process.returncode == -9 and len(done) >= 3
    writer = LatentWriter(out, settings_in(out / "latents_00000.safetensors"), ())
    assert writer.missing == list(range(len(done), 250)) and writer.damaged == []


def test_processes_share_the_shards(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(tiny, tmp_path / "whole") == 0
    assert encode(tiny, tmp_path / "out", "--share", "1/2") == 0
    assert list(shards(tmp_path / "out")) == ["latents_00001.safetensors"]
    assert "other processes are not done yet" in capsys.readouterr().out
    assert encode(tiny, tmp_path / "out", "--share", "0/2") == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert len(Latents(tmp_path / "out")) == 10


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["absent"], 1, "image folder absent does not exist"),
        (["broken", "--part", "all"], 1, "cannot read image broken/1.png"),
        (["--part", "all"], 1, "choose part train or validation"),
        (["--resolution", "65"], 2, "--resolution 65 does not fit"),
        (["--share", "2/2"], 2, "share is '2/2'"),
        (["--shard-images", "20000"], 2, "shard_images is 20000; it must be 1 to 10000"),
        (["--storage", "fp8"], 2, "bf16"),
        (["--output", "broken/1.png"], 1, "broken/1.png is a file"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    arguments: list[str],
    code: int,
    words: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken").mkdir()
    Path("broken/1.png").write_bytes(b"half")
    assert run(module, "--tokenizer", tiny, "--output", "out", *arguments) == code
    captured = capsys.readouterr()
    assert words in captured.out + captured.err and "Traceback" not in captured.err
    assert not Path("out").exists()


def test_latents_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    torch.nn.init.constant_(tokenizer.fusion.final.last.bias, float("inf"))
    tokenizer.save(tmp_path / "bad")
    assert encode(tmp_path / "bad", tmp_path / "out") == 1
    assert "the latents of train/000000 are not finite" in capsys.readouterr().err


def test_another_tokenizer_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(tiny, tmp_path / "out") == 0
    shutil.copytree(tiny, tmp_path / "copy")
    assert encode(tmp_path / "copy", tmp_path / "out") == 0, "the same weights elsewhere"
    tiny_tokenizer().save(tmp_path / "other")
    torch.manual_seed(1)
    tiny_tokenizer().save(tmp_path / "other")
    assert encode(tmp_path / "other", tmp_path / "out") == 1
    assert "holds latents with tokenizer " in capsys.readouterr().err
