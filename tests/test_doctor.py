"""The doctor's table with packages present, absent and broken; each case is an interpreter of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, run_python
from vfmvae import doctor as doctor_module

# Hides modules as if they were not installed. Python runs a file of this name when it starts.
SITECUSTOMIZE = """
import os
from importlib.machinery import PathFinder

hidden = os.environ["HIDDEN_MODULES"].split(",")
find_spec = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name in hidden else find_spec(name, path, target)
)
"""


@pytest.fixture
def doctor(tmp_path: Path):
    """Runs the doctor with the given modules hidden and the given fake packages (name -> source) in front."""

    def run(hidden: tuple[str, ...] = ("none",), fakes: dict[str, str] | None = None) -> dict[str, str]:
        (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
        for name, source in (fakes or {}).items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(source)
        environment = {
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "HIDDEN_MODULES": ",".join(hidden),
            "COLUMNS": "250",
        }
        output = run_python("-m", "vfmvae.doctor", cwd=tmp_path, env=environment)
        rows = [line.strip("│ ").split("│") for line in output.splitlines() if line.startswith("│")]
        table = {row[0].strip(): " | ".join(cell.strip() for cell in row[1:]) for row in rows}
        return {"head": output.split("accelerated parts")[0], **table}

    return run


def test_every_part_has_a_row_and_the_machine_is_described(doctor) -> None:
    report = doctor()
    parts = {"Triton", "vfmvae._C (CPU)", "vfmvae._C (CUDA)", "xformers", "apex", "DALI", "cuDNN attention"}
    parts |= {"flash-attn 2", "flash-attn 3", "flash-attn 4", "encoder", "fusion", "decoder", "head"}
    assert parts == set(report)
    for word in ("vfmvae 0.", "Python 3.", "torch 2.", "GPU", "vfmvae._C: "):
        assert word in report["head"], report["head"]


def test_absent_parts_name_what_is_used_instead(doctor) -> None:
    hidden = ("triton", "vfmvae._C", "flash_attn", "flash_attn_interface", "xformers", "apex", "nvidia.dali")
    report = doctor(hidden=hidden)
    assert report["Triton"].startswith("no |") and "plain PyTorch" in report["Triton"]
    assert report["vfmvae._C (CPU)"].startswith("no |") and "plain PyTorch" in report["vfmvae._C (CPU)"]
    assert report["vfmvae._C (CUDA)"].startswith("no |")
    for number in (2, 3, 4):
        assert report[f"flash-attn {number}"].startswith("no |")
    for where in ("encoder", "fusion", "decoder"):
        assert report[where].startswith("sdpa | triton: the package triton is not installed; flash-attn: ")
        assert "the package xformers is not installed" in report[where]
    assert "torch.optim" in report["apex"] and "Pillow" in report["DALI"]


def test_present_broken_and_crashing_packages(doctor) -> None:
    report = doctor(
        fakes={
            "flash_attn": 'raise OSError("libcudart.so.99: no such file\\nsecond line")',
            "xformers": '__version__ = "9.8.7"',
            "xformers/ops": "",
            "apex": "import os; os.abort()",
            "triton": "print('hello'); raise SystemExit(3)",
        }
    )
    assert report["xformers"].startswith("yes | 9.8.7")
    for number in (2, 4):
        assert "broken" in report[f"flash-attn {number}"]
        assert "OSError: libcudart.so.99: no such file; other attention" in report[f"flash-attn {number}"]
        assert "second line" not in report[f"flash-attn {number}"]
    assert report["flash-attn 3"].startswith("no |")
    assert "broken" in report["apex"] and "signal 6" in report["apex"]
    assert "broken" in report["Triton"] and "exit code 3" in report["Triton"]
    if not torch.cuda.is_available():  # where Triton is asked whether it is its interpreter
        assert "choosing attention ends the interpreter with exit code 3" in report["everywhere"]


def test_all_packages_for_attention_where_there_is_no_device_for_them(doctor) -> None:
    names = ("flash_attn", "flash_attn/flash_attn_interface", "flash_attn/cute", "flash_attn_interface")
    report = doctor(fakes=dict.fromkeys((*names, "xformers", "xformers/ops"), '__version__ = "9.8.7"'))
    for name in ("flash-attn 2", "flash-attn 3", "flash-attn 4", "xformers"):
        assert report[name].startswith("yes | 9.8.7")
    if not torch.cuda.is_available():
        for where in ("encoder", "fusion", "decoder"):
            assert report[where].startswith("sdpa | ")
            assert report[where].count("the tensor is on cpu, not on a CUDA device") >= 2


def test_it_knows_which_cudnn_is_not_used() -> None:
    attention = importlib.import_module("vfmvae.ops.attention")
    assert doctor_module.CUDNN_RIGHT_FROM == attention.CUDNN_RIGHT_FROM
    assert doctor_module.CUDNN_BLOCK == attention.CUDNN_BLOCK


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vfmvae.doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_help_shows_an_example() -> None:
    process = run_doctor("--help")
    assert process.returncode == 0 and "Example: python -m vfmvae.doctor" in process.stdout
    assert "accelerated parts" not in process.stdout


@pytest.mark.parametrize("argument", ["--verbose", "everything"])
def test_unknown_arguments_are_refused(argument: str) -> None:
    process = run_doctor(argument)
    assert process.returncode == 2 and f"{argument}; options: --help" in process.stderr
    assert process.stdout == ""


def test_another_package_of_the_same_name_is_not_taken_for_the_part(doctor) -> None:
    assert doctor(fakes={"apex": ""})["apex"].startswith("no |")
