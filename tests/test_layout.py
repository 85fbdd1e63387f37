"""The house rules that a parser can check: who imports whom, how long a file is, what `import vfmvae` loads.

Layers, lower never imports higher:

    0 kernels   1 ops   2 encoders, tokenizer, discriminators, diffusion   3 losses, metrics   4 data
    5 training   6 recipes, config   7 entry modules

Siblings of a layer do not import each other, except that the tokenizer uses the encoders, the projected
discriminator reads images through one of them, and recipes return configs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import ROOT, run_python

LONGEST_FILE = 500
LAYERS = (
    ("kernels", "_C"),
    ("ops",),
    ("encoders", "tokenizer", "discriminators", "diffusion"),
    ("losses", "metrics"),
    ("data",),
    ("training",),
    ("recipes", "config", "diffusion_config"),
)
LAYER_OF = {area: number for number, areas in enumerate(LAYERS) for area in areas}
ENTRY = len(LAYERS)
# Small modules without a dependency inside the package; every layer may use them.
FOUNDATION = {"atomic", "deferred", "images", "model_files", "serialization", "weights"}
SIBLINGS = {
    ("tokenizer", "encoders"),
    ("discriminators", "encoders"),
    ("recipes", "config"),
    ("recipes", "diffusion_config"),
}
# Names of fast code, which only ops/ may say. The doctor says them to report what is there.
FAST = ("vfmvae.kernels", "vfmvae._C", "triton")
MAY_SAY_FAST = ("vfmvae/ops/", "vfmvae/doctor.py", "kernels/")


class Import(NamedTuple):
    """One imported module, by absolute name, and where it is written."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> Iterator[Import]:
    """Everything a file imports, inside of functions too; `from a import b` is a.b where that is a module."""
    file = path.relative_to(ROOT).as_posix()
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                below = ROOT.joinpath(*base.split("."), alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").is_file() or alias.name == "_C"
                yield Import(file, node.lineno, f"{base}.{alias.name}" if is_module else base)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(file, node.lineno, node.args[0].value)


def area_of(module: str) -> str | None:
    """The folder or module directly below vfmvae that a module name points to; None outside of vfmvae."""
    parts = module.split(".")
    return parts[1] if parts[0] == "vfmvae" and len(parts) > 1 else None


def layer_of(area: str) -> int:
    return LAYER_OF.get(area, ENTRY)


def breaks_the_order(found: Import) -> bool:
    """Whether an import of vfmvae/ or kernels/ goes up, or sideways without leave."""
    parts = Path(found.file).parts
    here = "kernels" if parts[0] == "kernels" else Path(parts[1]).stem
    there = area_of(found.module)
    if there is None or there == here or here == "__init__" or there in FOUNDATION:
        return False
    if here in FOUNDATION:
        return True
    # What `python -m` runs of a folder is an entry module: nothing in the folder imports it.
    layer = ENTRY if parts[-1] == "__main__.py" else layer_of(here)
    if layer == layer_of(there) < ENTRY:
        return (here, there) not in SIBLINGS
    return layer_of(there) > layer


def test_lower_layers_never_import_higher_ones() -> None:
    found = [i for path in python_files("vfmvae", "kernels") for i in imports_of(path)]
    assert len(found) > 50, "the parser finds imports"
    assert [str(i) for i in found if breaks_the_order(i)] == []


def test_only_ops_names_fast_code() -> None:
    wrong = [
        str(found)
        for path in python_files("vfmvae", "kernels")
        for found in imports_of(path)
        if any((found.module + ".").startswith(name + ".") for name in FAST)
        and not found.file.startswith(MAY_SAY_FAST)
    ]
    assert wrong == []


def test_losses_take_tensors_and_data_knows_no_model() -> None:
    models = {"encoders", "tokenizer", "discriminators", "diffusion", "config", "recipes"}
    # A perceptual distance is one between a frozen network's features, so that one loss has a model.
    allowed = {("vfmvae/losses/perceptual.py", "encoders")}
    wrong = [
        str(found)
        for path in python_files("vfmvae/losses", "vfmvae/data")
        for found in imports_of(path)
        if (there := area_of(found.module)) in models and (found.file, there) not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("file", "module", "broken"),
    [
        ("vfmvae/ops/norm.py", "vfmvae.tokenizer.decoder", True),
        ("vfmvae/tokenizer/model.py", "vfmvae.ops", False),
        ("vfmvae/tokenizer/model.py", "vfmvae.encoders", False),
        ("vfmvae/encoders/base.py", "vfmvae.tokenizer", True),
        ("vfmvae/discriminators/projected.py", "vfmvae.encoders", False),
        ("vfmvae/discriminators/projected.py", "vfmvae.tokenizer", True),
        ("vfmvae/losses/perceptual.py", "vfmvae.metrics.fid", True),
        ("vfmvae/training/ema.py", "vfmvae.config", True),
        ("vfmvae/recipes.py", "vfmvae.config", False),
        ("vfmvae/config.py", "vfmvae.recipes", True),
        ("vfmvae/config.py", "vfmvae.train", True),
        ("vfmvae/train.py", "vfmvae.cli", False),
        ("vfmvae/data/__main__.py", "vfmvae.cli", False),
        ("vfmvae/data/images.py", "vfmvae.cli", True),
        ("vfmvae/atomic.py", "vfmvae.ops", True),
        ("kernels/gated.py", "vfmvae.ops", True),
        ("kernels/gated.py", "vfmvae.kernels.common", False),
        ("vfmvae/ops/norm.py", "torch", False),
    ],
)
def test_the_rule_itself(file: str, module: str, broken: bool) -> None:
    assert breaks_the_order(Import(file, 1, module)) is broken


def test_the_parser_sees_every_way_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vfmvae" / "ops").mkdir(parents=True)
    (tmp_path / "vfmvae" / "train.py").touch()
    source = tmp_path / "vfmvae" / "ops" / "x.py"
    source.write_text(
        "import vfmvae.a\n"
        "from vfmvae import train, y\n"
        "from ..b import c\n"
        "def f():\n"
        "    from vfmvae import _C\n"
        "    importlib.import_module('vfmvae.d')\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    modules = {found.module for found in imports_of(source)}
    assert modules == {"vfmvae.a", "vfmvae.train", "vfmvae", "vfmvae.b", "vfmvae._C", "vfmvae.d"}


@pytest.mark.parametrize("folder", ["kernels", "tests", "benchmarks"])
def test_folders_that_would_shadow_packages_have_no_init(folder: str) -> None:
    assert list((ROOT / folder).rglob("__init__.py")) == []


def test_nobody_imports_the_folder_kernels_by_its_bare_name() -> None:
    wrong = [
        str(found)
        for path in python_files("vfmvae", "kernels", "benchmarks", "tests")
        for found in imports_of(path)
        if found.module.partition(".")[0] == "kernels"
    ]
    assert wrong == []


def test_files_are_short_enough_to_read() -> None:
    suffixes = (".h", ".cuh", ".cu", ".cpp")
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in suffixes]
    files = [*python_files("vfmvae", "kernels", "benchmarks", "tests"), *sources, ROOT / "setup.py"]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_bytes().splitlines()) for path in files}
    assert {file: length for file, length in lengths.items() if length > LONGEST_FILE} == {}


def test_modules_postpone_annotations() -> None:
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in python_files("vfmvae", "kernels", "benchmarks", "tests")
        if path.name != "__init__.py" and "from __future__ import annotations" not in path.read_text()
    ]
    assert missing == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "('torch', 'triton', 'vfmvae._C', 'vfmvae.ops', 'timm', 'transformers')"
    program = f"import sys, vfmvae; print([name for name in {heavy} if name in sys.modules])"
    assert run_python("-c", program).strip() == "[]"


def test_importing_the_operations_loads_neither_the_extension_nor_triton() -> None:
    # torch itself may import triton, so what is asked is whether the operations do it on top.
    program = (
        "import sys, torch, torch._dynamo; before = set(sys.modules); import vfmvae.ops; "
        "loaded = set(sys.modules) - before; "
        "print(sorted(name for name in loaded if name.startswith(('triton', 'vfmvae._C'))))"
    )
    assert run_python("-c", program).strip() == "[]"
