"""Launch configurations: timed into the table that the kernels read, or listed as modelled."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from perf.commands.options import (
    DEVICES,
    chosen_device,
    duration,
    needs_compiler,
    seed,
    sizes,
    whole_number,
)
from perf.commands.run import STATUSES
from perf.rows import env, schema
from perf.rows.schema import TUNED
from perf.rows.store import open_store
from perf.sweep.contest import BudgetSpentError, Conditions
from perf.sweep.sweep import deadline, this_rank
from sknet_kernels.config import MAX_BRANCHES, STREAMING_KERNELS
from sknet_kernels.small import SMALL_KERNELS
from sknet_kernels.tuned import table_path

if TYPE_CHECKING:  # they import triton, which only the work itself needs
    from perf.static.trials import Subject

_KERNELS = {kernel.name: kernel for kernel in (*STREAMING_KERNELS, *SMALL_KERNELS)}
_LARGEST = 10_000
# Of each candidate, on a GPU.
_SECONDS, _ROUNDS = 0.05, 2


def add_tune(parser: argparse.ArgumentParser) -> None:
    """Declares the axes, the output and the limits."""
    add = parser.add_argument
    add(
        "--kernel",
        nargs="+",
        choices=_KERNELS,
        default=list(_KERNELS),
        metavar="NAME",
        help=f"only: {', '.join(_KERNELS)}",
    )
    add(
        "--batch",
        nargs="+",
        type=sizes,
        default=[range(32, 33), range(128, 129)],
        metavar="N",
        help="batch sizes, or START:STOP:STEP (default: 32 128)",
    )
    add(
        "--resolution",
        type=whole_number(1, _LARGEST),
        default=224,
        metavar="N",
        help="image size (default: 224)",
    )
    add("--stage", nargs="+", type=int, choices=schema.STAGES, default=schema.STAGES)
    add("--branches", type=whole_number(1, MAX_BRANCHES), default=2, metavar="M", help="default: 2")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    add("--layout", nargs="+", choices=schema.LAYOUTS, default=schema.LAYOUTS)
    add("--device", choices=DEVICES, help="default: a GPU where there is one; cpu lists")
    add("--out", type=Path, metavar="FILE.csv", help="default: where the kernels read it")
    add("--resume", action="store_true", help="go on with the table and skip the rows it has")
    add("--seed", type=seed, default=0, metavar="N", help="of inputs (default: 0)")
    add("--budget", type=duration("seconds"), metavar="SECONDS", help="end in time")


def tune(args: argparse.Namespace) -> int:
    """Time the launch configurations of every kernel and write this GPU's table.

    Each candidate's results are compared with float64 and with the heuristics' before it is timed.
    The table is appended to row by row, and lies where the kernels read it; --out puts it
    elsewhere. Then it says what the choices gain over the heuristics. Exits with 1 where the device
    was lost, or where the heuristics' own results were wrong.

    Without a GPU nothing is timed or written: candidates are listed in the order of
    perf/static/model.py for an H100, which is modelled, not measured: streaming kernels by the
    bandwidth that they can ask for, small ones by what the busiest multiprocessor reads.
    """
    device = chosen_device(args.device, this_rank())
    if device.type == "cpu":
        needs_compiler("kernels cannot be compiled")
    from perf.sweep.tuning import subjects

    chosen = subjects(
        [_KERNELS[name] for name in args.kernel],
        args.layout,
        args.stage,
        [size for given in args.batch for size in given],
        resolution=args.resolution,
        M=args.branches,
        dtype=args.dtype,
        device="meta" if device.type == "cpu" else device,
    )
    if device.type == "cpu":
        return _listed(chosen, args.budget)
    return _timed(chosen, Conditions(device, args.seed, _SECONDS, _ROUNDS), args)


def _listed(chosen: Sequence["Subject"], budget: float | None) -> int:
    from perf.static.trials import modelled

    print("modelled, not measured: TB/s that an H100 could ask for, or KiB that it reads")
    try:
        with deadline(budget):
            for subject in chosen:
                rows = pd.DataFrame(modelled(subject)).round(2)
                print(f"\n{subject.label}\n{rows.to_string(index=False)}", flush=True)
    except BudgetSpentError:
        print("the budget is spent", file=sys.stderr)
    return 0


def _timed(chosen: Sequence["Subject"], conditions: Conditions, args: argparse.Namespace) -> int:
    from perf.sweep import tuning

    path = args.out or table_path(env.gpu_name(conditions.device))
    if args.out is None:
        path.parent.mkdir(exist_ok=True)
    with open_store(path, resume=args.resume, columns=TUNED) as store:
        ending = tuning.tune(chosen, store, conditions, budget=args.budget)
        rest = tuning.unfinished(chosen, store, conditions.device)
    table = TUNED.read(path)
    gain = table.heuristic_ms / table.ms
    shown = table[[*TUNED.names[: TUNED.names.index("timed")]]].assign(gain=gain.round(3))
    for streaming in (True, False):
        part = shown[shown.S.notna() == streaming].dropna(axis="columns", how="all")
        if len(part):
            print(part.to_string(index=False))
    better = int((gain > 1).sum())
    total = table.heuristic_ms.sum() / table.ms.sum() if len(table) else 1.0
    print(
        f"{len(table)} rows, {better} faster than the heuristics: {total:.3f} times as fast "
        f"together; {len(rest)} of {len(chosen)} missing (--resume times them): {ending}"
    )
    print(path)
    return STATUSES[ending] or int(ending == "complete" and bool(rest))
