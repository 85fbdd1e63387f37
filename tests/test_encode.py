"""`vfmvae encode`: the latents are the tokenizer's, and no stop loses or spoils a shard."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vfmvae
from tests.commands import run, save_image, save_tiny
from tests.data.latent_shards import SETTINGS
from tests.distributed.launch import run as torchrun
from tests.helpers import run_python
from tests.tokenizer.tiny import DISCRETE, VIT, tiny_config, tiny_tokenizer
from vfmvae import encode as module
from vfmvae.data.latents import Latents
from vfmvae.data.ordered import open_in_order
from vfmvae.data.samples import Fault
from vfmvae.encoders import EncoderConfig


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
    assert encode(tmp_path / "discrete", tmp_path / "features", "--tokens") == 0
    assert Latents(tmp_path / "features", "validation").read(0, 2)["features"].shape == (2, 64, 32)
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


def test_kills_at_random_moments_leave_no_duplicate_and_no_gap(tiny: Path, tmp_path: Path) -> None:
    """Two processes, killed five times wherever they are, end with the bytes of an undisturbed run."""
    arguments = ["--tokenizer", tiny, "--images", "160", "--shard-images", "9", "--batch-size", "4"]
    arguments += ["--device", "cpu", "--moments", "--tokens"]
    assert run(module, *arguments, "--output", tmp_path / "whole") == 0
    killed = ["-m", "tests.random_kills", "5", "vfmvae.encode", *arguments, "--output", tmp_path / "out"]
    output = run_python(*map(str, killed))
    assert int(output.rpartition("killed: ")[2]) >= 5, output
    there = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert there == whole
    numbers = [load_file(path)["numbers"] for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert torch.equal(torch.cat(numbers), torch.arange(160))


def test_torchrun_divides_the_shards(tiny: Path, tmp_path: Path) -> None:
    assert encode(tiny, tmp_path / "whole") == 0
    arguments = ["vfmvae.encode", "--tokenizer", tiny, "--output", tmp_path / "out", "--device", "cpu"]
    output = torchrun(*arguments, "--images", "10", "--shard-images", "4")
    assert "process 0 of 2, " in output and "6 images encoded" in output
    assert "process 1 of 2, " in output and "4 images encoded" in output
    assert output.count("complete: 10 latents") >= 1 and output.count("64 px, 8 channels") == 1
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_processes_share_the_shards(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(tiny, tmp_path / "whole") == 0
    assert encode(tiny, tmp_path / "out", "--share", "1/2") == 0
    assert list(shards(tmp_path / "out")) == ["latents_00001.safetensors"]
    assert "other processes are not done yet" in capsys.readouterr().out
    assert encode(tiny, tmp_path / "out", "--share", "0/2") == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert len(Latents(tmp_path / "out")) == 10


def test_launched_processes_take_their_place(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun says, unless --share says otherwise; too few shards are noted by one process."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert encode(tiny, tmp_path / "out") == 0
    assert list(shards(tmp_path / "out")) == ["latents_00002.safetensors"]
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 1 and printed[0].startswith("process 2 of 4, ") and "2 images encoded" in printed[0]
    )
    assert encode(tiny, tmp_path / "out", "--share", "0/1") == 0
    assert len(shards(tmp_path / "out")) == 3
    capsys.readouterr()
    monkeypatch.setenv("RANK", "0")
    assert encode(tiny, tmp_path / "out") == 0
    note = "note: 3 shards for 4 processes, so 1 have nothing to do; --shard-images 3 would share the work"
    assert note in capsys.readouterr().out


@pytest.mark.parametrize(
    ("images", "processes", "even"), [(10, 4, 3), (9, 4, 2), (3, 8, 1), (1_281_167, 256, 5005)]
)
def test_the_advised_shards_keep_every_process_busy(images: int, processes: int, even: int) -> None:
    settings = replace(SETTINGS, images=images, shard_images=10_000)
    assert f"--shard-images {even} would" in module.few_shards(settings, processes)
    assert -(-images // even) >= min(images, processes)


@pytest.mark.parametrize("name", ["mini", "dinov2-with-registers-small"])
def test_features_of_the_encoder_are_stored(name: str, tmp_path: Path) -> None:
    """Patch tokens after the final norm, and the class token after it or the mean of the tokens."""
    config = tiny_config(encoder=EncoderConfig(name=name, layers=(0, -1, 1), scale_factor=1.0, vit=VIT))
    torch.manual_seed(3)
    tiny_tokenizer(config).save(tmp_path / "tokenizer")
    assert encode(tmp_path / "tokenizer", tmp_path / "plain") == 0
    asked = ["--tokens", "--class-token", "--storage", "fp32"]
    assert encode(tmp_path / "tokenizer", tmp_path / "out", *asked) == 0
    latents = Latents(tmp_path / "out", "validation")
    assert latents.manifest.settings.tokens == (8, 8) and latents.manifest.settings.encoder == name
    found, plain = latents.read(0, 10), Latents(tmp_path / "plain", "validation").read(0, 10)
    assert torch.equal(found["latent"], plain["latent"]), "the same pass serves both"

    tokenizer, normed = vfmvae.load(tmp_path / "tokenizer"), []
    tokenizer.encoder.trunk.norm.register_forward_hook(lambda module, given, result: normed.append(result))
    images = open_in_order(None, "train", 64, 10).read(0, 10)["image"]
    with torch.no_grad():
        for pixels in (images, images.flip(-1)):
            tokenizer.encode(pixels)
    stored = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    for after, suffix in zip(normed, ("", "_flip"), strict=True):
        whole = {
            key: torch.cat([shard[key + suffix] for shard in stored]) for key in ("features", "class_token")
        }
        torch.testing.assert_close(whole["features"], after[:, -64:])
        class_token = after.mean(dim=1) if name == "mini" else after[:, 0]
        torch.testing.assert_close(whole["class_token"], class_token)
        torch.testing.assert_close(found["features"], after[:, -64:]) if not suffix else None


class Gaps:
    """The photographs, of which some cannot be read."""

    def __init__(self, gone: set[int]) -> None:
        self._whole = open_in_order(None, "train", 64, 10)
        self.classes, self._gone = self._whole.classes, gone

    def __len__(self) -> int:
        return len(self._whole)

    def names(self) -> list[str]:
        return self._whole.names()

    def faults(self) -> list[Fault]:
        return [Fault("some.tar", "is cut short")] if len(self._gone) < 10 else []

    def read(self, start: int, stop: int) -> dict[str, object]:
        batch = self._whole.read(start, stop)
        there = [number for number in range(start, stop) if number not in self._gone]
        rows = [number - start for number in there]
        return {
            "image": batch["image"][rows],
            "label": batch["label"][rows],
            "key": [batch["key"][row] for row in rows],
            "number": there,
            "faults": [Fault(self.names()[n], "cut short") for n in range(start, stop) if n in self._gone],
        }


def test_images_that_cannot_be_read_are_left_out_and_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One shard lacks an image, one has none; the noise of the others is what it would be."""
    assert encode(tiny, tmp_path / "whole") == 0
    monkeypatch.setattr(module, "open_in_order", lambda *arguments: Gaps({1, 4, 5, 6, 7}))
    capsys.readouterr()
    assert encode(tiny, tmp_path / "strict") == 1
    assert "1 of 10 images cannot be used, and max_broken 0.001 allows 0: some.tar" in capsys.readouterr().err
    assert not list((tmp_path / "strict").glob("*.safetensors"))
    assert encode(tiny, tmp_path / "out", "--batch-size", "2", "--max-broken", "0.6") == 0
    printed = capsys.readouterr().out
    assert "left out train/000001: cut short" in printed and "warning: some.tar: is cut short" in printed
    listed = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    broken = ["some.tar", *(f"train/{number:06d}" for number in (1, 4, 5, 6, 7))]
    assert [json.loads(line)["key"] for line in listed] == broken
    assert (
        "5 images encoded" in printed and "5 could not be read; complete: 5 latents of 8 x 4 x 4" in printed
    )
    assert encode(tiny, tmp_path / "out", "--max-broken", "0.6") == 0
    assert "0 images encoded" in (printed := capsys.readouterr().out)
    assert f"5 of the data set's images are left out, see {tmp_path / 'out'}/quarantine*.jsonl" in printed
    assert encode(tiny, tmp_path / "out", "--max-broken", "0.5") == 1
    assert "6 of 10 images cannot be used, and max_broken 0.5 allows 5" in capsys.readouterr().err
    found, whole = (Latents(tmp_path / name, "validation").read(0, 10) for name in ("out", "whole"))
    there = [0, 2, 3, 8, 9]
    assert found["key"] == [whole["key"][number] for number in there]
    torch.testing.assert_close(found["latent"], whole["latent"][there], atol=1e-5, rtol=1e-5)
    stored = [
        load_file(path)["numbers"].tolist() for path in sorted((tmp_path / "out").glob("*.safetensors"))
    ]
    assert stored == [[0, 2, 3], [], [8, 9]]
    monkeypatch.setattr(module, "open_in_order", lambda *arguments: Gaps(set(range(10))))
    assert encode(tiny, tmp_path / "none", "--max-broken", "1") == 1
    assert "none of the 10 images could be read" in capsys.readouterr().err


def test_a_limit_holds_over_restarts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that finished shards lack are lost, and count again."""
    monkeypatch.setattr(module, "open_in_order", lambda *arguments: Gaps({1, 5, 9}))
    for _ in range(2):
        assert encode(tiny, tmp_path / "out", "--max-broken", "0.3") == 1
        assert "4 of 10 images cannot be used, and max_broken 0.3 allows 3" in capsys.readouterr().err
        assert list(shards(tmp_path / "out")) == ["latents_00000.safetensors", "latents_00001.safetensors"]


def test_big_rows_make_small_shards(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless asked otherwise a shard is at most so many bytes: here three latents, or one with features."""
    monkeypatch.setattr(module, "SHARD_BYTES", 3 * 2 * 8 * 4 * 4 * 4)
    common = ["--tokenizer", tiny, "--images", "7"]
    assert run(module, *common, "--output", tmp_path / "plain") == 0
    assert run(module, *common, "--output", tmp_path / "features", "--tokens") == 0
    assert len(shards(tmp_path / "plain")) == 3 and len(shards(tmp_path / "features")) == 7


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["absent"], 1, "image folder absent does not exist"),
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


def test_tokens_need_the_encoders_last_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(encoder=EncoderConfig(name="mini", layers=(0, 1, 2), scale_factor=1.0, vit=VIT))
    tiny_tokenizer(config).save(tmp_path / "inner")
    assert encode(tmp_path / "inner", tmp_path / "out", "--tokens") == 2
    assert "--tokens: this tokenizer reads the layers (0, 1, 2)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert encode(tmp_path / "inner", tmp_path / "out", "--class-token") == 0


def test_another_tokenizer_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(tiny, tmp_path / "out") == 0
    shutil.copytree(tiny, tmp_path / "copy")
    assert encode(tmp_path / "copy", tmp_path / "out") == 0, "the same weights elsewhere"
    tiny_tokenizer().save(tmp_path / "other")
    torch.manual_seed(1)
    tiny_tokenizer().save(tmp_path / "other")
    assert encode(tmp_path / "other", tmp_path / "out") == 1
    assert "holds latents with tokenizer " in capsys.readouterr().err
