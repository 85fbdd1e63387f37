"""The GPU suite's plumbing with parts that are small programs: limits, children, summary, exit code."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.benchmarks.scripts import script
from tests.helpers import run_python

suite = script("gpu_suite")

FINE = "print('fine')"
BROKEN = "print('what is wrong'); raise SystemExit(3)"
# Its child ignores the request to end, as a kernel that does not return would.
SLOW = """
import pathlib, signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child])
pathlib.Path(sys.argv[1]).write_text(str(process.pid))
print("measured so far", flush=True)
time.sleep(60)
"""


def part(name: str, program: str, *arguments: str, limit_s: float = 30.0, correctness: bool = True):
    return suite.Part(name, [sys.executable, "-c", program, *arguments], limit_s, correctness)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "GRACE_S", 0.5)


def test_a_slow_part_is_ended_with_its_children_and_the_next_one_runs(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    chosen = [part("slow", SLOW, str(pid_file), limit_s=3.0), part("next", FINE)]
    start = time.monotonic()
    results = list(suite.run_all(chosen, tmp_path, 60.0))
    assert time.monotonic() - start < 20
    assert [r.status for r in results] == ["timed out", "passed"]
    assert 3.0 <= results[0].seconds < 10
    deadline = time.monotonic() + 5
    while alive(int(pid_file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(pid_file.read_text()))
    log = (tmp_path / "slow.log").read_text()
    assert "measured so far" in log and "timed out after" in log


def test_a_part_that_fails_or_is_no_program_does_not_stop_the_next(tmp_path: Path) -> None:
    absent = suite.Part("absent", ["/no/such/program"], 5.0)
    results = list(suite.run_all([part("broken", BROKEN), absent, part("fine", FINE)], tmp_path, 60.0))
    assert [r.status for r in results] == ["failed", "failed", "passed"]
    assert "/no/such/program" in (tmp_path / "absent.log").read_text()


def test_the_limit_of_all_parts_shortens_the_last_and_leaves_out_the_rest(tmp_path: Path) -> None:
    chosen = [part("slow", "import time; time.sleep(60)"), part("late", FINE)]
    results = list(suite.run_all(chosen, tmp_path, 6.0))
    assert [r.status for r in results] == ["timed out", "not run"]
    assert results[0].seconds < 12 and not results[1].seconds


@pytest.mark.parametrize(
    ("status", "correctness", "code"),
    [
        ("passed", True, 0),
        ("failed", True, 1),
        ("failed", False, 1),
        ("timed out", True, 1),
        ("timed out", False, 0),
        ("not run", True, 1),
        ("not run", False, 0),
    ],
)
def test_what_counts_as_failure(status: str, correctness: bool, code: int, tmp_path: Path) -> None:
    assert suite.Result("part", status, 1.0, correctness, tmp_path).counts_as_failure == bool(code)


def test_the_command_prints_logs_of_failures_and_a_summary_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [part("first", FINE), part("second", BROKEN), part("third", FINE, correctness=False)]
    monkeypatch.setattr(suite, "parts", lambda *_: chosen)
    common = ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert suite.main(common) == 1
    printed = capsys.readouterr().out
    assert "what is wrong" in printed and "fine\n" not in printed
    assert [line.split()[:2] for line in printed.splitlines()[-3:]] == [
        ["first", "passed"],
        ["second", "failed"],
        ["third", "passed"],
    ]
    summary = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert [row["status"] for row in summary["parts"]] == ["passed", "failed", "passed"]
    assert summary["date"] and summary["torch"] and summary["device"] == "cpu"
    assert suite.main([*common, "--only", "first,third"]) == 0
    with pytest.raises(SystemExit, match="unknown part fourth; known: first, second, third"):
        suite.main([*common, "--only", "fourth"])


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "describe_machine", lambda device: {"architecture": None})
    assert suite.main(["--output", str(tmp_path)]) == 2
    assert "There is no CUDA device here" in capsys.readouterr().out


def test_on_a_gpu_correctness_comes_first_and_the_kernels_are_sanitized(tmp_path: Path) -> None:
    found = suite.parts("cuda", tmp_path, "90a-real")
    assert [p.name for p in found[:4]] == ["build", "kernels", "engine", "graphs"]
    assert found[0].environment == {"VFMVAE_BUILD": "cuda", "VFMVAE_CUDA_ARCHS": "90a-real"}
    assert any("check_gated.py" in word for word in found[1].command)
    assert {"memcheck", "racecheck"} <= {p.name for p in found}
    for p in found:
        scripts = [word for word in p.command if word.endswith(".py")]
        assert all((suite.ROOT / name).is_file() for name in scripts), scripts


# Collects without running; the last line of what it prints is the names of the marked tests in each set.
# tests/kernels are marked where there is a GPU, so while they are imported there is one.
COLLECT = """
import json, sys
import pytest, torch

available = torch.cuda.is_available

def collect(arguments):
    class Marked:
        names = ()
        def pytest_collectstart(self, collector):
            torch.cuda.is_available = (lambda: True) if "check_" in collector.name else available
        def pytest_collection_finish(self, session):
            self.names = [item.nodeid for item in session.items if item.get_closest_marker("gpu")]
    marked = Marked()
    assert pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *arguments], [marked]) in (0, 5)
    return marked.names

print(json.dumps([collect(arguments) for arguments in json.loads(sys.argv[1])]))
"""


def test_every_test_that_needs_a_gpu_is_in_one_part(tmp_path: Path) -> None:
    commands = [p.command for p in suite.parts("cuda", tmp_path, "90a-real")]
    selections = [c[3:] for c in commands if c[1:3] == ["-m", "pytest"]]
    checks = sorted(str(path) for path in suite.ROOT.glob("tests/kernels/check_*.py"))
    printed = run_python("-c", COLLECT, json.dumps([["tests"], checks, *selections]), cwd=suite.ROOT)
    others, of_checks, *chosen = json.loads(printed.splitlines()[-1])
    assert all(any(Path(check).name in name for name in of_checks) for check in checks)
    everything = [*others, *of_checks]
    in_parts = Counter(name for names in chosen for name in names)
    assert in_parts == Counter(everything), in_parts - Counter(everything) or Counter(everything) - in_parts
