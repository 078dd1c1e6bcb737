"""Time the host's share of a call, ours beside the plain modules; Triton launches into nothing.

Needs triton but no GPU: a driver without a device compiles and binds the kernels for sm_90 and
launches nothing. Tiny tensors, one thread, both sides in turn; CPU time, in microseconds.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from perf.commands.files import table_file
from perf.rows.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares how often and where the table goes."""
    parser.add_argument(
        "--rounds", type=int, default=40, help="turns that each side takes (default: 40)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="write the table there as well"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the table."""
    if args.rounds < 2:
        raise UsageError(f"--rounds: expected at least 2, got {args.rounds}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise UsageError("TRITON_INTERPRET: nothing is launched where it is 1; unset it")
    from perf.static import null_driver
    from perf.static.host import host

    with table_file(args.out) as write:
        null_driver.install()
        torch.set_num_threads(1)
        table = pd.DataFrame([asdict(row) for row in host(args.rounds)])
        print(table.to_string(index=False, float_format="{:.2f}".format))
        write(table)
    return 0
