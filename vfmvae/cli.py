"""The command line: `vfmvae COMMAND ...` is `python -m vfmvae.COMMAND ...`.

Exit codes: 0 done; 1 failed while working (a file that is missing or damaged, a full disk, a loss that is not
finite); 2 wrong usage (an unknown command or option, a value that an option cannot have: nothing was begun);
128 + n ended by signal n.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from io import StringIO
from typing import Any, TypeVar

import vfmvae

T = TypeVar("T")

COMMANDS = {
    "train": "train a tokenizer",
    "train_diffusion": "train a diffusion transformer on latents",
    "reconstruct": "images through a tokenizer and back, side by side",
    "encode": "images to shards of latents, for diffusion models",
    "latents": "check and describe shards of latents, or import those of others",
    "decode": "shards of latents to images",
    "sample": "images of classes from a diffusion model",
    "evaluate": "PSNR, SSIM and perceptual distance of reconstructions",
    "report": "one HTML page of a run: curves and reconstructions",
    "data": "what a data set holds: counts, sizes, classes, broken files, a contact sheet",
    "convert": "published checkpoints to this project's format",
    "doctor": "which accelerated parts are found, and what is used instead",
    "pretrain_mini": "train the small encoder that the demo uses",
}
FOLDERS = ("convert", "data")
"""Commands that are packages with a __main__, and no modules."""


class UsageError(ValueError):
    """An option with a value that it cannot have, or options that contradict each other."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's main function: mistakes that users make end in one line on standard error.

    These are ValueError, OSError and FloatingPointError. `python -X dev -m vfmvae.COMMAND` shows where they
    come from.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        if getattr(sys.stdout, "errors", "") == "strict":  # names of files may be no text
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            if sys.flags.dev_mode:
                raise
            print(f"error: {_sentence(error)}", file=sys.stderr)
            sys.exit(2 if isinstance(error, UsageError) else 1)

    return wrapped


@contextmanager
def usage() -> Iterator[None]:
    """A ValueError inside is the user's wrong usage."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


def parse(
    options: type[T],
    name: str,
    *,
    default: T | None = None,
    config: tuple[Any, ...] = (),
    arguments: Sequence[str] | None = None,
) -> T:
    """The command line as the dataclass `options` of the command `name`; `default` fills what is not given.

    A union of dataclasses is a command with subcommands: what is given must begin with the name of one.
    `arguments`: instead of those that the process was started with.

    UsageError for an option that does not exist, listing those that do, and for a value that the dataclass
    refuses. tyro itself ends the process, with 2 and a message, for values of a wrong type, and with 0 for
    --help.
    """
    import tyro  # half of the time that `vfmvae --help` would take

    prog = f"python -m vfmvae.{name}"
    filled: dict[str, Any] = {} if default is None else {"default": default}
    with usage():
        parsed, unknown = tyro.cli(
            options, prog=prog, args=arguments, config=config, return_unknown_args=True, **filled
        )
    if not unknown:
        assert parsed is not None
        return parsed
    given = sys.argv[1:] if arguments is None else arguments
    subcommand: list[str] = [] if isinstance(options, type) else list(given[:1])
    page = StringIO()
    with redirect_stdout(page), suppress(SystemExit):
        tyro.cli(options, prog=prog, config=config, args=[*subcommand, "--help"], **filled)
    valid = re.findall(r"^\W{1,3}(?:-h, )?(--\w[\w.-]*)", page.getvalue(), flags=re.MULTILINE)
    wrong = next((argument for argument in unknown if argument.startswith("-")), unknown[0])
    raise UsageError(f"{_unknown(wrong.partition('=')[0], valid)} ({prog} --help explains them)")


def _unknown(wrong: str, valid: list[str]) -> str:
    """The sentence for an option that does not exist: those it may have meant, and all of its section."""
    if not wrong.startswith("-"):
        return f"unknown argument {wrong}; options: {', '.join(_sections(valid))}"
    near = get_close_matches(wrong, valid, n=3, cutoff=0.75)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    section = wrong.rpartition(".")[0] + "."
    siblings = [option for option in valid if option.startswith(section)]
    return f"unknown option {wrong}; {meant}options: {', '.join(siblings or _sections(valid))}"


def _sections(options: list[str]) -> list[str]:
    """Options without a dot, and `--section.*` once for those with one."""
    return list(dict.fromkeys(re.sub(r"\..*", ".*", option) for option in options))


def main() -> None:
    """Entry point of the console script `vfmvae`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: vfmvae COMMAND [options]; `vfmvae COMMAND --help` explains one, `vfmvae --version`\n")
        print("\n".join(f"  {command:14} {text}" for command, text in COMMANDS.items()))
        return
    if name == "--version":
        print(f"vfmvae {vfmvae.__version__}")
        return
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"vfmvae {name}", *sys.argv[2:]]
    module = importlib.import_module(f"vfmvae.{name}.__main__" if name in FOLDERS else f"vfmvae.{name}")
    module.main()


def _sentence(error: Exception) -> str:
    """An error of the operating system without its number: "file: No such file or directory"."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
