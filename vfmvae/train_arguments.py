"""The command lines of training: a recipe or a config file, with any field overridden."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import tyro

from vfmvae.cli import UsageError, parse
from vfmvae.config import TrainConfig, check_same_run, read_config
from vfmvae.diffusion.files import is_diffusion
from vfmvae.diffusion_config import DiffusionConfig, check_same_diffusion, read_diffusion_config
from vfmvae.encoders import EncoderConfig
from vfmvae.model_files import CONFIG_FILE, find_model
from vfmvae.recipes import DIFFUSION_RECIPES, RECIPES, diffusion_demo_on
from vfmvae.serialization import read_json
from vfmvae.tokenizer.files import tokenizer_config
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


@dataclass
class LaunchDiffusion:
    """Train a diffusion transformer. Example: python -m vfmvae.train_diffusion --fused --latents latents"""

    recipe: Annotated[str | None, tyro.conf.arg(metavar=f"{{{','.join(DIFFUSION_RECIPES)}}}")] = None
    """A function of vfmvae/recipes.py, which gives the defaults of all options below; diffusion_demo if not
    given."""
    config: Path | None = None
    """A run's config.json, instead of a recipe."""
    run_dir: Path | None = None
    """Where the run's files go; if not given, runs/<recipe>, numbered where that is taken."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the newest checkpoint of the run in --run-dir, or else of the latest run of the recipe."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the stages, the model and its size, and stop."""
    run: Annotated[DiffusionConfig, tyro.conf.arg(name="")] = field(
        default_factory=DIFFUSION_RECIPES["diffusion_demo"]
    )


C = TypeVar("C")
L = TypeVar("L")


class TrainCommand(NamedTuple, Generic[L, C]):
    """What differs between the commands that train."""

    name: str
    launch: Callable[..., L]
    recipes: Mapping[str, Callable[[], C]]
    default_recipe: str
    read: Callable[[Path], C]
    check_same: Callable[[C, C], None]
    adapt: Callable[[C, argparse.Namespace], C]
    """Defaults that follow from other options."""


def unchecked(config: C, **changes: Any) -> C:
    """Defaults that need not fit each other yet: what the command line makes of them is checked."""
    found = copy.copy(config)
    for name, value in changes.items():
        object.__setattr__(found, name, value)
    return found


def _as_the_initial_one(config: TrainConfig, first: argparse.Namespace) -> TrainConfig:
    """A recipe's tokenizer is built as the one that the run begins with, and its joint model fits that."""
    if first.initial in (None, "None") or first.resume or first.config is not None:
        return config
    if is_diffusion(read_json(find_model(first.initial) / CONFIG_FILE)):
        raise UsageError(f"--initial {first.initial} is a diffusion model; give a tokenizer")
    tokenizer, joint = tokenizer_config(first.initial), config.joint
    if joint is not None:
        side = tokenizer.resolution // tokenizer.downsample
        model = replace(joint.model, channels=tokenizer.latent_channels, latent_size=side)
        joint = replace(joint, model=model)
    return unchecked(config, tokenizer=tokenizer, joint=joint, initial=first.initial)


def _for_what_it_reads(config: DiffusionConfig, first: argparse.Namespace) -> DiffusionConfig:
    """Without the other source of latents than the command line names; the demo's model fits a folder's."""
    named = "None" if first.latents is None else first.latents
    if named != "None":
        if first.config is None and not first.resume and first.recipe in (None, DIFFUSION.default_recipe):
            return diffusion_demo_on(named)
        return replace(config, data=None, encoder=None, latents=named)
    if first.data not in (None, "None"):
        encoder = config.encoder or (EncoderConfig() if first.encoder else None)
        return unchecked(config, data=first.data, latents=None, encoder=encoder)
    return config


TOKENIZER = TrainCommand(
    "train", Launch, RECIPES, DEFAULT_RECIPE, read_config, check_same_run, _as_the_initial_one
)
DIFFUSION = TrainCommand(
    "train_diffusion",
    LaunchDiffusion,
    DIFFUSION_RECIPES,
    "diffusion_demo",
    read_diffusion_config,
    check_same_diffusion,
    _for_what_it_reads,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Launch, RunFolder]:
    """The command line of `vfmvae.train`; see `parse_training`."""
    return parse_training(TOKENIZER, arguments)


def parse_training(
    command: TrainCommand[L, C], arguments: Sequence[str] | None = None
) -> tuple[L, RunFolder]:
    """Command line -> launch options with the complete configuration, and the run's folder.

    A resumed run starts from its own config.json. Raises UsageError for unknown recipes, unknown options and
    values that do not fit, ValueError for unreadable files and runs that cannot be resumed like this; tyro
    ends the process with a message for values of a wrong type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = _first_pass(command, arguments)
    folder = RunFolder(_run_path(command, first), f"vfmvae.{command.name}")
    earlier = None
    if first.resume:
        folder.check_resumable()
        earlier = command.read(folder.config)
    # Without subcommands an optional section (tokenizer.encoder.vit) has options where the defaults fill it.
    kind: Any = command.launch
    defaults, plain = kind(run=_defaults(command, first, earlier)), (tyro.conf.AvoidSubcommands,)
    launch = parse(kind, command.name, default=defaults, config=plain, arguments=arguments)
    if earlier is not None:
        command.check_same(launch.run, earlier)
    return launch, folder


def _first_pass(command: TrainCommand[L, C], arguments: list[str]) -> argparse.Namespace:
    """The options that decide where the defaults of all others come from; tyro checks them again."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--run-dir", "--run_dir")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--data")
    parser.add_argument("--latents")
    parser.add_argument("--initial")
    try:
        first = parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    first.encoder = any(argument.startswith("--encoder.") for argument in arguments)
    if first.recipe is not None and first.config is not None:
        raise UsageError(f"give --recipe {first.recipe} or --config {first.config}, not both")
    if first.recipe is not None and first.recipe not in command.recipes:
        raise UsageError(f"unknown recipe {first.recipe!r}; known: {', '.join(command.recipes)}")
    if first.run_dir == "":  # as a path it would be the current folder
        raise UsageError("--run-dir is empty; give a folder, or leave it out for one in runs/")
    return first


def _run_path(command: TrainCommand[L, C], first: argparse.Namespace) -> Path:
    if first.run_dir is not None:
        return Path(first.run_dir)
    name = _run_name(command, first)
    return latest_run_path(name) if first.resume else new_run_path(name)


def _run_name(command: TrainCommand[L, C], first: argparse.Namespace) -> str:
    """The recipe's name; that of the folder for a run's config.json; that of any other config file."""
    if first.config is None:
        return first.recipe or command.default_recipe
    return first.config.resolve().parent.name if first.config.stem == "config" else first.config.stem


def _defaults(command: TrainCommand[L, C], first: argparse.Namespace, earlier: C | None) -> C:
    if first.config is not None:
        found = command.read(first.config)
    else:
        found = earlier or command.recipes[first.recipe or command.default_recipe]()
    return command.adapt(found, first)
