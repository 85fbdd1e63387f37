"""Reading latents: every image once, in an order that positions alone decide, out of mapped files."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.latent_shards import IMAGES, NAMES, SETTINGS, damage, fill, latent, token
from vfmvae.data import latents as module
from vfmvae.data.latent_folder import Shard
from vfmvae.data.latent_writer import LatentWriter
from vfmvae.data.latents import Latents
from vfmvae.data.source import positions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "latents")


def keys_of(source: Latents, batch_size: int, batches: int) -> list[str]:
    return [key for step in range(batches) for key in source.batch(step, batch_size)["key"]]


def test_validation_is_every_image_in_order(folder: Path) -> None:
    source = Latents(folder, "validation")
    assert len(source) == IMAGES and source.classes == tuple("abcde")
    batches = [source.batch(step, 9) for step in range(3)]
    assert [len(batch["key"]) for batch in batches] == [9, 9, 5]
    assert [key for batch in batches for key in batch["key"]] == NAMES
    found = torch.cat([batch["latent"] for batch in batches])
    assert torch.equal(found, torch.stack([latent(number) for number in range(IMAGES)]))
    assert batches[1]["label"].tolist() == [number % 5 for number in range(9, 18)]
    assert batches[0]["moments"] is not None and torch.equal(batches[0]["moments"][:, :3], found[:9])
    assert batches[0]["features"] is None and batches[0]["class_token"] is None
    with pytest.raises(ValueError, match="begins beyond the 23"):
        source.batch(3, 9)


@pytest.mark.parametrize(("block", "window"), [(1, 1), (1, 512), (3, 2), (4, 512), (32, 512)])
def test_an_epoch_of_training_has_every_image_once_mirrored_or_not(
    folder: Path, block: int, window: int
) -> None:
    source = Latents(folder, seed=3, block=block, window=window)
    batches = [source.batch(step, 4) for step in range(2 * IMAGES)]  # eight epochs
    keys = [key for batch in batches for key in batch["key"]]
    latents = torch.cat([batch["latent"] for batch in batches])
    moments = torch.cat([batch["moments"] for batch in batches])
    labels = torch.cat([batch["label"] for batch in batches])
    epochs = [keys[start : start + IMAGES] for start in range(0, len(keys), IMAGES)]
    assert all(sorted(epoch) == sorted(NAMES) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    mirrored = 0
    for key, found, both, label in zip(keys, latents, moments, labels, strict=True):
        number = NAMES.index(key)
        flip = not torch.equal(found, latent(number))
        assert torch.equal(found, latent(number, flip)) and torch.equal(both[:3], found)
        assert label.item() == number % 5
        mirrored += flip
    assert 0.2 < mirrored / len(keys) < 0.8


def test_ranks_share_an_epoch(folder: Path) -> None:
    """Rank r of n reads step * n + r; together they see what one process sees."""
    whole = Latents(folder, seed=1, block=3, window=2)
    ranks = [Latents(folder, seed=1, block=3, window=2) for _ in range(3)]
    for step in range(10):
        parts = [source.batch(3 * step + rank, 4) for rank, source in enumerate(ranks)]
        together = whole.batch(step, 12)
        assert [key for part in parts for key in part["key"]] == together["key"]
        assert torch.equal(torch.cat([part["latent"] for part in parts]), together["latent"])


def test_a_batch_depends_on_seed_and_position_alone(folder: Path) -> None:
    source, again = Latents(folder, seed=1), Latents(folder, seed=1, verify=False)
    halves = torch.cat([source.batch(4, 6)["latent"], source.batch(5, 6)["latent"]])
    assert torch.equal(again.batch(2, 12)["latent"], halves)
    assert not torch.equal(Latents(folder, seed=2).batch(2, 12)["latent"], halves)
    assert torch.equal(source.batch(0, 3 * IMAGES)["latent"], torch.cat([again.batch(0, 69)["latent"]]))


def test_blocks_stay_together_within_a_window() -> None:
    """Of 1000 rows: each window reads whole blocks, and its rows are shuffled beyond them."""
    block, window = 8, 5
    order = module._order(0, 0, 1000, block, window, True)
    assert sorted(order.rows.tolist()) == list(range(1000))
    seen: list[int] = []
    for start in range(0, 1000, block * window):
        rows = order.rows[start : start + block * window]
        blocks = Counter((rows // block).tolist())
        assert set(blocks.values()) == {block} and len(blocks) == window
        assert (np.diff(rows) == 1).mean() < 0.3, "rows of a block do not follow each other"
        seen += blocks
    assert sorted(seen) == list(range(125)) and seen != sorted(seen)
    flips = {
        (row // block, flip) for row, flip in zip(order.rows.tolist(), order.mirrored.tolist(), strict=True)
    }
    assert len(flips) == 125, "a block is mirrored as a whole, so that it is one stretch of a file"
    assert 40 < sum(flip for _, flip in flips) < 85


def test_no_window_is_small() -> None:
    """Rows of a single block left at the end would all come in one batch, in a row."""
    cuts = module._order(0, 0, 8 * 21 + 3, 8, 5, True).cuts
    assert cuts[0] == 0 and cuts[-1] == 171 and len(cuts) == 5
    assert np.diff(cuts).min() >= 5 * 8 - 5 and np.diff(cuts).max() <= 6 * 8
    assert module._order(0, 0, 30, 8, 5, True).cuts.tolist() == [0, 30]


def test_a_row_may_come_anywhere_in_an_epoch() -> None:
    """Mean and spread of one row's place over 400 seeds are those of a uniform draw."""
    places = [int((module._order(s, 0, 203, 8, 4, True).rows == 202).argmax()) for s in range(400)]
    assert abs(np.mean(places) - 101) < 4 * 58.6 / 20 and abs(np.std(places) - 58.6) < 6


def test_every_row_by_itself_is_a_full_shuffle() -> None:
    order = module._order(5, 2, 100, 1, 7, True)
    assert sorted(order.rows.tolist()) == list(range(100)) and 25 < order.mirrored.sum() < 75


def test_shards_may_lack_images(tmp_path: Path) -> None:
    """The second shard is empty, the others hold less than planned."""
    gone = {0, *range(10, 20), 22}
    source = Latents(fill(tmp_path / "latents", without=gone), "validation")
    there = [number for number in range(IMAGES) if number not in gone]
    batch = source.read(0, 100)
    assert len(source) == 11 and batch["key"] == [NAMES[number] for number in there]
    assert torch.equal(batch["latent"], torch.stack([latent(number) for number in there]))
    assert batch["label"].tolist() == source.labels.tolist() == [number % 5 for number in there]
    training = Latents(tmp_path / "latents", block=4, window=1)
    assert sorted(keys_of(training, 11, 1)) == sorted(batch["key"])


def test_features_are_yielded_and_fields_can_be_chosen(tmp_path: Path) -> None:
    settings = replace(SETTINGS, tokens=(2, 3), class_token=True, storage="bf16")
    path = fill(tmp_path / "latents", settings)
    batch = Latents(path, seed=1, block=1).batch(0, 8)
    assert all(value.dtype == torch.float32 for name, value in batch.items() if name not in ("label", "key"))
    flips = set()
    for row, key in enumerate(batch["key"]):
        number = NAMES.index(key)
        flip = not torch.equal(batch["latent"][row], latent(number).bfloat16().float())
        expected = token(number, flip).bfloat16().float()
        assert torch.equal(batch["class_token"][row], expected)
        assert batch["features"][row].shape == (6, 5) and torch.equal(batch["features"][row, 1], expected)
        flips.add(flip)
    assert flips == {False, True}
    some = Latents(path, seed=1, block=1, fields=("moments",)).batch(0, 8)
    assert some["latent"] is some["features"] is some["class_token"] is None
    assert torch.equal(some["moments"], batch["moments"]) and some["key"] == batch["key"]
    with pytest.raises(ValueError, match="holds no features, only latents, moments"):
        Latents(fill(tmp_path / "plain"), fields=("features",))


def test_nothing_is_mirrored_where_there_are_no_mirror_images(tmp_path: Path) -> None:
    source = Latents(fill(tmp_path / "latents", replace(SETTINGS, flips=False)), block=1)
    for step in range(8):
        batch = source.batch(step, 9)
        for key, found in zip(batch["key"], batch["latent"], strict=True):
            assert torch.equal(found, latent(NAMES.index(key)))


def test_no_file_is_opened_for_a_batch(folder: Path) -> None:
    """Not even one that is still there: batches come out of the mapping."""
    source, truth = Latents(folder, seed=4), Latents(folder, seed=4).batch(0, 40)
    shutil.rmtree(folder)
    found = source.batch(0, 40)
    assert torch.equal(found["latent"], truth["latent"]) and found["key"] == truth["key"]


def test_what_a_window_needs_is_asked_for_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the next window and no other, at the first batch that reaches into a window."""
    asked: list[tuple[int, bool]] = []

    def advise(shard: Shard, fields: tuple[str, ...], ranges: list[tuple[int, int, bool]]) -> None:
        begin = 10 * int(shard.path.stem[-1])
        asked.extend((begin + row, flip) for start, stop, flip in ranges for row in range(start, stop))

    monkeypatch.setattr(module, "_will_need", advise)
    source = Latents(folder, seed=2, block=3, window=2)
    windows = []
    for order in (source._order(0), source._order(1)):
        pairs = list(zip(order.rows.tolist(), order.mirrored.tolist(), strict=True))
        cuts = order.cuts.tolist()
        windows += [sorted(pairs[start:stop]) for start, stop in pairwise(cuts)]
    assert sorted(len(window) for window in windows) == [5, 5, 6, 6, 6, 6, 6, 6], "two blocks each"
    requests = []
    for position in range(29):
        source.batch(position, 1)
        if asked:
            requests.append((position, sorted(asked)))
        asked.clear()
    begins = [0, *np.cumsum([len(window) for window in windows])[:4].tolist()]
    assert [position for position, _ in requests] == begins
    assert requests[0][1] == sorted(windows[0] + windows[1])
    assert [rows for _, rows in requests[1:]] == windows[2:6]


def test_reading_ahead_takes_the_rows_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(module.os, "posix_fadvise", lambda fd, at, size, advice: calls.append((at, size)))
    content, seen = (folder / "latents_00000.safetensors").read_bytes(), set()
    for seed in range(6):  # one block in an epoch, mirrored or not
        calls.clear()
        source = Latents(folder, fields=("latents",), seed=seed)
        source.batch(0, 4)
        flip = bool(source._order(0).mirrored[0])
        at, size = calls[0]
        expected = torch.stack([latent(number, flip) for number in range(10)]).numpy().tobytes()
        assert content[at : at + size] == expected
        seen.add(flip)
    assert seen == {False, True}


def test_another_process_gets_the_same(folder: Path) -> None:
    source = Latents(folder, seed=3, fields=("moments",), block=2, window=3)
    content = pickle.dumps(source)
    copied = pickle.loads(content)
    assert len(content) < 1000, "files are mapped again, not copied"
    assert torch.equal(copied.batch(1, 9)["moments"], source.batch(1, 9)["moments"])
    assert copied.batch(1, 9)["latent"] is None


def test_sizes_can_be_trusted_instead_of_checksums(folder: Path) -> None:
    damage(folder / "latents_00001.safetensors", "bit")
    with pytest.raises(ValueError, match="its checksum is not the manifest's"):
        Latents(folder)
    Latents(folder, verify=False)


def test_wrong_arguments_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="block is 0 and window 512"):
        Latents(folder, block=0)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        Latents(folder, "test")
    assert positions(0, 1, "train", 1) == range(0, 1)


def test_labels_that_no_class_has_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "latents")
    (tmp_path / "latents/manifest.json").unlink()
    LatentWriter(tmp_path / "latents", SETTINGS, ("a", "b")).finish()
    with pytest.raises(ValueError, match="labels go from 0 to 4, and there are 2 classes"):
        Latents(tmp_path / "latents")
