"""The subcommands of ``python -m perf``, one module each."""

import argparse
from typing import Protocol

from perf.commands import (
    campaign,
    check,
    compare,
    env,
    host,
    kernels,
    plot,
    publish,
    run,
    summary,
    traffic,
    tune,
)


class Command(Protocol):
    """What a module of this package has; its docstring's first line is the help."""

    __name__: str
    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the arguments."""

    def main(self, args: argparse.Namespace) -> int:
        """Carries the command out and returns the exit status.

        Raises:
            UsageError: an argument is wrong; nothing was written.
        """


COMMANDS: tuple[Command, ...] = (
    run,
    campaign,
    check,
    compare,
    plot,
    publish,
    summary,
    traffic,
    host,
    kernels,
    tune,
    env,
)
