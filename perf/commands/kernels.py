"""Compile every kernel for GPUs that are not there: registers, spills, access widths, ceilings.

Needs triton but no GPU: sm_80, sm_90, sm_100 and gfx942 are compiled for, in processes of their
own. spill_bytes and stack_bytes are to be 0; load_bytes and store_bytes are the widest access of a
thread, 16 where `fast` is true.

The second table is modelled, not measured: from sm_90's machine code, what bandwidth an H100 could
ask for in kernels that read branches. A copy moves about 3.0 TB/s there, 4.3 TB/s on an H200;
tb_s and what it is made of are explained in perf/static/model.py.
"""

import argparse
import os
from pathlib import Path

from perf.commands.files import table_file
from perf.rows.errors import UsageError

_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_WHAT = ["target", "kernel", "norm", "M", "layout", "dtype", "C", "S"]
_RESOURCES = [
    "registers",
    "spill_bytes",
    "stack_bytes",
    "shared_bytes",
    "load_bytes",
    "store_bytes",
]
_CEILING = [
    "kernel",
    "norm",
    "M",
    "layout",
    "dtype",
    "B",
    "C",
    "S",
    "programs",
    "resident",
    "waves",
    "load_groups",
    "asynchronous",
    "flight_kb",
    "tb_s",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what is compiled for, and where the table goes."""
    parser.add_argument(
        "--target",
        nargs="+",
        choices=_TARGETS,
        default=_TARGETS,
        help="what to compile for; default: all. Ceilings are modelled of sm_90",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="write the table there as well"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the table; exits with 1 where a kernel spills."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise UsageError("TRITON_INTERPRET: kernels cannot be compiled where it is 1; unset it")
    from perf.static.kernels import kernel_table
    from perf.static.model import COPY_TB_S

    with table_file(args.out) as write:
        table = kernel_table(args.target)
        print(table[_WHAT + _RESOURCES].drop_duplicates().to_string(index=False))
        if "tb_s" in table:
            modelled = table[table.tb_s.notna()]
            of_copy = (modelled.tb_s / COPY_TB_S["H100"]).round(2)
            print("\nmodelled, not measured\n")
            print(modelled[_CEILING].round(2).assign(of_copy=of_copy).to_string(index=False))
        write(table)
    return int(bool((table.spill_bytes + table.stack_bytes).any()))
