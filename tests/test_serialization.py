"""JSON to dataclasses: equal objects back, and errors that say where and what fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from vfmvae.serialization import from_dict, read_json, to_json


@dataclass(frozen=True)
class Inner:
    width: int = 1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Needy:
    width: int
    depth: int
    heads: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    needy: Needy | None = None
    rate: float = 0.5
    on: bool = False
    name: str | None = None
    many: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate is {self.rate}; it must not be negative")


def test_json_gives_the_same_object_back(tmp_path: Path) -> None:
    outer = Outer(Inner(3, "b"), Inner(4), Needy(5, 6), 1e-7, True, "x", (1, 2, 3), (0.25, 1.0))
    file = tmp_path / "config.json"
    file.write_text(to_json(outer))
    assert from_dict(Outer, read_json(file), "file") == outer


def test_missing_keys_take_defaults_and_whole_numbers_are_floats() -> None:
    outer = from_dict(Outer, {"rate": 2, "pair": [0, 1]}, "file")
    assert outer == Outer(rate=2.0, pair=(0.0, 1.0))
    assert [type(value) for value in (outer.rate, *outer.pair)] == [float, float, float]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"ratte": 1},
            "file: unknown field 'ratte'; valid fields: inner, maybe, needy, rate, on, name, many, pair",
        ),
        ({"inner": {"wid": 1}}, "file: unknown field 'wid' in inner; valid fields: width, kind"),
        ({"maybe": {"wid": 1}}, "file: unknown field 'wid' in maybe; valid fields: width, kind"),
        ({"inner": {"kind": "c"}}, 'file: inner.kind is "c"; needed is one of a, b'),
        ({"inner": {"width": "3"}}, 'file: inner.width is "3"; needed is a whole number'),
        ({"inner": {"width": 3.0}}, "file: inner.width is 3.0; needed is a whole number"),
        ({"inner": {"width": True}}, "file: inner.width is true; needed is a whole number"),
        ({"inner": None}, "file: inner is null; needed is an object with fields"),
        ({"needy": {"heads": 2}}, "file: missing fields in needy: width, depth"),
        ({"rate": "fast"}, 'file: rate is "fast"; needed is a number'),
        ({"rate": False}, "file: rate is false; needed is a number"),
        ({"on": 1}, "file: on is 1; needed is true or false"),
        ({"name": 1}, "file: name is 1; needed is a string"),
        ({"many": 5}, "file: many is 5; needed is a list"),
        ({"many": [1, "x"]}, 'file: many[1] is "x"; needed is a whole number'),
        ({"pair": [1]}, "file: pair is [1]; needed is a list of 2"),
        ({"rate": -1}, "file: rate is -1.0; it must not be negative"),
        ([1], "file: found [1]; needed is an object with fields"),
    ],
)
def test_what_does_not_fit_is_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_dict(Outer, data, "file")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"steps": 5, "tokeni', "is not valid JSON: .*line 1"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1, 2]", "holds a JSON list, needed is an object"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        read_json(file)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.json cannot be read: No such file"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
