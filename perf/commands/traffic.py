"""Count the bytes and the launches of fuse_select: eager, torch.compile, and the Triton kernels.

Everything between the convolutions and V, in passes over one branch tensor (B * C * H * W
elements). Runs on a CPU: torch.compile's figures are Inductor's own count of its plan for a CPU,
and the kernels run in Triton's interpreter, where every load and store is counted. Launches are
those of SKConv with its running statistics: of eager PyTorch the operators that a backend carries
out, of Triton what reaches a driver without a device.
"""

import argparse
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from perf.commands.files import table_file
from perf.rows.errors import UsageError
from perf.rows.traffic import SIZES

# Of one branch: the interpreter takes a minute for as many.
MOST_ELEMENTS = 2**24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the shape, the dtype and where the table goes."""
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        default=(4, 32, 56, 56),
        metavar=("B", "C", "H", "W"),
        help="of one branch; small tensors show at small sizes (default: 4 32 56 56)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="write the table there as well"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the table."""
    if min(args.shape) < 1 or args.shape[0] < 2 or math.prod(args.shape) > MOST_ELEMENTS:
        raise UsageError(
            f"--shape: expected B >= 2, positive sizes and at most {MOST_ELEMENTS:,} elements, "
            f"got {list(args.shape)}"
        )
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        # torch may have imported triton by now, which reads the variable only once.
        command = [sys.executable, "-m", "perf", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    from perf.static.launches import launches_of
    from perf.static.traffic import traffic

    with table_file(args.out) as write:
        counted = launches_of(tuple(args.shape), args.dtype)
        table = pd.DataFrame(
            [
                {**asdict(row), **asdict(counted[row.M, row.layout, row.provider])}
                for row in traffic(tuple(args.shape), getattr(torch, args.dtype))
            ]
        )
        print(table.to_string(index=False, float_format="{:.2f}".format))
        write(table.assign(**dict(zip(SIZES, args.shape, strict=True))))
    return 0
