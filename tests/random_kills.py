"""A command as two processes, as torchrun would start them, killed at random moments and started again.

    python -m tests.random_kills KILLS MODULE ARGUMENTS...

Each time both are killed (SIGKILL), one after the other; after KILLS such attempts they run to their end.
Prints how many processes were killed at their work. The processes are forked off this one, which has imported
everything, so an attempt costs no more than the work itself.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
import traceback
from types import ModuleType

PROCESSES = 2
LONGEST_S = 1.5
"""A process lives at most about this long before it is killed; the work of both takes a few seconds."""


def start(module: ModuleType, arguments: list[str], rank: int) -> int:
    """The process id of a child that runs the command."""
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(PROCESSES), LOCAL_RANK=str(rank))
    sys.argv = ["command", *arguments]
    code = 0
    try:
        module.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    attempts, name, *arguments = sys.argv[1:]
    module, rng, killed = importlib.import_module(name), random.Random(0), 0
    for attempt in range(int(attempts) + 1):
        last = attempt == int(attempts)
        children = [start(module, arguments, rank) for rank in range(PROCESSES)]
        for child in children:
            if not last:
                time.sleep(rng.uniform(0.0, LONGEST_S / PROCESSES))
                os.kill(child, signal.SIGKILL)  # a child that has ended stays until it is waited for
        for child in children:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            killed += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL) or (last and code):
                sys.exit(f"attempt {attempt}: exit code {code}")
    print(f"killed: {killed}")


if __name__ == "__main__":
    main()
