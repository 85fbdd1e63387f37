"""The report page, parsed: what it shows of complete, running, damaged and empty runs."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import run_python
from vfmvae import report
from vfmvae.report import page
from vfmvae.report_data import MAX_PICTURES, charts, first_and_last, pictures, read_run, short_names, stages
from vfmvae.training.figures import write_figure

pytest.importorskip("plotly")

TRAIN = {"images_per_second": 5.0, "interval_s": 2.0, "peak_memory_gib": 1.5, "skipped_steps": 0}


def line(kind: str, step: int, stage: str = "only", **values: Any) -> dict[str, Any]:
    common = TRAIN if kind == "train" else {}
    return {"kind": kind, "step": step, "seen_images": 10 * step, "stage": stage} | values | common | values


def make_run(folder: Path, lines: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"seed": 0}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    return folder


LINES = [
    line("start", 0, device="cpu", torch="2", total_images=80, time="2026-01-02T03:04:05+00:00"),
    line("eval", 0, psnr=9.0),
    line("train", 2, "first", l1=1.0, learning_rate_tokenizer=0.1),
    line("train", 3, "second", l1=None, adversarial=0.5, learning_rate_tokenizer=0.1, skipped_steps=2),
    line("train", 4, "second", adversarial=0.75, learning_rate_tokenizer=0.05),
    line("train", 6, "second", l1=0.25, learning_rate_tokenizer=0.05),
    line("eval", 6, psnr=20.5),
]


class Page(HTMLParser):
    """A page's text outside of scripts, its tables' rows, its data, and every address in it."""

    VOID = {"meta", "input", "img", "br"}

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.data: dict[str, Any] = {}
        self.feed(content)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, text: str) -> None:
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script" and attributes.get("id") == "data":
            self.data = json.loads(text)
        elif tag in ("td", "th"):
            self.rows[-1][-1] += text
        elif tag in ("h1", "h2"):
            self.headings.append(text)

    def row(self, name: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row[0] == name)
        return found


def parsed(*folders: Path) -> Page:
    return Page(page([read_run(*pair) for pair in zip(folders, short_names(folders), strict=True)]))


def test_every_quantity_becomes_a_chart_of_its_section(tmp_path: Path) -> None:
    found = {
        (c["section"], c["title"]): c["series"]
        for c in charts([read_run(make_run(tmp_path / "a", LINES), "a")])
    }
    assert set(found) == {
        ("evaluation", "PSNR (dB)"),
        ("losses", "l1"),
        ("losses", "adversarial"),
        ("rates", "tokenizer"),
        ("speed", "images/s"),
        ("speed", "peak memory (GiB)"),
        ("speed", "skipped steps per interval"),
    }
    assert found["evaluation", "PSNR (dB)"] == [{"run": 0, "x": [0, 60], "y": [9.0, 20.5]}]
    # Not finite at 30, absent at 40: both are gaps. A loss begins and ends where it is there.
    assert found["losses", "l1"] == [{"run": 0, "x": [20, 30, 40, 60], "y": [1.0, None, None, 0.25]}]
    assert found["losses", "adversarial"] == [{"run": 0, "x": [30, 40], "y": [0.5, 0.75]}]


def test_a_loss_with_the_name_of_a_metric_is_told_apart(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [line("train", 1, ssim=0.5), line("eval", 1, ssim=0.75)]), "a")
    shown = [(c["section"], c["title"], c["series"][0]["y"]) for c in charts([run])]
    assert shown[:2] == [("evaluation", "SSIM", [0.75]), ("losses", "ssim", [0.5])]
    assert first_and_last([run]) == {"SSIM, evaluation": [(0.75, 0.75)], "ssim": [(0.5, 0.5)]}


def test_without_skipped_steps_there_is_no_chart_of_them(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [line("train", 1, l1=0.0)]), "a")
    assert [chart["title"] for chart in charts([run])] == ["l1", "images/s", "peak memory (GiB)"]


def test_stages_begin_where_the_one_before_ended(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", LINES), "a")
    assert stages(run) == [{"name": "first", "begins": 0}, {"name": "second", "begins": 20}]


def test_lines_come_in_order_and_the_last_of_a_moment_counts(tmp_path: Path) -> None:
    lines = [line("train", 4, l1=4.0), line("train", 2, l1=9.0), line("train", 2, l1=2.0)]
    run = read_run(make_run(tmp_path / "a", lines), "a")
    assert [x["l1"] for x in run.train] == [2.0, 4.0]


def test_the_tables_of_one_run(tmp_path: Path) -> None:
    config = {
        "seed": 7,
        "tokenizer": {"layers": [0, 3, -1], "fused": True},
        "stages": [{"name": "warm up", "images": 20, "l1": 1.0}, {"name": "main", "images": 60, "l1": 1.0}],
    }
    found = parsed(make_run(tmp_path / "demo", LINES, config))
    assert found.headings[0] == "demo"
    assert found.row("images seen") == ["60 of 80 (75%)"]
    assert found.row("steps") == ["6"]
    assert found.row("stages") == ["first, second (from 20)"]
    assert found.row("training time") == ["0:00:08"]
    assert found.row("skipped steps") == ["2"]
    assert found.row("started") == ["2026-01-02 03:04 UTC"]
    assert found.row("PSNR (dB), evaluation") == ["9", "20.5"]
    assert found.row("l1") == ["1", "0.25"]
    assert found.row("images") == ["20", "60"], "in what the stages differ"
    assert found.row("tokenizer.layers") == ["0, 3, -1"]
    assert found.row("tokenizer.fused") == ["true"]
    assert found.row("stages[1].name") == ["main"]
    assert found.row("device") == ["cpu"]
    assert found.data["images"] == 60 and found.data["stages"][1]["begins"] == 20


def test_runs_are_compared_by_curve_and_by_what_differs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", LINES, {"seed": 0, "rate": 0.1})
    other = make_run(tmp_path / "other", [line("train", 9, l1=3.0)], {"seed": 1, "rate": 0.1})
    found = parsed(one, other)
    assert found.headings[0] == "one, other"
    assert [run["name"] for run in found.data["runs"]] == ["one", "other"]
    l1 = next(chart for chart in found.data["charts"] if chart["title"] == "l1")
    assert [(series["run"], series["y"][-1]) for series in l1["series"]] == [(0, 0.25), (1, 3.0)]
    assert found.row("PSNR (dB), evaluation") == ["9", "20.5", "", ""]
    assert found.data["stages"] == [], "only one run's stages would be drawn over the other's curves"
    assert found.data["images"] == 90
    names = [row[0] for row in found.rows]
    assert (names.count("seed"), names.count("rate")) == (2, 1), "what differs stands above all fields"


def test_runs_of_one_name_are_told_apart() -> None:
    assert short_names([Path("a/demo"), Path("b/demo")]) == ["a/demo", "b/demo"]


def test_the_page_needs_no_other_file_and_nothing_in_it_breaks_out(tmp_path: Path) -> None:
    name = "<b>&{{body}}"
    hostile = [line("train", 1, "</script><script>alert(1)", l1=1.0)]
    folder = make_run(tmp_path / name, hostile, {"<u>": "<i>{{plotly}}</i>"})
    write_figure(folder, 10, *torch.zeros(2, 1, 3, 64, 64, dtype=torch.uint8))
    found = parsed(folder)
    assert found.headings[0] == name
    assert found.data["stages"][0]["name"] == "</script><script>alert(1)"
    assert found.row("<u>") == ["<i>{{plotly}}</i>"]
    assert found.addresses == []


def test_pictures_of_a_long_run_are_thinned_evenly_and_damaged_ones_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", LINES)
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for step in range(2 * MAX_PICTURES - 1):
        damaged = write_figure(folder, step, image, image)
    found = parsed(folder)
    assert [p["seen_images"] for p in found.data["pictures"][0]] == list(range(0, 2 * MAX_PICTURES - 1, 2))
    assert found.data["pictures"][0][0]["source"].startswith("data:image/webp;base64,UklGR")
    damaged.write_bytes(damaged.read_bytes()[:60])
    assert len(pictures(read_run(folder, "a"))) == MAX_PICTURES - 1


def test_a_run_that_is_being_written_or_has_just_begun_is_shown(tmp_path: Path) -> None:
    running = make_run(tmp_path / "running", LINES[:3])
    with open(running / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4, "seen_')
    assert parsed(running).row("images seen") == ["20 of 80 (25%)"]
    begun = make_run(tmp_path / "begun", [])
    (begun / "metrics.jsonl").unlink()
    found = parsed(begun)
    assert found.row("last written") == ["nothing yet"] and found.data["charts"] == []
    os.remove(running / "config.json")
    assert "Configuration" in parsed(running).headings


def test_the_command_writes_into_the_run_folder_or_where_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", LINES)
    assert run_python("-m", "vfmvae.report", str(folder)).strip() == str(folder / "report.html")
    assert sorted(os.listdir(folder)) == ["config.json", "metrics.jsonl", "report.html"]
    output = tmp_path / "new" / "page.html"
    run_python("-m", "vfmvae.report", str(folder), str(folder), "--output", str(output))
    assert "<title>" in output.read_text(encoding="utf-8")


def test_folders_without_a_run_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        read_run(tmp_path, "a")
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package plotly, .* pip install plotly"):
        page([read_run(make_run(tmp_path / "a", LINES), "a")])
