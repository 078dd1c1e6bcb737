"""Compile every kernel for GPUs that are not there, and print registers, spills and access widths.

Needs triton but no GPU: sm_80, sm_90, sm_100 and gfx942 are compiled for, in processes of their
own. spill_bytes and stack_bytes are to be 0; load_bytes and store_bytes are the widest access of a
thread, 16 where `fast` is true.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import torch

from perf.rows import env
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

    table = kernel_table()
    print(table[_SHOWN].to_string(index=False))
    if args.out is not None:
        where = asdict(env.snapshot(torch.device("cpu"), seed=0, ranks=1))
        table.assign(**where).to_csv(args.out, index=False)
        print(f"\n{args.out}")
    return int(bool((table.spill_bytes + table.stack_bytes).any()))
