"""Every way to have the package: checkout, editable installation, wheel; and the folder kernels/ in each.

Nothing is downloaded: scratch environments see the packages of the running interpreter through a .pth file,
and builds run without isolation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_python

# Prints where the package and a kernel come from, and that the kernel's source can be read (Triton needs it).
PROBE = """
import inspect, pathlib, vfmvae
from vfmvae.kernels import gated
from vfmvae.kernels.gated import gated_fwd
assert gated.gated_fwd is gated_fwd and "def gated_fwd" in inspect.getsource(gated_fwd)
print(pathlib.Path(vfmvae.__file__).parent, pathlib.Path(gated.__file__).parent, sep="\\n")
"""
SOURCES = ("csrc", "kernels", "vfmvae", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed to build, without what earlier builds left."""
    copy = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("__pycache__", "_C.*", "_build.txt")
    for name in (*SOURCES, "pyproject.toml", "setup.py"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The interpreter of a new virtual environment that sees the running one's packages, but not vfmvae."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "vfmvae" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "running.pth").write_text(f"{packages}\n")
    return python


def run(python: Path, *arguments: str, cwd: Path, build: str = "none") -> str:
    """Runs the scratch interpreter; the test fails with its output if it fails."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    process = subprocess.run(
        [str(python), *arguments],
        cwd=cwd,
        env={**inherited, "VFMVAE_BUILD": build, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, f"{' '.join(arguments)}: {process.returncode}\n{process.stdout}"
    return process.stdout


def install(python: Path, *what: str, cwd: Path, build: str = "none") -> str:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "-v")
    return run(python, "-m", "pip", "install", *options, *what, cwd=cwd, build=build)


def test_checkout_that_is_not_installed(repository: Path, environment: Path) -> None:
    package, kernels = run(environment, "-c", PROBE, cwd=repository).split()
    assert Path(package) == repository / "vfmvae"
    assert Path(kernels) == repository / "kernels"


def test_editable_installation_with_the_compiled_extension(
    repository: Path, environment: Path, tmp_path: Path
):
    output = install(environment, "-e", str(repository), cwd=tmp_path, build="cpu")
    assert "vfmvae._C: cpu (VFMVAE_BUILD=cpu: as asked)" in output
    for cwd in (tmp_path, repository):
        package, kernels = run(environment, "-c", PROBE, cwd=cwd).split()
        assert Path(package) == repository / "vfmvae"
        assert Path(kernels) == repository / "kernels"
    program = """
import torch
from vfmvae import _C
from vfmvae.ops import upsample_blur
assert not _C.with_cuda, _C.build_info
x = torch.randn(2, 8, 5, 6)
torch.testing.assert_close(upsample_blur(x, 3, fused="cpu"), upsample_blur(x, 3, fused=False))
"""
    run(environment, "-c", program, cwd=tmp_path)
    # Installed again without the extension, the old one must not be found.
    install(environment, "-e", str(repository), cwd=tmp_path, build="none")
    assert list((repository / "vfmvae").glob("_C.*")) == []
    assert (repository / "vfmvae" / "_build.txt").read_text().startswith("vfmvae._C: none")
    (repository / "vfmvae" / "_build.txt").unlink()


def test_wheel(repository: Path, environment: Path, tmp_path: Path) -> None:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(tmp_path))
    run(environment, "-m", "pip", "wheel", *options, str(repository), cwd=tmp_path)
    (wheel,) = tmp_path.glob("vfmvae-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vfmvae"}, tops
    assert {"vfmvae/kernels/gated.py", "vfmvae/_build.txt"} <= set(names)
    weights = (repository / "vfmvae").rglob("*.safetensors")
    assert {path.relative_to(repository).as_posix() for path in weights} <= set(names)

    install(environment, str(wheel), cwd=tmp_path)
    package, kernels = map(Path, run(environment, "-c", PROBE, cwd=tmp_path).split())
    assert environment.parents[1] in package.parents
    assert kernels == package / "kernels"
    # At the repository's root the checkout comes first, consistently: package and kernels.
    package, kernels = map(Path, run(environment, "-c", PROBE, cwd=repository).split())
    assert (package, kernels) == (repository / "vfmvae", repository / "kernels")


def test_source_distribution_can_be_built(repository: Path, environment: Path, tmp_path: Path) -> None:
    program = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    run(environment, "-c", program, cwd=repository)
    (archive,) = tmp_path.glob("vfmvae-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (folder,) = (path for path in tmp_path.glob("vfmvae-*") if path.is_dir())
    for name in (*SOURCES, "csrc/cpu/upsample_blur.cpp", "kernels/gated.py", "setup.py", "pyproject.toml"):
        assert (folder / name).exists(), name


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("auto", "vfmvae._C: none (VFMVAE_BUILD=auto: nvcc was not found"),
        ("cpu", "VFMVAE_BUILD=cpu, but the build failed"),
        ("cuda", "VFMVAE_BUILD=cuda, but nvcc was not found"),
        ("fast", "VFMVAE_BUILD='fast' is not one of auto, cuda, cpu, none"),
    ],
)
def test_machine_without_any_compiler(repository: Path, tmp_path: Path, mode: str, sentence: str) -> None:
    tools = "import setup; setup.find_nvcc = lambda: None"
    output, failed = build_with(tools, repository, tmp_path, mode, CXX="/nonexistent/c++")
    assert sentence in output
    assert failed is (mode != "auto")


def test_cuda_build_that_fails_falls_back_to_the_cpu(repository: Path, tmp_path: Path) -> None:
    tools = f"import setup; setup.find_nvcc = lambda: {shutil.which('false')!r}"
    output, failed = build_with(tools, repository, tmp_path, "auto")
    assert not failed
    assert "vfmvae._C: cpu (VFMVAE_BUILD=auto: the CUDA build with" in output
    assert list((tmp_path / "lib" / "vfmvae").glob("_C.*"))
    output, failed = build_with(tools, repository, tmp_path, "cuda")
    assert failed and "VFMVAE_BUILD=cuda, but the CUDA build with" in output


def build_with(
    preparation: str, repository: Path, folder: Path, mode: str, **environment: str
) -> tuple[str, bool]:
    """Runs `setup.py build_ext` after `preparation` has changed its functions: (output, did it fail)."""
    folders = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    program = f"""
import sys
from unittest import mock
sys.path.insert(0, ".")
sys.argv = ["setup.py", "build_ext", *{folders}]
import setuptools
real = setuptools.setup
with mock.patch.object(setuptools, "setup", lambda **options: globals().update(options=options)):
    {preparation}
real(**options)
"""
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=repository,
        env={**os.environ, "VFMVAE_BUILD": mode, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return process.stdout, process.returncode != 0


def test_transformers_at_the_root_of_the_repository() -> None:
    pytest.importorskip("transformers")
    run_python("-c", "from transformers import Dinov2Model; import vfmvae.kernels.gated", cwd=ROOT)
