"""Everything that wants a GPU, in one command: build, correctness, speed. Run it first wherever there is one.

    python benchmarks/gpu_suite.py                               all parts, 8 minutes at most
    python benchmarks/gpu_suite.py --only build,kernels --output results
    python benchmarks/gpu_suite.py --device cpu --only speed     a dry run without a GPU

It needs torch, Triton, nvcc, cmake, ninja, pybind11, pytest and what `vfmvae` imports, but no network, no pip
and no tyro. The parts run in the order of `parts`, each in a process group of its own that is ended at the
part's limit, so a slow one loses nothing of the rest. Every part leaves NAME.log in the output folder;
benchmarks leave their JSON, row by row; suite.json says what ran where. The tables of docs/performance.md
come from these files (tables.py). A new operation joins by a row in kernels.py and a test, not by a script.

Exit code: 0; 1 if a part failed, or a correctness part did not end in time; 2 without a GPU. A benchmark that
ran out of time is no failure: what it measured is written.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "numpy", "timm", "filelock", "safetensors", "huggingface_hub", "PIL")
NEEDED += ("yaml", "skimage", "scipy", "pytest", "pybind11", "setuptools")
GRACE_S = 5.0
"""Between asking a part to end and ending it."""
LEAST_S = 5.0
"""A part that would get less is not begun."""


@dataclass(frozen=True)
class Part:
    """One command with its limit in seconds."""

    name: str
    command: Sequence[str]
    limit_s: float
    correctness: bool = True
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    name: str
    status: str
    """passed, failed, timed out or not run."""
    seconds: float
    correctness: bool
    log: Path

    @property
    def counts_as_failure(self) -> bool:
        return self.status == "failed" or (self.correctness and self.status != "passed")


def parts(device: str, output: Path, architecture: str | None) -> list[Part]:
    """The suite, most important first. `architecture`: the GPU's, in CMake's notation; None on a CPU."""
    cuda = architecture is not None
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    building = {"VFMVAE_BUILD": "cuda" if cuda else "cpu", "VFMVAE_CUDA_ARCHS": architecture or ""}
    checks = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/check_*.py"))
    kernels = tests(*checks, *OPERATIONS, select=GPU) if cuda else tests(*checks, select=())
    engine = tests(*ENGINE, select=GPU, limit_s=100)
    graphs = tests(*GRAPHS, select=GPU, limit_s=100)
    # Left out is what starts tests/kernels once more; Triton 3.6's interpreter fails with numpy from 2.4 on.
    others = tests(*OPERATIONS, select=("-m", "not gpu", "-k", "not on_the_gpu and not in_the_interpreter"))
    size = ["--dtype", "bf16", "--size", "full"] if cuda else ["--size", "demo", "--repeats", "2"]
    speed = benchmark("kernels", f"kernels-{device}", device, output, *size)
    compared = benchmark("kernels", f"kernels-compile-{device}", device, output, *size, "--compile")
    images = ["--minutes", "2"] if cuda else ["--config", "demo"]
    throughput = benchmark("throughput", f"throughput-{device}", device, output, *images)
    updates = benchmark("optimizer", f"optimizer-{device}", device, output)
    tiny = [] if cuda else ["--size", "tiny", "--repeats", "1"]
    diffusion = benchmark("diffusion", f"diffusion-{device}", device, output, *tiny)
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or the next tensor hides a write past the end
    table = [
        Part("build", build, 150, environment=building),
        Part("kernels", kernels, 200, environment=ONE_THREAD | ({} if cuda else {"TRITON_INTERPRET": "1"})),
        Part("engine", engine, 120, environment=ONE_THREAD),
        Part("graphs", graphs, 120, environment=ONE_THREAD),
        Part("speed", speed, 60, correctness=False),
        Part("throughput", throughput, 150, correctness=False),
        Part("optimizer", updates, 40, correctness=False),
        Part("memcheck", sanitizer("memcheck"), 60, environment=uncached),
        Part("racecheck", sanitizer("racecheck"), 60, environment=uncached),
        Part("compile", compared, 120, correctness=False),
        Part("diffusion", diffusion, 180, correctness=False),
        Part("operations", others, 120, environment=ONE_THREAD),
    ]
    return table if cuda else [part for part in table if part.name not in NEED_A_GPU]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # several test processes share the CPU
NEED_A_GPU = ("engine", "memcheck", "racecheck", "graphs", "compile")
GPU = ("-m", "gpu")
OPERATIONS = ("tests/ops", "tests/csrc")
ENGINE = ("tests/tokenizer/test_decoder_graph.py", "tests/test_train_job.py", "tests/test_fused_run.py")
ENGINE += tuple(
    f"tests/training/test_{name}.py" for name in ("checkpoint", "device", "draws", "ema", "optim")
)
GRAPHS = ("tests/test_train_graphs.py",)
"""Files, not all of tests/, as those of the command lines need what a GPU machine may lack;
tests/benchmarks/test_gpu_suite.py sees to it that every test marked gpu is in one part."""


def tests(*files: str, select: Sequence[str], limit_s: float = 60) -> list[str]:
    """The pytest command: in several processes where pytest-xdist is installed, so that a kernel that breaks
    its process's CUDA context does not take the other tests with it. `limit_s`: of one test."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--continue-on-collection-errors", *select, "-p", "tests.lost_context"]
    if find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(6, (os.cpu_count() or 2) // 2)))]
    if find_spec("pytest_timeout") is not None:
        command += ["--timeout", str(limit_s), "--timeout-method", "thread"]
    return [*command, *files]


def benchmark(name: str, result: str, device: str, output: Path, *options: str) -> list[str]:
    """One of benchmarks/, which writes RESULT.json as it goes."""
    to_file = ["--device", device, "--json", str(output / f"{result}.json")]
    return [sys.executable, f"benchmarks/{name}.py", *options, *to_file]


def sanitizer(tool: str) -> list[str]:
    """compute-sanitizer around the kernels of csrc/ at small odd shapes; PyTorch's own are passed over."""
    places = [None, "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    program = next((p for place in places if (p := shutil.which("compute-sanitizer", path=place))), None)
    options = ["--error-exitcode", "9", "--report-api-errors", "no", "--target-processes", "all"]
    options += ["--kernel-name", "kernel_substring=vfmvae"]
    script = [sys.executable, "benchmarks/kernels.py", "--exercise", "cuda"]
    return [program or "compute-sanitizer", "--tool", tool, *options, *script]


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"not installed here: {', '.join(missing)}; what needs them will fail", flush=True)
    where = describe_machine(options.device)
    if options.device == "cuda" and where["architecture"] is None:
        print("There is no CUDA device here; --device cpu tries the suite's plumbing without one.")
        return 2
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    chosen = select(parts(options.device, output, where["architecture"]), options.only)
    results: list[Result] = []
    for result in run_all(chosen, output, 60 * options.minutes):
        results.append(result)
        write_summary(output / "suite.json", where, results)
    write_tables(output)
    show(results, where)
    return int(any(result.counts_as_failure for result in results))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_suite.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of all parts together (8)")
    parser.add_argument("--only", default="", metavar="PART,PART", help="these parts alone")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_suite", metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args(arguments)


def select(found: list[Part], only: str) -> list[Part]:
    """The parts named in "a,b", in the suite's order; all for ""."""
    wanted = [name for name in only.split(",") if name]
    known = [part.name for part in found]
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"unknown part {', '.join(unknown)}; known: {', '.join(known)}")
    return [part for part in found if not wanted or part.name in wanted]


def run_all(chosen: Sequence[Part], output: Path, limit_s: float) -> Iterator[Result]:
    """Runs the parts one after another, none beyond `limit_s` from now; yields each result as it is there."""
    end = time.monotonic() + limit_s
    for part in chosen:
        left = end - time.monotonic()
        log = output / f"{part.name}.log"
        if left < min(LEAST_S, part.limit_s):
            log.write_text("no time was left\n", encoding="utf-8")
            yield Result(part.name, "not run", 0.0, part.correctness, log)
            continue
        print(f"{part.name} ...", flush=True)
        result = run(part, log, min(part.limit_s, left))
        print(f"{part.name}: {result.status}, {result.seconds:.0f} s", flush=True)
        yield result


def run(part: Part, log: Path, limit_s: float) -> Result:
    """Runs one part; at the limit its whole process group is asked to end, then ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **part.environment}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        print("$", *part.command, file=out, flush=True)
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            print(error, file=out)
            return Result(part.name, "failed", time.monotonic() - start, part.correctness, log)
        try:
            code = process.wait(limit_s)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
            signal_group(process, signal.SIGINT)  # pytest then says what failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            signal_group(process, signal.SIGKILL)  # what the part may have left running, too
            process.wait()
        print(f"{status} after {time.monotonic() - start:.1f} s (limit {limit_s:.0f} s)", file=out)
    return Result(part.name, status, time.monotonic() - start, part.correctness, log)


def signal_group(process: subprocess.Popen[Any], which: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, which)


def describe_machine(device: str) -> dict[str, Any]:
    """Date, card and versions. Torch is asked in another process: this one must hold no GPU memory."""
    program = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "architecture": None}
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    pass
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if (major, minor) == (9, 0) else ""
    found["architecture"] = f"{major}{minor}{suffix}-real"
    found["card"] = torch.cuda.get_device_name()
    found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
print(json.dumps(found))
"""
    where: dict[str, Any] = {"date": datetime.date.today().isoformat(), "device": device}
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise SystemExit(f"torch cannot be asked about this machine:\n{asked.stderr}")
    where |= json.loads(asked.stdout.splitlines()[-1])
    if device == "cpu":
        where["architecture"] = None
    for name, command in {
        "nvcc": [shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"],
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
    }.items():
        with contextlib.suppress(OSError):
            lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
            where[name] = lines[-1].strip() if lines else None
    return where


def write_summary(path: Path, where: dict[str, Any], results: Sequence[Result]) -> None:
    rows = [
        {"part": r.name, "status": r.status, "seconds": round(r.seconds, 1), "correctness": r.correctness}
        for r in results
    ]
    path.write_text(json.dumps({**where, "parts": rows}, indent=2) + "\n", encoding="utf-8")


def write_tables(output: Path) -> None:
    """tables.md from the JSON in the output folder, as far as there is any."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    tables = importlib.import_module("tables")
    try:
        (output / "tables.md").write_text(tables.render_folder(output), encoding="utf-8")
    except (LookupError, TypeError, ValueError) as error:  # a result of another version: no reason to stop
        print(f"no tables: {error!r}")


def show(results: Sequence[Result], where: dict[str, Any]) -> None:
    """The ends of the logs of what did not pass, then one line per part."""
    for result in results:
        if result.status in ("failed", "timed out"):
            lines = result.log.read_text(encoding="utf-8", errors="replace").splitlines()
            print(f"\n--- the end of {result.log}")
            print("\n".join(line[:200] for line in lines[-20:]))
    print("\n" + ", ".join(f"{key} {value}" for key, value in where.items()))
    width = max((len(result.name) for result in results), default=0)
    for result in results:
        print(f"{result.name:{width}}  {result.status:9}  {result.seconds:6.1f} s")


if __name__ == "__main__":
    sys.exit(main())
