"""The list of broken samples: each once, kept over restarts, and an end of patience."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vfmvae.data.quarantine import Quarantine
from vfmvae.data.samples import Fault

A, B, C = Fault("a.jpg", "truncated"), Fault("b/ü.jpg", "the file is empty"), Fault("c", "no label")


def listed(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path, 1000, 0.01)
    assert quarantine.add([]) == [] and not path.exists()
    assert quarantine.add([A, B, A]) == [A, B]
    assert quarantine.add([B, C]) == [C]
    assert listed(path) == [{"key": fault.key, "reason": fault.reason} for fault in (A, B, C)]


def test_a_restart_appends_and_counts_anew(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 2, 0.5).add([A, B])
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "cut sh')  # by a kill
    again = Quarantine(path, 2, 0.5)
    assert again.add([B]) == [B]
    again.check()  # A may have been mended
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(
    ("images", "most", "allowed"), [(1000, 0.001, 1), (999, 0.001, 0), (4, 0.5, 2), (4, 1.0, 4)]
)
def test_the_limit(images: int, most: float, allowed: int) -> None:
    quarantine = Quarantine(None, images, most)
    for number in range(allowed):
        quarantine.add([Fault(str(number), "broken")])
        quarantine.check()
    quarantine.add([Fault("one more", "broken")])
    with pytest.raises(
        ValueError, match=rf"^{allowed + 1} of {images:,} images .* max_broken {most:g} allows {allowed}: "
    ):
        quarantine.check()


def test_the_sentence_names_the_first_and_the_list(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "list.jsonl", 100, 0)
    quarantine.add([A, B, C, Fault("d", "x"), Fault("e", "x")])
    with pytest.raises(
        ValueError,
        match=r"a\.jpg \(truncated\), .*, c \(no label\) and 2 more; the whole list is .*list\.jsonl",
    ):
        quarantine.check()


def test_what_costs_no_image_is_listed_and_does_not_count(tmp_path: Path) -> None:
    note = Fault("logs/", "a folder without images", False)
    quarantine = Quarantine(tmp_path / "q.jsonl", 10, 0.0)
    assert quarantine.add([note]) == [note]
    quarantine.check()
    assert listed(tmp_path / "q.jsonl") == [{"key": note.key, "reason": note.reason}]
    assert Quarantine(tmp_path / "q.jsonl", 10, 0.0).add([note]) == [note], "said by every run, listed once"
    Quarantine(tmp_path / "q.jsonl", 10, 0.0).add([note])
    assert len(listed(tmp_path / "q.jsonl")) == 1
