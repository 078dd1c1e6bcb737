"""Entry point of ``python -m perf``."""

import argparse
import inspect
import io
import os
import signal
import sys
import traceback
from typing import NoReturn

from perf.commands import COMMANDS
from perf.rows import StopError, UsageError, printable

# 1 is a verdict, as of compare. What goes wrong otherwise has the statuses of sysexits.h, or what a
# shell reports of a process that the signal ended.
IO_ERROR = os.EX_IOERR
SOFTWARE_ERROR = os.EX_SOFTWARE
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE

_EPILOG = f"""\
exit status: 0 done; 1 a verdict, see the command; 2 a mistake in the command, and nothing was
measured or written; {INTERRUPTED} interrupted; {IO_ERROR} a disk is full, or a rank died;
{SOFTWARE_ERROR} a fault of the harness
"""


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # so that it fails here and not while Python exits
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except (OSError, StopError) as error:
        if isinstance(error, OSError):
            _discard_stdout()
        print(f"python -m perf: {printable(str(error))}", file=sys.stderr)
        return IO_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return SOFTWARE_ERROR


def _discard_stdout() -> None:
    """Lets Python, which flushes again at exit, find somewhere to write to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str] | None) -> int:
    parser = _Parser(
        prog="python -m perf",
        description="Measures sknet-triton.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command, add_arguments in COMMANDS.items():
        described = inspect.getdoc(command) or ""
        subparser = subparsers.add_parser(
            command.__name__,
            help=described.partition("\n")[0],
            description=described,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if add_arguments:
            add_arguments(subparser)
        subparser.set_defaults(main=command, parser=subparser)
    args = parser.parse_args(arguments)
    try:
        status: int = args.main(args)
    except UsageError as error:
        args.parser.error(str(error))
    return status


if __name__ == "__main__":
    sys.exit(main())
