"""What the laboratory's commands share: one line for what is wrong, progress, an exit status.

Every command ends with exit status 0, 2 for what is wrong, in one line on standard error, or 130
after an interrupt, when the same command goes on.

Chapter: quantization methods.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        name = self.prog.removeprefix("python -m ")
        self.exit(2, f"{name}: error: {' '.join(message.split())}\n")


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)


def attempt(
    command: str,
    work: Callable[[], object],
    next_time: Callable[[], str] = lambda: "goes on after the last row",
) -> int:
    """Run a command's work; its exit status, with one line for what went wrong.

    Parameters
    ----------
    command : as it is typed; "python -m " is left out of messages.
    next_time : what the same command does after an interrupt.
    """
    try:
        work()
    except KeyboardInterrupt:
        print(f"interrupted; the same command {next_time()}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{command.removeprefix('python -m ')}: error: {error}", file=sys.stderr)
        return 2
    return 0
