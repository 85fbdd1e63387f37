"""kernels.py, throughput.py and tables.py: floors, rows, what happens to a failing one, Markdown."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.scripts import script
from tests.helpers import ROOT, run_python

common, cases, kernels, throughput, tables = map(
    script, ("common", "cases", "kernels", "throughput", "tables")
)
CPU = torch.device("cpu")
# 10 bytes, 100 matrix operations or 20 multiply-adds per second.
CEILINGS = common.Ceilings(10.0, 100.0, 20.0)


def test_the_floor_is_the_longer_of_bytes_and_arithmetic() -> None:
    assert CEILINGS.floor_seconds(50, 100, "matrix") == 5
    assert CEILINGS.floor_seconds(50, 1000, "matrix") == 10
    assert CEILINGS.floor_seconds(50, 1000, "fma") == 50


def test_ceilings_are_measured() -> None:
    found = common.measure_ceilings(CPU, torch.float32)
    assert found.fma_flops == found.matrix_flops > 1e8 and found.copy_bytes_per_second > 1e8


def test_every_tensor_that_a_pass_needs_is_counted_once() -> None:
    case = cases.OPERATIONS["depthwise_conv2d"].build((2, 8, 6, 5), torch.bfloat16, CPU)
    y = case.function(*case.tensors, fused=False)
    image, weight, bias = 2 * 8 * 6 * 5 * 2, 8 * 49 * 4, 8 * 4
    assert case.moved_bytes(y) == {
        "forward": 2 * image + weight + bias,
        "inputs": 2 * image + weight,  # gradient in and out
        "backward": 3 * image + 2 * weight + bias,
    }
    assert case.flops == {"forward": 49 * image, "inputs": 49 * image, "backward": 98 * image}


def test_the_residuals_gradient_costs_nothing() -> None:
    case = cases.OPERATIONS["modulated_mlp"].build((1, 8, 4, 4), torch.float32, CPU)
    image, style, hidden = 8 * 16 * 4, 8 * 4, 32
    weights = 4 * (2 * hidden * 8 + hidden + 8 + 8)
    y = case.function(*case.tensors, fused=False)
    moved = case.moved_bytes(y)
    assert moved["forward"] == 3 * image + style + weights
    assert moved["inputs"] == 3 * image + 2 * style + weights
    assert moved["backward"] == 3 * image + 2 * style + 2 * weights


@pytest.mark.parametrize("label", cases.OPERATIONS)
def test_a_row_per_implementation(label: str) -> None:
    operation = cases.OPERATIONS[label]
    shape = operation.shapes["odd"][0]
    case = operation.build(shape, torch.float32, CPU)
    rows = list(kernels.race(case, operation.op.names(), common.Stopwatch(CPU), 1, CEILINGS))
    assert rows[-1]["implementation"] == "reference" and rows[-1]["forward_times_faster"] == 1
    for row in rows:
        for part in kernels.PASSES if case.differentiable else ("forward",):
            assert row[f"{part}_share"] == pytest.approx(row[f"{part}_floor_ms"] / row[f"{part}_ms"])
            assert row[f"{part}_bytes"] > 0 and row[f"{part}_flops"] > 0


def test_an_implementation_that_breaks_does_not_stop_the_others() -> None:
    case = cases.OPERATIONS["geglu"].build((1, 2, 3), torch.float32, CPU)
    geglu = case.function

    def broken(*tensors: torch.Tensor, fused: str) -> torch.Tensor:
        if fused == "broken":
            raise TypeError("an argument of the kernel\nis missing")
        return geglu(*tensors, fused=fused)

    case.function = broken
    rows = list(kernels.race(case, ["broken", "reference"], common.Stopwatch(CPU), 1, CEILINGS))
    assert rows[0] == {"implementation": "broken", "error": "TypeError: an argument of the kernel"}
    assert rows[1]["implementation"] == "reference"


def test_the_kernels_command_writes_its_rows(tmp_path: Path) -> None:
    output = tmp_path / "out" / "kernels-cpu.json"
    options = ["--device", "cpu", "--size", "demo", "--op", "geglu", "--repeats", "1", "--json", str(output)]
    run_python(str(ROOT / "benchmarks" / "kernels.py"), *options)
    result = json.loads(output.read_text())
    assert result["ceilings"].keys() == CEILINGS.as_dict().keys() and result["torch"] == torch.__version__
    assert {(row["op"], row["size"]) for row in result["rows"]} == {("geglu", "demo")}
    assert "geglu | 8 x 64 x 256 | reference" in tables.render_folder(output.parent)


def test_the_demo_s_arithmetic_is_as_counted() -> None:
    for task, flops in throughput.count_flops("demo").items():
        assert throughput.FLOPS["demo"][task] == pytest.approx(flops, rel=0.01)


def test_rows_of_one_side(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    before = {"config": "full", "name": "step", "path": "fused", "batch": 1, "images_per_second": 1.0}
    common.write_result(output, [before])
    options = argparse.Namespace(batch=1, dtype="fp32", json=output)
    assert throughput.measure(throughput.Side("demo", "fused"), options, CPU, CEILINGS)
    earlier, *rows = json.loads(output.read_text())
    assert earlier == before
    assert [row["name"] for row in rows] == ["encode", "decode", "step"]
    for row in rows:
        assert {k: row[k] for k in ("config", "path", "device", "dtype", "batch")} == {
            "config": "demo",
            "path": "fused",
            "device": "cpu",
            "dtype": "fp32",
            "batch": 1,
        }
        assert row["images_per_second"] > 0 and row["ceiling_share"] > 0 and row["date"]


def test_of_two_rounds_the_faster_row_stays(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    for rate, task in ((2.0, "step"), (1.0, "decode"), (1.0, "step"), (3.0, "decode")):
        throughput.add_row(output, {**rows_of("fused", rate, task), "batch": 1})
    rows = json.loads(output.read_text())
    assert [(row["name"], row["images_per_second"]) for row in rows] == [("step", 2.0), ("decode", 3.0)]


def test_half_the_batch_where_memory_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def build(side: object, dtype: str, device: torch.device, batch: int) -> object:
        batches.append(batch)
        raise torch.OutOfMemoryError("no memory") if batch > 2 else RuntimeError("another fault")

    monkeypatch.setattr(throughput, "build", build)
    options = argparse.Namespace(batch=8, dtype="bf16", json=tmp_path / "rows.json")
    assert not throughput.measure(throughput.Side("full", "reference"), options, CPU, CEILINGS)
    assert batches == [8, 4, 2]


def test_what_comes_first() -> None:
    on_gpu = throughput.sides("all", "cuda")
    assert on_gpu[:2] == [("full", "fused"), ("full", "reference")] and on_gpu[-1] == ("full", "compile")
    on_cpu = throughput.sides("all", "cpu")
    assert on_cpu[0] == ("demo", "fused") and ("full", "graphs") not in on_cpu
    assert throughput.sides("demo", "cpu") == [s for s in on_cpu if s.size == "demo"]


def test_a_side_that_takes_too_long_is_ended_and_the_file_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(throughput, "__file__", str(slow))
    options = argparse.Namespace(
        dtype="fp32", json=tmp_path / "r.json", device="cpu", batch=1, threads=1, minutes=1
    )
    assert throughput.measure_in_a_process(throughput.Side("full", "fused"), options, CEILINGS, 1.0)
    assert "full, fused: ended" in capsys.readouterr().out


def rows_of(path: str, rate: float, task: str = "step") -> dict[str, object]:
    row = {
        "name": task,
        "config": "full",
        "path": path,
        "dtype": "bf16",
        "batch": 8,
        "images_per_second": rate,
    }
    row |= {"peak_memory_bytes": 2**30, "ceiling_share": 0.5, "date": "2026-11-26", "device": "cuda"}
    return row | {"device_name": "A GPU", "torch": "2.11", **CEILINGS.as_dict()}


def test_the_table_of_throughput_has_the_ratios() -> None:
    rows = [rows_of("fused", 120.0), rows_of("reference", 30.0), rows_of("compile", 60.0)]
    table = tables.throughput_table([*rows, rows_of("fused", 9.0, "decode")])
    assert "2026-11-26, A GPU, torch 2.11" in table
    assert "| step, full, batch 8 | 30 | 60 | 120 | 4.00x | 2.00x | 1024 / 1024 / 1024 | 50.0% |" in table
    assert "| decode, full, batch 8 |  |  | 9 |  |  | - / - / 1024 | 50.0% |" in table


def test_a_table_replaces_the_one_between_its_markers() -> None:
    document = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nstays\n<!-- end -->\n"
    expected = "a\n<!-- one -->\n| new \\1 |\n<!-- end -->\nb\n<!-- two -->\nstays\n<!-- end -->\n"
    assert tables.replace_table(document, "one", "| new \\1 |\n") == expected
    with pytest.raises(ValueError, match="no <!-- three -->"):
        tables.replace_table(document, "three", "")


def test_the_document_has_a_place_for_every_table_of_the_suite(tmp_path: Path) -> None:
    document = tables.DOCUMENT.read_text()
    for part in script("gpu_suite").parts("cuda", tmp_path, "90a-real"):
        for name in re.findall(r"((?:kernels|throughput)[\w-]*)\.json", " ".join(part.command)):
            tables.replace_table(document, name, "")


def test_what_runs_on_a_gpu_needs_neither_tyro_nor_rich(tmp_path: Path) -> None:
    for name in ("tyro", "rich"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')\n")
    folders = [str(tmp_path), str(ROOT / "benchmarks"), str(ROOT)]
    modules = "kernels, throughput, diffusion, tables, gpu_suite"
    run_python("-c", f"import {modules}", env={"PYTHONPATH": ":".join(folders)})


@pytest.mark.parametrize("rich", [True, False])
def test_a_table_is_printed_with_rich_and_without(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)  # importing it raises
    common.print_table("ms", ("op", "forward"), [("geglu", "0.1 (2x)"), ("group_norm", "[broken]")])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == "ms"
    for cells in (("op", "forward"), ("geglu", "0.1 (2x)"), ("group_norm", "[broken]")):
        assert any(all(cell in line for cell in cells) for line in lines), cells
    if not rich:
        assert lines[1] == "geglu       0.1 (2x)"
