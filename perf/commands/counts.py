"""What needs no GPU: bytes and launches counted, the host's time, kernels compiled ahead."""

import argparse
import math
import os
import sys
from dataclasses import asdict

import pandas as pd
import torch

from perf.commands.options import add_table, needs_compiler, table_file, whole_number
from perf.rows import UsageError
from perf.rows.schema import SIZES
from sknet_kernels.config import MAX_BRANCHES

# Of one branch: the interpreter takes a minute for as many.
MOST_ELEMENTS = 2**24
_MOST_ROUNDS = 10_000

_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_WHAT = ["target", "kernel", "norm", "M", "layout", "dtype", "C", "S"]
_RESOURCES = [
    *("registers", "spill_bytes", "stack_bytes"),
    *("shared_bytes", "load_bytes", "store_bytes", "tf32"),
]
_CEILING = [
    *("kernel", "norm", "M", "layout", "dtype", "B", "C", "S"),
    *("programs", "resident", "waves", "load_groups", "asynchronous", "flight_kb", "tb_s"),
]


def add_traffic(parser: argparse.ArgumentParser) -> None:
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
    add_table(parser)


def traffic(args: argparse.Namespace) -> int:
    """Count the bytes and launches of fuse_select: eager, torch.compile, and the Triton kernels.

    Everything between the convolutions and V, in passes over one branch tensor (B * C * H * W
    elements). Runs on a CPU: torch.compile's figures are Inductor's own count of its plan for a
    CPU, and the kernels run in Triton's interpreter, where every load and store is counted.
    Launches are those of SKConv with its running statistics: of eager PyTorch the operators that a
    backend carries out, of Triton what reaches a driver without a device.
    """
    if min(args.shape) < 1 or args.shape[0] < 2 or math.prod(args.shape) > MOST_ELEMENTS:
        raise UsageError(
            f"--shape: expected B >= 2, positive sizes and at most {MOST_ELEMENTS:,} elements, "
            f"got {list(args.shape)}"
        )
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        # torch may have imported triton by now, which reads the variable only once.
        command = [sys.executable, "-m", "perf", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
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


def add_host(parser: argparse.ArgumentParser) -> None:
    """Declares how often and where the table goes."""
    parser.add_argument(
        "--rounds",
        type=whole_number(2, _MOST_ROUNDS),
        default=40,
        metavar="N",
        help="turns that each side takes (default: 40)",
    )
    add_table(parser)


def host(args: argparse.Namespace) -> int:
    """Time the host's share of a call, ours beside the plain modules; Triton launches into nothing.

    Needs triton but no GPU: a driver without a device compiles and binds the kernels for sm_90 and
    launches nothing. Tiny tensors, one thread, both sides in turn; CPU time, in microseconds.
    """
    needs_compiler("nothing is launched")
    from perf.static import launches

    with table_file(args.out) as write:
        launches.install()
        torch.set_num_threads(1)
        table = pd.DataFrame([asdict(row) for row in launches.host(args.rounds)])
        print(table.to_string(index=False, float_format="{:.2f}".format))
        write(table)
    return 0


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """Declares what is compiled for, and where the table goes."""
    parser.add_argument(
        "--target",
        nargs="+",
        choices=_TARGETS,
        default=_TARGETS,
        help="what to compile for; default: all. Ceilings are modelled of sm_90",
    )
    parser.add_argument(
        "--at-risk",
        action="store_true",
        help="only the launches that a change of tiles or compilers breaks first, as the tests do",
    )
    parser.add_argument(
        "--branches",
        nargs="+",
        type=whole_number(1, MAX_BRANCHES),
        default=(),
        metavar="M",
        help="only training steps with so many branches, of one shape, for their spills",
    )
    add_table(parser)


def kernels(args: argparse.Namespace) -> int:
    """Compile every kernel for GPUs that are not there: registers, spills, access widths, ceilings.

    Needs triton but no GPU: sm_80, sm_90, sm_100 and gfx942 are compiled for, in processes of their
    own. spill_bytes and stack_bytes are to be 0, and where one is not the command exits with 1;
    load_bytes and store_bytes are the widest access of a thread, 16 where `fast` is true.

    The second table is modelled, not measured: from sm_90's machine code, what bandwidth an H100
    could ask for in kernels that read branches. A copy moves about 3.0 TB/s there, 4.3 TB/s on an
    H200; tb_s and what it is made of are explained in perf/static/model.py.
    """
    needs_compiler("kernels cannot be compiled")
    from perf.static.compiled import kernel_table
    from perf.static.model import COPY_TB_S

    with table_file(args.out) as write:
        table = kernel_table(args.target, args.branches, args.at_risk)
        print(table[_WHAT + _RESOURCES].drop_duplicates().to_string(index=False))
        if "tb_s" in table:
            modelled = table[table.tb_s.notna()]
            of_copy = (modelled.tb_s / COPY_TB_S["H100"]).round(2)
            print("\nmodelled, not measured\n")
            print(modelled[_CEILING].round(2).assign(of_copy=of_copy).to_string(index=False))
        write(table)
    return int(bool((table.spill_bytes + table.stack_bytes).any()))
