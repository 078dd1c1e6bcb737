"""Compile every kernel for GPUs that are not there, and print registers, spills and access widths.

Needs triton but no GPU: sm_80, sm_90, sm_100 and gfx942 are compiled for, in processes of their
own. spill_bytes and stack_bytes are to be 0; load_bytes and store_bytes are the widest access of a
thread, 16 where `fast` is true.
"""

import argparse
import os
from pathlib import Path

from perf.commands.files import table_file
from perf.rows.errors import UsageError

_SHOWN = [
    "target",
    "stage",
    "kernel",
    "M",
    "layout",
    "dtype",
    "S",
    "splits",
    "registers",
    "spill_bytes",
    "stack_bytes",
    "shared_bytes",
    "load_bytes",
    "store_bytes",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where the table goes."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="write the table there as well"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the table; exits with 1 where a kernel spills."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise UsageError("TRITON_INTERPRET: kernels cannot be compiled where it is 1; unset it")
    from perf.static.kernels import kernel_table

    with table_file(args.out) as write:
        table = kernel_table()
        print(table[_SHOWN].to_string(index=False))
        write(table)
    return int(bool((table.spill_bytes + table.stack_bytes).any()))
