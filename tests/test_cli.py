"""The command line: expected mistakes are one line and an exit code, on both ways in."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

import vfmvae.cli
from tests.helpers import ROOT, run_python
from vfmvae.cli import COMMANDS, UsageError, command, parse


def raising(error: BaseException) -> Callable[[], None]:
    @command
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("steps is 0"), "error: steps is 0"),
        (FloatingPointError("loss is not finite"), "error: loss is not finite"),
        (OSError("could not write x: full"), "error: could not write x: full"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"),
            "error: a.json: No such file or directory",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
    ],
)
def test_expected_mistakes_are_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        raising(error)()
    assert ended.value.code == 1
    assert capsys.readouterr().err == line + "\n"


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        raising(KeyError("bug"))()


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raising(UsageError("share is 2/2"))()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: share is 2/2\n"


@dataclass
class Inner:
    depth: int = 1
    width: int = 2

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}")


@dataclass
class Options:
    """Example: this"""

    name: str = "x"
    inner: Inner = field(default_factory=Inner)
    fast: bool = False


def parse_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Options:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    return parse(Options, "command")


def test_options_become_the_dataclass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_with(monkeypatch, "--inner.depth", "3", "--fast") == Options(inner=Inner(3), fast=True)
    assert parse(Options, "command", arguments=[], default=Options("y")) == Options("y")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--speed", "3"], "unknown option --speed; options: --help, --name, --fast, --inner.* ("),
        (["--nmae=3"], "unknown option --nmae; did you mean --name? options: --help, --name, --fast"),
        (["--inner.size", "3"], "unknown option --inner.size; options: --inner.depth, --inner.width ("),
        (["stray"], "unknown argument stray; options: --help, --name"),
    ],
)
def test_unknown_options_list_the_known_ones(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as found:
        parse_with(monkeypatch, *arguments)
    assert str(found.value).startswith(sentence)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [["--inner.depth", "0"], ["--inner.depth", "deep"], ["--speed"]])
def test_nothing_begins_after_wrong_usage(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(lambda: print(parse_with(monkeypatch, *arguments)))()
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "") and captured.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_shows_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vfmvae", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        vfmvae.cli.main()
    assert ended.value.code == 0
    assert f"python -m vfmvae.{name}" in capsys.readouterr().out.partition("Example: ")[2]


def test_the_version_needs_no_torch() -> None:
    program = (
        "import sys; from vfmvae.cli import main; sys.argv = ['vfmvae', '--version']; main();"
        " assert 'torch' not in sys.modules"
    )
    assert run_python("-c", program) == f"vfmvae {vfmvae.__version__}\n"


def test_an_interrupt_is_130() -> None:
    with pytest.raises(SystemExit) as ended:
        raising(KeyboardInterrupt())()
    assert ended.value.code == 130


def test_development_mode_shows_where_an_error_comes_from() -> None:
    program = "from vfmvae.cli import command\n@command\ndef main(): int('x')\nmain()"
    quiet = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    loud = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (quiet.returncode, quiet.stderr.count("\n")) == (1, 1)
    assert "Traceback" in loud.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "from vfmvae.cli import command\n@command\ndef main(): print('line')\nmain()"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=buffered,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vfmvae", *arguments])
    vfmvae.cli.main()
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in COMMANDS)


def test_unknown_commands_are_usage_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vfmvae", "trian"])
    with pytest.raises(SystemExit) as ended:
        vfmvae.cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: unknown command 'trian'; known: {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_function(name: str) -> None:
    module = ROOT / "vfmvae" / name / "__main__.py"
    module = module if module.exists() else ROOT / "vfmvae" / f"{name}.py"
    assert "\ndef main() -> None:" in module.read_text()


def test_the_console_script_passes_its_arguments_on() -> None:
    program = "import sys; from vfmvae.cli import main; sys.argv[0] = 'vfmvae'; main()"
    assert run_python("-c", program, "train", "--dry-run", "--seed=5") == run_python(
        "-m", "vfmvae.train", "--dry-run", "--seed=5"
    )


def test_names_that_are_no_text_are_printed() -> None:
    code = """
import sys
from vfmvae.cli import command
sys.stdout.reconfigure(encoding="utf-8", errors="strict")
command(lambda: print("caf\\udce9.png"))()
"""
    assert run_python("-c", code).strip() == "caf\\udce9.png"
