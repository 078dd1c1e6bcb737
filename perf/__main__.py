"""Entry point of ``python -m perf``."""

import argparse
import sys
from typing import NoReturn

from perf.commands import COMMANDS
from perf.errors import UsageError


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status: 2 for a bad argument."""
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
