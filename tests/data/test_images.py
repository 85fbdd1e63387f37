"""Image folders: which files, which labels, which split, in which order, and what is said about bad ones."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vfmvae.data import Images, Photographs, Split, open_data, open_samples, validation_batches
from vfmvae.data.samples import NO_LABEL, Fault
from vfmvae.data.transforms import CropConfig


def write(folder: Path, *names: str) -> Path:
    """Small images at these relative names, each of a colour of its own."""
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), (number, 2 * number % 256, 255 - number)).save(file)
    return folder


def flat(folder: Path, count: int) -> Path:
    return write(folder, *(f"{number:03}.png" for number in range(count)))


def open_folder(path: Path, resolution: int, split: Split = "train", seed: int = 0) -> Images:
    source = open_data(str(path), split, resolution, seed)
    assert isinstance(source, Images)
    return source


def names(folder: Images) -> list[str]:
    return [folder.samples.key(number) for number in range(len(folder))]


def test_imagenet_layout(tmp_path: Path) -> None:
    write(
        tmp_path,
        "train/cat/1.png",
        "train/ant/deep/2.JPEG",
        "train/ant/1.webp",
        "val/cat/9.png",
        "val/ant/8.png",
    )
    train, validation = (open_folder(tmp_path, 8, split) for split in ("train", "validation"))
    assert names(train) == ["train/ant/1.webp", "train/ant/deep/2.JPEG", "train/cat/1.png"]
    assert names(validation) == ["val/ant/8.png", "val/cat/9.png"]
    assert train.classes == validation.classes == ("ant", "cat")
    batch = validation.batch(0, 10)
    assert batch["label"].tolist() == [0, 1] and batch["key"] == ["val/ant/8.png", "val/cat/9.png"]


def test_labels_agree_between_splits_whatever_each_holds(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/1.png", "c/1.png", "validation/b/2.png", "validation/c/2.png")
    assert open_folder(tmp_path, 8, "train").classes == ("a", "b", "c")
    validation = open_folder(tmp_path, 8, "validation")
    assert validation.batch(0, 2)["label"].tolist() == [1, 2]


def test_batches_are_uint8_channels_last_and_show_the_file(tmp_path: Path) -> None:
    folder = open_folder(flat(tmp_path, 40), 8, "train", seed=3)
    batch = folder.batch(2, 16)
    assert batch["image"].shape == (16, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    for image, key in zip(batch["image"], batch["key"], strict=True):
        with Image.open(tmp_path / key) as file:
            assert image[:, 4, 4].tolist() == list(file.getpixel((0, 0)))


def test_an_epoch_visits_every_file_once_in_a_new_order(tmp_path: Path) -> None:
    folder = open_folder(flat(tmp_path, 64), 4, "train")
    count = len(folder)
    keys = [key for step in range(3) for key in folder.batch(step, count)["key"]]
    epochs = [keys[i : i + count] for i in (0, count, 2 * count)]
    assert all(sorted(epoch) == names(folder) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != names(folder)
    assert open_folder(tmp_path, 4, "train", seed=1).batch(0, count)["key"] != epochs[0]


def test_a_batch_depends_on_seed_and_position_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    folder, again = open_folder(tmp_path, 16), open_folder(tmp_path, 16)
    expected = folder.batch(0, 24)
    second = again.batch(1, 12)
    first = again.batch(0, 12)
    assert first["key"] + second["key"] == expected["key"]
    assert torch.equal(torch.cat([first["image"], second["image"]]), expected["image"])
    by_key = sorted(zip(expected["key"], expected["image"], strict=True), key=lambda pair: pair[0])
    assert not torch.equal(by_key[0][1], by_key[1][1]), "the crop is drawn anew in every epoch"


def test_training_crops_keep_to_their_limits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train/a.png", "val/b.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(tmp_path / name)
    whole, mirrored = (CropConfig(side=(1.0, 1.0), flip=flip) for flip in (0.0, 1.0))
    train, validation = (open_folder(tmp_path, 16, split) for split in ("train", "validation"))
    images = train.batch(0, 4, whole)["image"]
    assert all(torch.equal(image, images[0]) for image in images)
    assert torch.equal(train.batch(0, 4, mirrored)["image"], images.flip(-1))
    assert not torch.equal(train.batch(0, 4)["image"], images)
    assert torch.equal(validation.batch(0, 1, mirrored)["image"], validation.batch(0, 1)["image"])


def test_the_hashed_split_is_a_small_stable_share(tmp_path: Path) -> None:
    flat(tmp_path, 400)
    train, validation = (set(names(open_folder(tmp_path, 8, split))) for split in ("train", "validation"))
    assert len(train) + len(validation) == 400 and not train & validation
    assert 8 <= len(validation) <= 36
    write(tmp_path, *(f"new{number}.png" for number in range(50)))
    grown = set(names(open_folder(tmp_path, 8, "validation")))
    assert validation == {name for name in grown if not name.startswith("new")}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_small_folders_have_both_splits(tmp_path: Path, count: int) -> None:
    flat(tmp_path, count)
    sizes = [len(open_folder(tmp_path, 8, split)) for split in ("train", "validation")]
    assert min(sizes) >= 1 and sum(sizes) == count


def test_a_train_folder_alone_is_split_within(tmp_path: Path) -> None:
    write(tmp_path, *(f"train/{name}/{number}.png" for name in "ab" for number in range(4)))
    assert open_folder(tmp_path, 8).classes == ("a", "b")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path, "train/1.png", "train/2.png", "plane/1.png", "plane/2.png")
    assert open_folder(tmp_path, 8).classes == ("plane", "train")


def test_a_flat_validation_folder_moves_no_label(tmp_path: Path) -> None:
    write(tmp_path, "train/ant/1.png", "train/cat/1.png", "val/1.png", "val/2.png")
    train, validation = (open_folder(tmp_path, 8, split) for split in ("train", "validation"))
    assert train.classes == validation.classes == ("ant", "cat")
    assert sorted(train.batch(0, 2)["label"].tolist()) == [0, 1]
    held_out = validation.batch(0, 2)
    assert held_out["label"].tolist() == [NO_LABEL] * 2 and held_out["faults"] == []


@pytest.mark.parametrize("name", ["valid", "test"])
def test_other_names_of_the_validation_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, "train/a/1.png", "train/b/1.png", f"{name}/b/2.png")
    assert names(open_folder(tmp_path, 8)) == ["train/a/1.png", "train/b/1.png"]
    validation = open_folder(tmp_path, 8, "validation")
    assert names(validation) == [f"{name}/b/2.png"] and validation.classes == ("a", "b")
    write(tmp_path, "val/a/3.png")
    assert names(open_folder(tmp_path, 8, "validation")) == (["val/a/3.png"])
    assert names(open_folder(tmp_path, 8)) == ["train/a/1.png", "train/b/1.png"]


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "data", "a/1.png", "b/2.png")
    (tmp_path / "data/a/self").symlink_to(tmp_path / "data")
    (tmp_path / "data/c").symlink_to(write(tmp_path / "elsewhere", "3.png"))
    assert len(open_samples(str(tmp_path / "data"), "all")) == 3


def test_links_among_folders_end(tmp_path: Path) -> None:
    """Each of three folders holds links to the two others; a path goes through none twice."""
    folders = "abc"
    write(tmp_path, *(f"{name}/{name}.png" for name in folders))
    for name, other in itertools.permutations(folders, 2):
        (tmp_path / name / other).symlink_to(f"../{other}")
    found = open_samples(str(tmp_path), "all")
    routes = [route for n in (1, 2, 3) for route in itertools.permutations(folders, n)]
    assert [found.key(n) for n in range(len(found))] == sorted(
        f"{'/'.join(route)}/{route[-1]}.png" for route in routes
    )


def test_class_folders_without_images_and_unread_kinds_are_told(tmp_path: Path) -> None:
    write(tmp_path, "train/b/1.png", "train/d/deep/1.png", "val/b/2.png")
    for empty in ("train/a", "train/c", "val/d", "logs", "train/b/more"):
        (tmp_path / empty).mkdir()
    for name in ("train/c/1.gif", "train/b/0.GIF", "val/b/2.heic", "train/b/notes.txt"):
        (tmp_path / name).write_bytes(b"")
    for part in ("train", "validation"):
        samples = open_samples(str(tmp_path), part)
        assert samples.classes == ("b", "d") and samples.faults() == [
            Fault("train/a/", "a folder without images, of which no class is made", False),
            Fault("train/c/", "a folder without images, of which no class is made", False),
            Fault("*.gif", "2 of a kind that is not read, the first train/b/0.GIF", False),
            Fault("*.heic", "1 of a kind that is not read, the first val/b/2.heic", False),
        ]


def test_what_holds_no_images_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shapes are drawn"):
        open_samples("shapes", "all")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "shard-00000-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds latents; describe them with vfmvae latents info"):
        open_samples(str(tmp_path), "all")


def test_a_pipe_is_a_fault_and_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, "train/1.png", "val/1.png")
    os.mkfifo(tmp_path / "val/2.png")
    assert open_folder(tmp_path, 8, "validation").batch(0, 2)["faults"] == [
        Fault("val/2.png", "it is no regular file")
    ]


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png")
    os.rename(tmp_path / "2.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    samples = open_samples(str(tmp_path), "all")
    assert len(samples) == 2 and samples.read(1) and len(open_samples(str(tmp_path), "train")) == 1


def test_a_few_images_beside_packed_data_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "assets/1.png", "assets/2.png")
    (tmp_path / "train-0.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 1 tar or parquet files \(train-0\.parquet\) and 2 images"):
        open_samples(str(tmp_path), "train")
    assert len(open_samples(str(tmp_path / "assets"), "all")) == 2


def test_other_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.JPG", ".hidden.png", ".cache/3.png")
    (tmp_path / "notes.txt").write_text("not an image")
    both = names(open_folder(tmp_path, 8)) + names(open_folder(tmp_path, 8, "validation"))
    assert sorted(both) == ["1.png", "2.JPG"]


def test_validation_is_centre_crops_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = {f"val/{n}.png": rng.integers(0, 256, (8, 14, 3), dtype=np.uint8) for n in range(5)}
    write(tmp_path, "train/1.png", *pixels)
    for name, image in pixels.items():
        Image.fromarray(image).save(tmp_path / name)
    batches = list(validation_batches(open_folder(tmp_path, 8, "validation", seed=9), 2))
    assert [len(batch["key"]) for batch in batches] == [2, 2, 1]
    images = torch.cat([batch["image"] for batch in batches]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images, np.stack([image[:, 3:11] for image in pixels.values()]))


@pytest.mark.parametrize("contents", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_held_out_images_that_are_broken_are_left_out_and_named(tmp_path: Path, contents: bytes) -> None:
    write(tmp_path, "train/good.png", "val/1.png", "val/2.png")
    (tmp_path / "val" / "1b.png").write_bytes(contents)
    batch = open_folder(tmp_path, 8, "validation").batch(0, 3)
    assert batch["key"] == ["val/1.png", "val/2.png"] and batch["number"] == [0, 2]
    assert batch["image"].shape == (2, 3, 8, 8) and batch["label"].tolist() == [0, 0]
    assert [fault.key for fault in batch["faults"]] == ["val/1b.png"]
    alone = open_folder(tmp_path, 8, "validation").batch(1, 1)
    assert alone["image"].shape == (0, 3, 8, 8) and alone["key"] == [] and len(alone["faults"]) == 1


def test_a_broken_image_is_replaced_in_its_place_alone(tmp_path: Path) -> None:
    whole = open_folder(flat(tmp_path, 60), 8)
    count = len(whole)
    before = whole.batch(0, count)
    for number in (3, 17):
        (tmp_path / before["key"][number]).write_bytes(b"broken")
    after = open_folder(tmp_path, 8).batch(0, count)
    broken = {before["key"][3], before["key"][17]}
    assert {fault.key for fault in after["faults"]} == broken
    for number in range(count):
        if number in (3, 17):
            assert after["key"][number] not in broken
        else:
            assert after["key"][number] == before["key"][number]
            assert torch.equal(after["image"][number], before["image"][number])
    parts = [open_folder(tmp_path, 8).batch(step, 3) for step in range(count // 3)]
    assert [key for part in parts for key in part["key"]] == after["key"][: count // 3 * 3]


class Unlabelled:
    """Two samples, one of which lacks its label."""

    classes = ("a", "b")

    def __len__(self) -> int:
        return 2

    def key(self, number: int) -> str:
        return f"sample {number}"

    def label(self, number: int) -> int:
        return (1, NO_LABEL)[number]

    def read(self, number: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (9, 9)).save(file, "png")
        return file.getvalue()

    def faults(self) -> list[Fault]:
        return []


def test_a_sample_without_its_label_is_a_fault() -> None:
    batch = Images(Unlabelled(), 8).batch(0, 4)
    assert batch["label"].tolist() == [1] * 4 and batch["key"] == ["sample 0"] * 4
    assert {fault.key for fault in batch["faults"]} == {"sample 1"}
    assert "no label" in batch["faults"][0].reason


def test_a_data_set_that_has_vanished_ends_the_reading(tmp_path: Path) -> None:
    source = open_folder(flat(tmp_path, 5), 8)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"32 images .* cannot be read, at last \d+\.png: No such file"):
        source.batch(0, 2)


def test_bad_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist; it should hold \.bmp, \.jpeg, \.jpg"):
        open_folder(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match=r"no images for train in .*: looked for \.bmp, \.jpeg"):
        open_folder(tmp_path, 8)
    write(tmp_path, "1.png")
    with pytest.raises(ValueError, match=r"1\.png is a file; give the folder"):
        open_folder(tmp_path / "1.png", 8)
    with pytest.raises(ValueError, match=r"one image only, 1\.png"):
        open_folder(tmp_path, 8)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        open_folder(tmp_path, 8, "test")


def test_open_data_chooses_by_path(tmp_path: Path) -> None:
    assert isinstance(open_data(None, "validation", 32), Photographs)
    folder = open_data(str(flat(tmp_path, 4)), "train", 8, seed=2)
    assert isinstance(folder, Images) and folder.seed == 2 and folder.resolution == 8
