"""Count the bytes that fuse_select moves and saves: eager, torch.compile, and the Triton kernels.

Everything between the convolutions and V, in passes over one branch tensor (B * C * H * W
elements). Runs on a CPU: torch.compile's figure is Inductor's own count of its plan for a CPU, and
the kernels run in Triton's interpreter, where every load and store is counted.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from perf.rows import env
from perf.rows.errors import UsageError


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
    if min(args.shape) < 1 or args.shape[0] < 2:
        raise UsageError(f"--shape: expected B >= 2 and positive sizes, got {list(args.shape)}")
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        # torch may have imported triton by now, which reads the variable only once.
        command = [sys.executable, "-m", "perf", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    from perf.static.traffic import traffic

    rows = traffic(tuple(args.shape), getattr(torch, args.dtype))
    table = pd.DataFrame([asdict(row) for row in rows])
    print(table.to_string(index=False, float_format="{:.2f}".format))
    if args.out is not None:
        where = asdict(env.snapshot(torch.device("cpu"), seed=0, ranks=1))
        sizes = dict(zip("BCHW", args.shape, strict=True))
        table.assign(**sizes, **where).to_csv(args.out, index=False)
        print(f"\n{args.out}")
    return 0
