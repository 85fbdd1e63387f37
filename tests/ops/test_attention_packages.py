"""flash-attn and xformers, of which plain PyTorch in modules of their names takes the place."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from vfmvae import ops
from vfmvae.ops import attention_packages, native

door: Any = importlib.import_module("vfmvae.ops.attention")  # the package has a function of this name

# [B, N, heads, d], rows dense: as the real ones want it.
STUB = """
import torch
calls = []
def {function}(q, k, v, **options):
    for x in (q, k, v):
        assert x.stride(3) == 1 and x.shape[::2] == q.shape[::2] and x.shape[3] == q.shape[3], x.shape
    calls.append(options)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    out = (weights @ v).transpose(1, 2).contiguous()
    return {result}
"""
FLASH_2 = {"flash_attn/__init__.py": STUB.format(function="flash_attn_func", result="out")}
FLASH_3 = {"flash_attn_interface.py": STUB.format(function="flash_attn_func", result="out")}
FLASH_4 = {"flash_attn/cute/__init__.py": STUB.format(function="flash_attn_func", result="(out, None)")}
XFORMERS = {
    "xformers/__init__.py": "",
    "xformers/ops.py": STUB.format(function="memory_efficient_attention", result="out"),
}
ALL = FLASH_2 | FLASH_3 | FLASH_4 | XFORMERS
MODULES = ("flash_attn", "flash_attn_interface", "xformers")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    def forget() -> None:
        attention_packages._search.cache_clear()
        attention_packages._import.cache_clear()
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
            del sys.modules[name]

    def put(files: dict[str, str]) -> None:
        for name, source in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(source)
        forget()

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield put
    forget()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, tuple[str, dict[str, str]]]]:
    """What is chosen for 16-bit tensors on a card of that capability; trials run on the CPU."""
    trial = attention_packages._trial
    monkeypatch.setattr(
        attention_packages, "_trial", lambda package, _, *rest: trial(package, torch.device("cpu"), *rest)
    )

    def choices(major: int = 9, dtype: torch.dtype = torch.bfloat16) -> dict:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, 0))
        monkeypatch.setattr(native, "why_no_triton", lambda x: None)
        with FakeTensorMode():
            return ops.attention_choices(torch.device("cuda", 0), dtype, dtype)

    return choices


def test_with_none_of_them(install, card) -> None:
    found = card()
    assert {use: name for use, (name, _) in found.items()} == {
        "encoder": "sdpa",
        "fusion": "triton",
        "decoder": "triton",
    }
    reasons = found["encoder"][1]
    assert reasons["flash-attn"] == "the package flash-attn is not installed"
    assert reasons["xformers"] == "the package xformers is not installed"
    assert "libraries are faster" in reasons["triton"]
    assert found["decoder"][1] == {}


def test_with_some_of_them(install, card) -> None:
    install(XFORMERS)
    name, reasons = card()["encoder"]
    assert name == "xformers" and reasons["flash-attn"] == "the package flash-attn is not installed"


def test_with_all_of_them(install, card) -> None:
    install(ALL)
    found = card()
    assert [name for name, _ in found.values()] == ["flash-attn", "triton", "triton"]
    assert list(found["encoder"][1]) == ["triton"]
    assert {use: name for use, (name, _) in card(dtype=torch.float32).items()} == dict.fromkeys(found, "sdpa")
    assert "bfloat16 and float16, not torch.float32" in card(dtype=torch.float32)["encoder"][1]["xformers"]


@pytest.mark.parametrize(
    ("files", "major", "name"),
    [
        (ALL, 9, "flash-attn 3"),
        (ALL, 10, "flash-attn 4"),
        (ALL, 8, "flash-attn 2"),
        (FLASH_4, 9, "flash-attn 4"),  # in a folder flash_attn that is no flash-attn 2
        (FLASH_4, 8, None),
        (FLASH_2, 7, None),
    ],
)
def test_the_version_of_flash_attn_suits_the_card(install, card, files, major: int, name: str | None) -> None:
    install(files)
    reasons = card(major)["encoder"][1]
    package, objection = attention_packages._search(attention_packages.FLASH, "cuda", 0, torch.bfloat16, 64)
    assert (package.name if package else None) == name
    assert objection == reasons.get("flash-attn")
    assert name is not None or f"not for cards of sm_{major}0" in str(objection)


def test_heads_that_they_do_not_take(install, card) -> None:
    install(ALL)
    card()
    for width, word in ((36, "multiples of 8"), (264, "up to 256 numbers, not 264")):
        for packages in (attention_packages.FLASH, attention_packages.XFORMERS):
            package, objection = attention_packages._search(packages, "cuda", 0, torch.float16, width)
            assert package is None and word in str(objection)


def test_a_package_that_is_broken_is_named_with_its_error(
    install, card, caplog: pytest.LogCaptureFixture
) -> None:
    install({"flash_attn/__init__.py": 'raise OSError("libcudart.so.99: no such file\\nmore")'} | XFORMERS)
    name, reasons = card()["encoder"]
    sentence = "flash-attn 2 is installed but cannot be imported: OSError: libcudart.so.99: no such file"
    assert name == "xformers" and sentence in reasons["flash-attn"]
    assert any(r.levelname == "WARNING" and sentence in r.message for r in caplog.records)


def test_a_package_built_for_other_cards_is_found_out(install, card) -> None:
    install({name: source.replace("calls.append", "no_kernel_image") for name, source in XFORMERS.items()})
    name, reasons = card()["encoder"]
    assert name == "sdpa" and "xformers is installed but fails here: NameError" in reasons["xformers"]


@pytest.mark.parametrize(
    "package", [*attention_packages.FLASH, *attention_packages.XFORMERS], ids=lambda p: p.name
)
@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("head_mean", [False, True])
def test_results_by_way_of_each(
    install, package, null: bool, head_mean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(ALL)
    monkeypatch.setattr(attention_packages, "_find", lambda packages, query: (package, None))
    q, k, v = torch.randn(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
    extra = torch.randn(2, 4, 8).unbind() if null else (None, None)
    found, truth = (
        ops.attention(q, k, v, *extra, head_mean, fused=fused) for fused in (package.name.split()[0], False)
    )
    torch.testing.assert_close(found, truth)
    transposed = v.transpose(-1, -2).contiguous().transpose(-1, -2)  # rows that are not dense
    torch.testing.assert_close(
        ops.attention(q, k, transposed, fused=package.name.split()[0]), ops.attention(q, k, v)
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        ops.attention(q, k, v, fused=package.name.split()[0])
    finally:
        torch.use_deterministic_algorithms(deterministic)
    expected = {} if package.name == "xformers" else {"deterministic": True}
    assert sys.modules[package.module].calls[-1] == expected and sys.modules[package.module].calls[0] == {}


def test_by_name_they_are_refused_in_words(install) -> None:
    q = torch.ones(1, 1, 2, 8)
    with pytest.raises(
        ValueError, match="'xformers' cannot be used here: the package xformers is not installed"
    ):
        ops.attention(q, q, q, fused="xformers")
    install(ALL)
    with pytest.raises(ValueError, match="'flash-attn' cannot be used here: the tensor is on cpu"):
        ops.attention(q, q, q, fused="flash-attn")


def test_where_only_the_plain_form_is_allowed_nothing_else_runs(install, card) -> None:
    install(ALL)
    with sdpa_kernel(SDPBackend.MATH):
        found = card()
    for name, reasons in found.values():
        assert name == "sdpa" and set(reasons.values()) == {
            "torch.nn.attention.sdpa_kernel allows the plain form only"
        }


@pytest.mark.parametrize(
    ("version", "lengths", "wrong"),
    [
        (91500, (128, 256), False),
        (91500, (128, 257), True),
        (91500, (197, 128), True),
        (91501, (197, 197), False),
        (None, (197, 197), True),
    ],
)
def test_cudnn_is_left_out_where_it_is_wrong(
    version: int | None, lengths: tuple[int, int], wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    seen = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()))
        return q

    monkeypatch.setattr(door.F, "scaled_dot_product_attention", attend)
    with FakeTensorMode():
        q, k = (torch.empty(1, 1, length, 16, device="cuda", dtype=torch.bfloat16) for length in lengths)
        ops.attention(q, k, k, fused="sdpa")
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert seen == [(before and not wrong, True, True)]


def test_the_choice_is_logged_with_its_reasons(install, caplog: pytest.LogCaptureFixture) -> None:
    door._ATTENTION._logged.clear()
    q = torch.ones(1, 1, 2, 8)
    with caplog.at_level(logging.INFO, logger="vfmvae.ops"):
        for _ in range(2):
            ops.attention(q, q, q)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("attention: sdpa (triton: ")
    assert "flash-attn: the package flash-attn is not installed" in caplog.messages[0]
