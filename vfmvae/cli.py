"""The command line: `vfmvae COMMAND ...` is `python -m vfmvae.COMMAND ...`.

Mistakes that users make (ValueError, OSError, FloatingPointError from our code) end in one line on standard
error and exit code 1, without a traceback.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable

COMMANDS = {
    "train": "train a tokenizer",
    "convert": "published checkpoints to this project's format",
    "doctor": "which accelerated parts are found, and what is used instead",
    "pretrain_mini": "train the small encoder that the demo uses",
}


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command's main function: expected errors become one line and an exit code."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
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
