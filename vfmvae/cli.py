"""The command line: `vfmvae COMMAND ...` is `python -m vfmvae.COMMAND ...`.

Exit codes: 0 done, 1 a mistake found by this project, 2 wrong usage, 128 + n ended by signal n.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable

COMMANDS = {
    "train": "train a tokenizer",
    "convert": "published checkpoints to this project's format",
    "doctor": "which accelerated parts are found, and what is used instead",
    "pretrain_mini": "train the small encoder that the demo uses",
}


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's main function: mistakes that users make end in one line on standard error.

    These are ValueError, OSError and FloatingPointError. `python -X dev -m vfmvae.COMMAND` shows where they
    come from.
    """

    @functools.wraps(main)
    def wrapped() -> None:
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
            sys.exit(1)

    return wrapped


def main() -> None:
    """Entry point of the console script `vfmvae`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: vfmvae COMMAND [options]; `vfmvae COMMAND --help` explains one\n")
        print("\n".join(f"  {command:14} {text}" for command, text in COMMANDS.items()))
        return
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"vfmvae {name}", *sys.argv[2:]]
    module = importlib.import_module(f"vfmvae.{name}.__main__" if name == "convert" else f"vfmvae.{name}")
    module.main()


def _sentence(error: Exception) -> str:
    """An error of the operating system without its number: "file: No such file or directory"."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
