"""The command line of training: a recipe or a config file, with any field overridden."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vfmvae.config import TrainConfig, read_config
from vfmvae.recipes import RECIPES
from vfmvae.training.run_folder import RunFolder, latest_run_path, new_run_path


@dataclass
class Launch:
    """Train a tokenizer. Example: python -m vfmvae.train --fused --steps 1000 --run-dir runs/longer"""

    recipe: str = "demo"
    """A function of vfmvae/recipes.py that gives every default below."""
    config: Path | None = None
    """A run's config.json, instead of a recipe."""
    run_dir: Path | None = None
    """Where the run's files go; default runs/<recipe>, numbered where that is taken."""
    resume: bool = False
    """Go on with the newest checkpoint of the run."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Launch, RunFolder]:
    """Command line -> launch options with the complete configuration, and the run's folder.

    A resumed run starts from its own config.json. Raises ValueError for unknown recipes and unreadable files;
    tyro ends the process with a message for unknown options and values of a wrong type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = _first_pass(arguments)
    folder = RunFolder(_run_path(first))
    base = _base_config(first, folder)
    launch = tyro.cli(
        Launch,
        args=arguments,
        default=Launch(recipe=first.recipe, run=base),
        prog="python -m vfmvae.train",
    )
    return launch, folder


def _first_pass(arguments: list[str]) -> argparse.Namespace:
    """The options that decide where the defaults of all others come from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--run-dir", "--run_dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    try:
        return parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


def _run_path(first: argparse.Namespace) -> Path:
    if first.run_dir is not None:
        return first.run_dir
    return latest_run_path(first.recipe) if first.resume else new_run_path(first.recipe)


def _base_config(first: argparse.Namespace, folder: RunFolder) -> TrainConfig:
    if first.config is not None:
        return read_config(first.config)
    if first.resume:
        if not folder.config.exists():
            raise ValueError(f"{folder.path} holds no run to resume (no config.json)")
        return read_config(folder.config)
    if first.recipe not in RECIPES:
        raise ValueError(f"unknown recipe {first.recipe!r}; known: {', '.join(RECIPES)}")
    return RECIPES[first.recipe]()
