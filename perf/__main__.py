"""Entry point of ``python -m perf``."""

import argparse
import os
import signal
import sys
from typing import NoReturn

from perf.commands import COMMANDS
from perf.rows.errors import UsageError

# What a shell reports of a process that a closed pipe ended; 1 would be the verdict of compare.
BROKEN_PIPE = 128 + signal.SIGPIPE


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status: 2 for a bad argument."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # so that a closed pipe fails here and not while Python exits
    except BrokenPipeError:
        # Python flushes again at exit, and has to find somewhere to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(arguments: list[str] | None) -> int:
    parser = _Parser(prog="python -m perf", description="Measures sknet-triton.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        text = (command.__doc__ or "").strip()
        subparser = subparsers.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(main=command.main, parser=subparser)
    args = parser.parse_args(arguments)
    try:
        status: int = args.main(args)
    except UsageError as error:
        args.parser.error(str(error))
    return status


if __name__ == "__main__":
    sys.exit(main())
