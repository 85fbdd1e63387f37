"""Builds `vfmvae._C` from csrc/ through CMake and Ninja, and installs kernels/ as `vfmvae.kernels`.

VFMVAE_BUILD chooses what is compiled:

    auto   (default) CUDA and CPU code if nvcc is found and works, else CPU code, else nothing; never fails
    cuda   CUDA and CPU code, or the installation fails
    cpu    CPU code, or the installation fails
    none   nothing: pure Python and Triton

VFMVAE_CUDA_ARCHS overrides the GPU targets, in CMake's notation ("90a-real;100-real").

One line says what was built and why. pip shows it under -v only, so it is also kept in vfmvae/_build.txt,
which `python -m vfmvae.doctor` prints. Torch is not needed here. `python setup.py build_ext --inplace` builds
in a checkout without pip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cuda", "cpu", "none")
# Toolkit name -> CMake's. sm_80 also carries PTX, which the driver compiles for GPUs without a target of
# their own.
TARGETS = {"sm_80": "80", "sm_90": "90a-real", "sm_100": "100-real"}


class BuildFailed(RuntimeError):
    """A step of the build failed; the message is one line."""


def find_tool(name: str) -> str:
    """A build program: the one beside the Python package of that name, else the one on the path."""
    if find_spec(name) is not None:
        package = import_module(name)
        folder = Path(package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR)
        for candidate in (folder / name, folder / f"{name}.exe"):
            if candidate.is_file():
                return str(candidate)
    found = shutil.which(name)
    if found is None:
        raise BuildFailed(f"{name} was not found")
    return found


def find_nvcc() -> str | None:
    """nvcc on the path, under CUDA_HOME, or at its usual place."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)]
    return next((c for c in candidates if c), None)


def cuda_architectures(nvcc: str) -> str:
    """The targets this nvcc knows among those we want, in CMake's notation."""
    if chosen := os.environ.get("VFMVAE_CUDA_ARCHS"):
        return chosen
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = listing.stdout.split()
    wanted = [cmake_name for name, cmake_name in TARGETS.items() if name in known]
    if not wanted:
        raise BuildFailed(f"{nvcc} targets none of {', '.join(TARGETS)}")
    return ";".join(wanted)


def run(command: list[str]) -> None:
    """Runs a build command, shows its output, and turns a failure into its first error line."""
    process = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(process.stdout, file=sys.stderr)
    if process.returncode != 0:
        raise BuildFailed(first_error(process.stdout) or f"{command[0]} ended with {process.returncode}")


def first_error(output: str) -> str:
    """The first line that speaks of an error, or the one below it if that is "CMake Error at FILE (...):"."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - 1))
    if lines[start:] and lines[start].startswith("CMake Error at"):
        start = min(start + 1, len(lines) - 1)
    return " ".join(lines[start : start + 1])


class BuildWithCMake(build_ext):
    """Compiles the one extension; `build_extension` is the hook that also serves editable installs."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.asked_in_place = bool(self.inplace)  # setuptools clears `inplace` while it builds

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("VFMVAE_BUILD", "auto")
        if mode not in MODES:
            raise SystemExit(f"VFMVAE_BUILD={mode!r} is not one of {', '.join(MODES)}")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        built, reason = self._build(mode, output)
        if built == "none":
            self._remove_stale()
        line = f"vfmvae._C: {built} (VFMVAE_BUILD={mode}: {reason})"
        print(line, file=sys.stderr)
        note = self._package_folder() / "_build.txt"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(line + "\n", encoding="utf-8")

    def _build(self, mode: str, output: Path) -> tuple[str, str]:
        """What was built and why; raises where the mode does not allow less."""
        if mode == "none":
            return "none", "as asked"
        nvcc = find_nvcc()
        if mode == "cpu":
            reason = "as asked"
        elif nvcc is None:
            reason = "nvcc was not found on the path, under CUDA_HOME or in /usr/local/cuda"
            if mode == "cuda":
                raise SystemExit(f"VFMVAE_BUILD=cuda, but {reason}")
        else:
            try:
                self._compile(output, nvcc)
                return "cuda and cpu", "as asked" if mode == "cuda" else f"found {nvcc}"
            except BuildFailed as failure:
                reason = f"the CUDA build with {nvcc} failed: {failure}"
                if mode == "cuda":
                    raise SystemExit(f"VFMVAE_BUILD=cuda, but {reason}") from None
        try:
            self._compile(output, None)
            return "cpu", reason
        except BuildFailed as failure:
            if mode == "cpu":
                raise SystemExit(f"VFMVAE_BUILD=cpu, but the build failed: {failure}") from None
            return "none", f"{reason}; the CPU build failed: {failure}"

    def _compile(self, output: Path, nvcc: str | None) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        configure = [
            *(find_tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVFMVAE_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            configure += [
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures(nvcc)}",
            ]
        run(configure)
        run([find_tool("cmake"), "--build", str(build)])
        if not output.is_file():
            raise BuildFailed(f"the build left no {output.name}")

    def _package_folder(self) -> Path:
        """Where the installed package lies: the source tree for an editable install, else the build tree."""
        in_source = self.asked_in_place or self.editable_mode
        return ROOT / "vfmvae" if in_source else Path(self.build_lib) / "vfmvae"

    def _remove_stale(self) -> None:
        """An extension that an earlier installation left would be imported though nothing was built."""
        for old in self._package_folder().glob("_C.*"):
            old.unlink()


setup(
    packages=[*find_packages(include=["vfmvae", "vfmvae.*"]), "vfmvae.kernels"],
    package_dir={"vfmvae.kernels": "kernels"},
    # "optional" allows that nothing is built; a build that was asked for and fails raises all the same.
    ext_modules=[Extension("vfmvae._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildWithCMake},
)
