"""Prints what can run fast here: every accelerated part, found or not, and what is used instead.

Packages are imported in processes of their own, so one that is broken, or even crashes, becomes a row of the
table. The exit code is 0: nothing in the table is required.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vfmvae
from vfmvae.cli import command, parse

State = Literal["yes", "no", "broken"]
COLOURS: dict[State, str] = {"yes": "green", "no": "yellow", "broken": "red"}
IMPORT_TIMEOUT_S = 120
CPU_INSTEAD = "plain PyTorch operations"
CUDA_INSTEAD = "Triton or plain PyTorch operations"
CUDNN_RIGHT_FROM, CUDNN_BLOCK = 91501, 128
"""As in vfmvae/ops/attention.py, which is not imported here: PyTorch imports Triton with it."""
NO_DEVICE = "unused: there is no CUDA device"

# Prints "yes" and the version, "no" if the module is not installed, or "broken" and the error's first line.
IMPORT_PROGRAM = """
import importlib, sys

def report(kind, error, _):
    missing = kind is ModuleNotFoundError and (wanted + ".").startswith(error.name + ".")
    line = f"{kind.__name__}: {str(error).strip()}".splitlines()[0]
    print("no" if missing else "broken " + line)

wanted = sys.argv[1]
sys.excepthook = report
module = importlib.import_module(wanted)
package = importlib.import_module(wanted.partition(".")[0])
print("yes", getattr(module, "__version__", None) or getattr(package, "__version__", ""))
"""


# The choice imports packages, too. Prints "yes" and `attention_choices` as JSON, or "broken" and the error.
ATTENTION_PROGRAM = """
import json, sys

def report(kind, error, _):
    print("broken", f"{kind.__name__}: {str(error).strip()}".splitlines()[0])

sys.excepthook = report
import torch
from vfmvae.ops import attention_choices

on_gpu = torch.cuda.is_available()
device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
print("yes", json.dumps(attention_choices(torch.device(device), dtype, dtype)))
"""


@dataclass(frozen=True)
class Package:
    """An optional package: what it is called, the module that is imported, and what runs without it."""

    name: str
    module: str
    instead: str
    used: bool = False
    """Whether anything here calls it yet."""


PACKAGES = (
    Package("Triton", "triton", CPU_INSTEAD, used=True),
    Package("flash-attn 2", "flash_attn.flash_attn_interface", "other attention", used=True),
    Package("flash-attn 3", "flash_attn_interface", "other attention", used=True),
    Package("flash-attn 4", "flash_attn.cute", "other attention", used=True),
    Package("xformers", "xformers.ops", "other attention", used=True),
    Package("apex", "apex.optimizers", "torch.optim"),
    Package("DALI", "nvidia.dali", "Pillow on the CPU"),
)


@dataclass(frozen=True)
class Part:
    """One row: `note` says what is used instead, or why the part does not work."""

    name: str
    state: State
    version: str
    note: str


@dataclass
class Doctor:
    """Say what can run fast here, and what is used instead of the rest. Example: python -m vfmvae.doctor"""


def inspect_parts() -> list[Part]:
    """Every row of the table, in its order."""
    triton, *others = (inspect_package(package) for package in PACKAGES)
    return [triton, *inspect_extension(), *others, inspect_cudnn_attention()]


def inspect_package(package: Package) -> Part:
    state, line = _import_elsewhere(package.module)
    if state == "no":
        return Part(package.name, state, "", package.instead)
    if state == "broken":
        return Part(package.name, state, "", f"{line}; {package.instead}")
    if not package.used:
        return Part(package.name, state, line, f"not used yet: {package.instead}")
    return Part(package.name, state, line, "" if torch.cuda.is_available() else NO_DEVICE)


def inspect_extension() -> list[Part]:
    """The two halves of vfmvae._C."""
    cpu, cuda = "vfmvae._C (CPU)", "vfmvae._C (CUDA)"
    state, line = _import_elsewhere("vfmvae._C")
    if state == "no":
        return [Part(cpu, state, "", CPU_INSTEAD), Part(cuda, state, "", CUDA_INSTEAD)]
    if state == "broken":
        return [Part(cpu, state, "", line), Part(cuda, state, "", line)]
    from vfmvae import _C

    compiler, _, toolkit = _C.build_info.partition(", ")
    parts = [Part(cpu, "yes", compiler, "")]
    if not _C.with_cuda:
        return [*parts, Part(cuda, "no", "", CUDA_INSTEAD)]
    if not torch.cuda.is_available():
        return [*parts, Part(cuda, "yes", toolkit, NO_DEVICE)]
    objection = _C.cuda_objection(torch.cuda.current_device())
    return [*parts, Part(cuda, "broken" if objection else "yes", toolkit, objection)]


def inspect_cudnn_attention() -> Part:
    name, instead = "cuDNN attention", "PyTorch's other attention kernels"
    if not torch.backends.cudnn.is_available():
        return Part(name, "no", "", f"torch was built without cuDNN; {instead}")
    number = torch.backends.cudnn.version() or 0
    version = f"{number // 10_000}.{number % 10_000 // 100}.{number % 100}"
    if not torch.cuda.is_available():
        return Part(name, "yes", version, NO_DEVICE)
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return Part(name, "no", version, f"switched off in torch.backends.cuda; {instead}")
    if number < CUDNN_RIGHT_FROM:
        return Part(
            name, "yes", version, f"not used for tokens in other than multiples of {CUDNN_BLOCK}: wrong"
        )
    return Part(name, "yes", version, "")


def describe_machine() -> list[str]:
    """The lines above the table."""
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    lines = [
        f"vfmvae {vfmvae.__version__} in {Path(vfmvae.__file__).parent}",
        f"Python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__}, {cuda}; CPU: {cpu}",
    ]
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for index in gpus:
        properties = torch.cuda.get_device_properties(index)
        memory_gib = properties.total_memory / 2**30
        lines.append(
            f"GPU {index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory_gib:.0f} GiB"
        )
    if not gpus:
        lines.append("GPU: none; everything runs on the CPU")
    note = Path(vfmvae.__file__).with_name("_build.txt")
    lines.append(note.read_text(encoding="utf-8").strip() if note.is_file() else "vfmvae._C: never built")
    return lines


def print_report(console: Console) -> None:
    for line in describe_machine():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table("part", "found", "version", title="accelerated parts")
    table.add_column("used instead, or why not", overflow="fold")
    for part in inspect_parts():
        state = f"[{COLOURS[part.state]}]{part.state}[/]"
        table.add_row(escape(part.name), state, escape(part.version), escape(part.note))
    console.print(table)
    table = Table("where", "by", title="attention at full size")
    table.add_column("why not by what is tried first", overflow="fold")
    for use, (name, refused) in find_attention().items():
        table.add_row(use, name, escape("; ".join(f"{other}: {why}" for other, why in refused.items())))
    console.print(table)


def find_attention() -> dict[str, tuple[str, dict[str, str]]]:
    """What computes attention where, and the objections to what would come before it."""
    state, line = _run_elsewhere("choosing attention", ATTENTION_PROGRAM)
    return json.loads(line) if state == "yes" else {"everywhere": ("nothing", {state: line})}


def _import_elsewhere(module: str) -> tuple[State, str]:
    """What a new interpreter says of the module: its version, or the first line of the error."""
    return _run_elsewhere("importing it", IMPORT_PROGRAM, module)


def _run_elsewhere(what: str, program: str, *arguments: str) -> tuple[State, str]:
    """What a new interpreter says in its last line."""
    command = [sys.executable, "-c", program, *arguments]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "broken", f"{what} takes more than {IMPORT_TIMEOUT_S} s"
    if process.returncode < 0:
        return "broken", f"{what} ends the interpreter with signal {-process.returncode}"
    # Packages may print while they are imported: ours is the last line.
    state, _, line = (process.stdout.strip().splitlines() or [""])[-1].partition(" ")
    if state not in COLOURS:
        return "broken", f"{what} ends the interpreter with exit code {process.returncode}"
    return state, line


@command
def main() -> None:
    parse(Doctor, "doctor")
    print_report(Console())


if __name__ == "__main__":
    main()
