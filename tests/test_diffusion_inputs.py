"""Where latents, features and class tokens come from: a folder, a tokenizer, pixels; and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.commands import save_image, save_tiny
from tests.data.latent_shards import damage
from tests.tiny_diffusion import (
    ALL_LOSSES,
    CLASSES,
    MODEL,
    PLAIN,
    WIDTH,
    fill,
    job,
    made_up,
    stage,
    steps,
    tiny,
)
from vfmvae.data import Scenes
from vfmvae.diffusion import TransformerConfig
from vfmvae.diffusion_config import DiffusionConfig
from vfmvae.diffusion_inputs import ImageInputs, LatentInputs, Source, known_labels, open_source
from vfmvae.encoders import EncoderConfig, build_encoder
from vfmvae.tokenizer.files import load_tokenizer, tokenizer_hash
from vfmvae.training.diffusion_stage import DiffusionLosses
from vfmvae.training.draws import StepDraws

CPU = torch.device("cpu")
VELOCITY = (stage(DiffusionLosses()),)


def opened(config: DiffusionConfig) -> Source:
    return open_source(config, CPU, None)


def draws(count: int) -> StepDraws:
    return StepDraws(0, 0, CPU, 0, count, count, 1)


# Latents


def test_what_is_stored_is_what_a_step_learns_from(tmp_path: Path) -> None:
    source = opened(tiny(latents=str(fill(tmp_path / "made"))))
    assert source.images == 24 and source.classes == CLASSES and source.faults() == []
    batches = source.batches(range(6), 4)
    seen = []
    for batch in batches:
        given = source.inputs(batch, draws(4))
        for row, key in enumerate(batch["key"]):
            number = int(key.removesuffix(".png"))
            stored = made_up(number)
            seen.append(number)
            assert torch.equal(given.latents[row], stored["latents"])
            assert given.features is not None and torch.equal(given.features[row], stored["features"])
            assert given.class_token is not None
            assert torch.equal(given.class_token[row], stored["class_token"])
            assert given.labels[row] == number % len(CLASSES)
    assert sorted(seen) == list(range(24)), "an epoch has every latent once"


def test_moments_are_sampled_anew_in_every_step(tmp_path: Path) -> None:
    config = tiny(
        latents=str(fill(tmp_path / "made", moments=True, flips=True, tokens=None, class_token=False)),
        diffusion=PLAIN,
        stages=VELOCITY,
    )
    source = opened(config)
    (batch,) = source.batches([0], 4)
    assert batch["latent"] is None and batch["features"] is None
    given, again = (source.inputs(batch, draws(4)).latents for _ in range(2))
    assert torch.equal(given, again)
    mean, log_variance = batch["moments"].double().chunk(2, dim=1)
    expected = mean + (log_variance / 2).exp() * draws(4).normal(mean.shape[1:]).double()
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-5)
    other = source.inputs(batch, StepDraws(0, 1, CPU, 0, 4, 4, 1)).latents
    assert not torch.equal(given, other)


def test_missing_labels_are_the_null_class() -> None:
    assert known_labels(torch.tensor([2, -1, 0]), 7, CPU).tolist() == [2, 7, 0]


def latents_error(folder: Path, sentence: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        opened(tiny(latents=str(folder), **changes))
    assert "\n" not in str(caught.value)


def test_latents_that_do_not_fit_are_named(tmp_path: Path) -> None:
    made = fill(tmp_path / "made")
    for changes in ({"channels": 8}, {"latent_size": 8}):
        model = replace(MODEL, **changes)
        needed = rf"holds latents \[4, 4, 4\], and the model takes \[{model.channels}, {model.latent_size}"
        latents_error(made, needed, diffusion=model)
    latents_error(made, "has 5 classes, and diffusion.classes is 4", diffusion=replace(MODEL, classes=4))
    wide = replace(MODEL, alignment_widths=(7,), class_token_width=7)
    latents_error(made, r"are 6 wide, and diffusion.alignment_widths is \(7,\)", diffusion=wide)
    bare = fill(tmp_path / "bare", tokens=None, class_token=False)
    latents_error(bare, "holds no features, only latents; encode the images again with what is needed")
    token = tiny(
        latents=str(fill(tmp_path / "tokens", class_token=False)),
        diffusion=replace(MODEL, alignment_widths=()),
        stages=(stage(DiffusionLosses(class_token=0.03)),),
    )
    with pytest.raises(ValueError, match="holds no class_token"):
        opened(token)


def test_folders_that_are_not_whole_are_named(tmp_path: Path) -> None:
    latents_error(tmp_path / "absent", "no folder .*absent exists; give one that `vfmvae encode` has written")
    unfinished = fill(tmp_path / "unfinished", finish=False)
    latents_error(unfinished, "is not finished: missing is 2 of 3 shards, .* `vfmvae encode` command again")
    for how in ("missing", "cut", "bit"):
        folder = fill(tmp_path / how)
        damage(folder / "latents_00001.safetensors", how)
        latents_error(folder, "latents_00001.safetensors")
    unchecked = tiny(latents=str(tmp_path / "bit"), verify_latents=False)
    assert isinstance(opened(unchecked), LatentInputs), "what is not read is not known"


def spoiled(name: str, value: float) -> Any:
    def change(stored: dict[str, torch.Tensor], number: int) -> None:
        if number == 13:
            stored[name].flatten()[3] = value

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    folder = fill(tmp_path / "made", spoiled("latents", value))
    latents_error(folder, "holds latents that are NaN or infinite, as their mean and deviation say; encode")


@pytest.mark.parametrize(
    ("name", "settings"), [("latents", {}), ("moments", {"moments": True}), ("class_token", {})]
)
def test_numbers_that_are_not_finite_are_found_in_what_another_program_wrote(
    name: str, settings: dict[str, bool], tmp_path: Path
) -> None:
    """Checksums and statistics are as they should be; what a run does not read is not looked at."""
    folder = fill(tmp_path / "made", **settings)
    path, manifest = folder / "latents_00001.safetensors", folder / "manifest.json"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stored = load_file(path)
    stored[name][3].flatten()[0] = np.nan
    save_file(stored, path, metadata)
    listed = json.loads(manifest.read_text())
    (entry,) = (e for e in listed["shards"] if e["file"] == path.name)
    entry |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(listed))
    latents_error(folder, f"shard {path.name} holds {name} that are not all finite: remove it; run the same")
    if name == "class_token":
        opened(tiny(latents=str(folder), diffusion=PLAIN, stages=VELOCITY))


def test_a_channel_that_does_not_vary_is_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "made", lambda stored, _: stored["latents"][1].zero_())
    latents_error(folder, "channel 1 is the same in all latents, so it cannot be normalised")


def test_the_latents_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "tokenizer")
    own = tokenizer_hash(load_tokenizer(path))
    folder = fill(tmp_path / "made")
    sentence = rf"are those of another tokenizer \(tttttttttttt\) than {path} \({own[:12]}\)"
    latents_error(folder, sentence, tokenizer=str(path))
    same = opened(tiny(latents=str(fill(tmp_path / "own", tokenizer=own)), tokenizer=str(path)))
    assert same.tokenizer is not None and same.tokenizer_hash == own
    unknown = fill(tmp_path / "imported", tokenizer="unknown")
    assert opened(tiny(latents=str(unknown), tokenizer=str(path))).tokenizer_hash is None


# Images


def on_images(model: TransformerConfig, **changes: Any) -> DiffusionConfig:
    return tiny(**{"data": "scenes", "diffusion": replace(model, classes=15), **changes})


def through_tokenizer(tmp_path: Path, **changes: Any) -> DiffusionConfig:
    """The tiny tokenizer has latents [8, 4, 4] of 64 px, and an encoder 32 wide with 8 x 8 tokens."""
    model = replace(MODEL, channels=8, alignment_widths=(32,), class_token_width=32)
    base: dict[str, Any] = {"tokenizer": str(save_tiny(tmp_path / "tokenizer")), "statistics_images": 64}
    return on_images(model, **base | changes)


def test_images_go_through_the_tokenizer_and_its_encoder(tmp_path: Path) -> None:
    config = through_tokenizer(tmp_path)
    source = opened(config)
    assert isinstance(source, ImageInputs) and source.resolution == 64
    (batch,) = source.batches([2], 4)
    given = source.inputs(batch, draws(4))
    images = Scenes("train", 64, config.seed).batch(2, 4)
    assert given.labels.tolist() == images["label"].tolist()
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    with torch.no_grad():
        posterior, features = tokenizer.encode(images["image"]), tokenizer.encoder(images["image"])
    expected = posterior.mode() + posterior.std * draws(4).normal((8, 4, 4))  # type: ignore[union-attr]
    torch.testing.assert_close(given.latents, expected, rtol=1e-5, atol=1e-5)
    assert given.features is not None and given.class_token is not None
    assert torch.equal(given.features, features.layers[-1]) and torch.equal(
        given.class_token, features.pooled
    )
    assert source.tokenizer_hash == tokenizer_hash(tokenizer)


def test_the_statistics_of_images_are_those_of_their_latents(tmp_path: Path) -> None:
    source = opened(through_tokenizer(tmp_path))
    mean, std = source.statistics()
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    with torch.no_grad():
        posterior = tokenizer.encode(Scenes("train", 64, 0).batch(0, 64)["image"])
    # A sample of the posterior has its variance beside that of the means.
    total = posterior.mode().var(dim=(0, 2, 3)) + posterior.var.mean(dim=(0, 2, 3))  # type: ignore[union-attr]
    torch.testing.assert_close(mean, posterior.mode().mean(dim=(0, 2, 3)), rtol=0, atol=0.1)
    torch.testing.assert_close(std, total.sqrt(), rtol=0.1, atol=0)
    assert all(torch.equal(*pair) for pair in zip((mean, std), source.statistics(), strict=True))


def test_pixels_are_learned_without_a_tokenizer_and_aligned_with_an_encoder() -> None:
    encoder = EncoderConfig(name="mini", layers=(-1,), scale_factor=1.0)
    model = replace(PLAIN, channels=3, latent_size=32, patch=8, alignment_widths=(128,))
    losses = DiffusionLosses(alignment=0.5)
    source = opened(on_images(model, encoder=encoder, stages=(stage(losses),)))
    (batch,) = source.batches([0], 4)
    given = source.inputs(batch, draws(4))
    assert torch.equal(given.latents, batch["image"].float() / 127.5 - 1) and given.class_token is None
    assert given.features is not None
    assert torch.equal(given.features, build_encoder(encoder)(batch["image"]).layers[0])
    mean, std = source.statistics()
    assert mean.tolist() == [0] * 3 and std.tolist() == [1] * 3 and source.tokenizer_hash is None


def test_every_source_trains(tmp_path: Path) -> None:
    pixels = on_images(replace(PLAIN, channels=3, latent_size=32, patch=8), stages=VELOCITY)
    for config in (through_tokenizer(tmp_path), pixels):
        results = steps(job(config), 2)
        assert all(r.skipped.item() == 0 and r.losses["total"].isfinite() for r in results)


def test_a_folder_of_images_has_its_held_out_images_for_evaluation(tmp_path: Path) -> None:
    for number in range(40):
        save_image(tmp_path / "data" / f"{number % 2}" / f"{number}.png", 40, 36, seed=number)
    model = replace(PLAIN, channels=3, latent_size=32, patch=8)
    source = opened(tiny(data=str(tmp_path / "data"), diffusion=model, stages=VELOCITY))
    assert isinstance(source, ImageInputs) and len(source.classes) == 2 and source.images == 40
    held_out = [key for batch in source.evaluation_batches(3) for key in batch["key"]]
    assert 0 < len(held_out) <= 10
    trained = {key for batch in source.batches(range(20), 4) for key in batch["key"]}
    assert not trained & set(held_out)
    assert len(trained) == source.training_images


def test_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the images have 3 channels, and diffusion.channels is 4"):
        opened(on_images(replace(PLAIN, latent_size=32), stages=VELOCITY))
    sentence = "the latents of .*tokenizer have 8 channels, and diffusion.channels is 4"
    with pytest.raises(ValueError, match=sentence):
        opened(through_tokenizer(tmp_path, diffusion=replace(MODEL, classes=15)))
    few = replace(PLAIN, channels=3, latent_size=32, classes=9)
    with pytest.raises(ValueError, match="scenes has 15 classes, and diffusion.classes is 9"):
        opened(on_images(few, stages=VELOCITY, diffusion=few))
    model = replace(
        MODEL, channels=3, latent_size=32, patch=16, alignment_widths=(128,), class_token_width=128
    )
    first = EncoderConfig(name="mini", layers=(0,), scale_factor=1.0)
    with pytest.raises(
        ValueError, match=r"last layer \(-1\) of an encoder, and there is encoder.layers \(0,\)"
    ):
        opened(on_images(model, encoder=first))
    with pytest.raises(ValueError, match="nothing gives features; name an encoder .*or a tokenizer"):
        on_images(model)
    source = opened(
        on_images(
            replace(model, alignment_widths=(WIDTH,), class_token_width=WIDTH),
            encoder=replace(first, layers=(-1,)),
            stages=(stage(ALL_LOSSES),),
        )
    )
    (batch,) = source.batches([0], 4)
    with pytest.raises(ValueError, match=r"features \(scenes\) are 128 wide, and diffusion.alignment_widths"):
        source.inputs(batch, draws(4))
