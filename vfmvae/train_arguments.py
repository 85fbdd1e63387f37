"""The command line of training: a recipe or a config file, with any field overridden."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vfmvae.cli import UsageError, parse
from vfmvae.config import TrainConfig, check_same_run, read_config
from vfmvae.recipes import RECIPES
from vfmvae.training.run_folder import RunFolder, latest_run_path, new_run_path

DEFAULT_RECIPE = "demo"


@dataclass
class Launch:
    """Train a tokenizer. Example: python -m vfmvae.train --fused --steps 1000 --run-dir runs/longer"""

    recipe: Annotated[str | None, tyro.conf.arg(metavar=f"{{{','.join(RECIPES)}}}")] = None
    """A function of vfmvae/recipes.py, which gives the defaults of all options below; demo if not given."""
    config: Path | None = None
    """A run's config.json, instead of a recipe."""
    run_dir: Path | None = None
    """Where the run's files go; if not given, runs/<recipe>, numbered where that is taken."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the newest checkpoint of the run in --run-dir, or else of the latest run of the recipe."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the stages, what they train, the memory they need and the first batch's shapes, and stop."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Launch, RunFolder]:
    """Command line -> launch options with the complete configuration, and the run's folder.

    A resumed run starts from its own config.json. Raises UsageError for unknown recipes, unknown options and
    values that do not fit, ValueError for unreadable files and runs that cannot be resumed like this; tyro
    ends the process with a message for values of a wrong type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = _first_pass(arguments)
    folder = RunFolder(_run_path(first))
    earlier = None
    if first.resume:
        folder.check_resumable()
        earlier = read_config(folder.config)
    # Without subcommands an optional section (tokenizer.encoder.vit) has options where the defaults fill it.
    defaults, plain = Launch(run=_defaults(first, earlier)), (tyro.conf.AvoidSubcommands,)
    launch = parse(Launch, "train", default=defaults, config=plain, arguments=arguments)
    if earlier is not None:
        check_same_run(launch.run, earlier)
    return launch, folder


def _first_pass(arguments: list[str]) -> argparse.Namespace:
    """The options that decide where the defaults of all others come from; tyro checks them again."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--run-dir", "--run_dir")
    parser.add_argument("--resume", action="store_true")
    try:
        first = parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    if first.recipe is not None and first.config is not None:
        raise UsageError(f"give --recipe {first.recipe} or --config {first.config}, not both")
    if first.recipe is not None and first.recipe not in RECIPES:
        raise UsageError(f"unknown recipe {first.recipe!r}; known: {', '.join(RECIPES)}")
    if first.run_dir == "":  # as a path it would be the current folder
        raise UsageError("--run-dir is empty; give a folder, or leave it out for one in runs/")
    return first


def _run_path(first: argparse.Namespace) -> Path:
    if first.run_dir is not None:
        return Path(first.run_dir)
    name = _run_name(first)
    return latest_run_path(name) if first.resume else new_run_path(name)


def _run_name(first: argparse.Namespace) -> str:
    """The recipe's name; that of the folder for a run's config.json; that of any other config file."""
    if first.config is None:
        return first.recipe or DEFAULT_RECIPE
    return first.config.resolve().parent.name if first.config.stem == "config" else first.config.stem


def _defaults(first: argparse.Namespace, earlier: TrainConfig | None) -> TrainConfig:
    if first.config is not None:
        return read_config(first.config)
    return earlier or RECIPES[first.recipe or DEFAULT_RECIPE]()
