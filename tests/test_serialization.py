"""JSON to dataclasses: equal objects back, and errors that say where and what fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from vfmvae.serialization import check_fields, from_dict, read_json, to_json


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


@dataclass(frozen=True)
class Checked:
    count: int = 1
    rate: float = 0.5
    on: bool = False
    kind: Literal["a", "b"] = "a"
    name: str | None = None
    many: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)
    all: tuple[Inner, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "part")


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
        ({"pair": [0, float("inf")]}, "file: pair[1] is inf; needed is a finite number"),
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


def test_values_given_in_python_are_held_to_the_same_types() -> None:
    assert Checked(2, 0.25, True, "b", "x", (1, 2), Inner(3), (Inner(4),)).all == (Inner(4),)
    taken = Checked(count=np.int64(3), rate=2, many=[1, np.int32(2)], all=[{"width": 4}])
    assert taken == Checked(3, 2.0, many=(1, 2), all=(Inner(4),))
    assert [type(v) for v in (taken.count, taken.rate, *taken.many)] == [int, float, int, int]
    assert type(Checked(rate=np.float64(0.5)).rate) is type(Checked(rate=np.float32(0.5)).rate) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "8"}, 'part.count is "8"; needed is a whole number'),
        ({"count": 8.0}, "part.count is 8.0; needed is a whole number"),
        ({"count": True}, "part.count is true; needed is a whole number"),
        ({"rate": True}, "part.rate is true; needed is a number"),
        ({"rate": float("nan")}, "part.rate is nan; needed is a finite number"),
        ({"rate": np.float32("-inf")}, "part.rate is -inf; needed is a finite number"),
        ({"on": 1}, "part.on is 1; needed is true or false"),
        ({"kind": "c"}, 'part.kind is "c"; needed is one of a, b'),
        ({"name": Path("x")}, f"part.name is {Path('x')!r}; needed is a string"),
        ({"many": 5}, "part.many is 5; needed is a list"),
        ({"many": (1, "x")}, 'part.many[1] is "x"; needed is a whole number'),
        ({"inner": None}, "part.inner is null; needed is an object with fields"),
        ({"inner": Needy(1, 2)}, "part.inner is Needy(width=1, depth=2, heads=1); needed is an object"),
        ({"all": (Inner(), 1)}, "part.all[1] is 1; needed is an object with fields"),
    ],
)
def test_values_of_a_wrong_type_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Checked(**change)
    assert str(error.value).startswith(message)


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
