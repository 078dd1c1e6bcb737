"""Measure: a sweep over cases and providers, written to one CSV and shown as a table.

Without arguments it runs the preset quick. The preset family has the modules of other packages
before (plain-...) and after accelerate (ours-...). --level
and --workload pick from the preset; every other choice replaces the preset's own values, in every
case that has such a value. A range START:STOP:STEP includes STOP. Under torchrun the cases are
shared out over the processes.
"""

import argparse
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from perf.report import tables
from perf.rows import cases, env, schema
from perf.rows.errors import UsageError
from perf.rows.store import Store, merge, open_store
from perf.sweep.contest import Conditions
from perf.sweep.presets import PRESETS, Grid, Job, jobs
from perf.sweep.progress import Progress
from perf.sweep.providers import PROVIDERS
from perf.sweep.ranks import Rank, part_of, parts_of, this_rank, together, wait_for_all
from perf.sweep.sweep import Ending, sweep, unfinished

STATUSES: dict[Ending, int] = {
    "complete": 0,
    "budget": 0,
    "interrupt": 128 + signal.SIGINT,
    "lost": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the axes, the output and the limits."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="cases to start from (default: quick)")
    add("--level", nargs="+", choices=cases.LEVELS, help="keep only these levels of the preset")
    add(
        "--workload",
        nargs="+",
        choices=cases.LEVEL_OF,
        metavar="NAME",
        help=f"keep only these workloads of the preset: {', '.join(cases.LEVEL_OF)}",
    )
    add("--batch", nargs="+", type=sizes, metavar="N", help="batch sizes, or START:STOP:STEP")
    add("--resolution", nargs="+", type=sizes, metavar="N", help="image sizes, or START:STOP:STEP")
    add("--stage", nargs="+", type=int, choices=cases.STAGES, help="SKNet stages (op and layer)")
    add("--branches", nargs="+", type=sizes, metavar="M", help="numbers of branches M")
    add("--dtype", nargs="+", choices=cases.DTYPES)
    add("--layout", nargs="+", choices=cases.LAYOUTS)
    add(
        "--mode",
        nargs="+",
        choices=cases.MODES,
        help="infer: forward; train: forward and backward; bwd: backward alone, not of models",
    )
    add("--provider", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add("--out", type=Path, metavar="FILE.csv", help="default: named after preset and machine")
    add("--resume", action="store_true", help="go on with --out and skip the rows it has")
    add("--seed", type=int, default=0, help="of inputs, parameters and the order (default: 0)")
    add(
        "--threads",
        type=positive,
        default=1,
        metavar="N",
        help="of PyTorch, where there is no GPU (default: 1)",
    )
    add(
        "--budget",
        type=positive_seconds,
        metavar="SECONDS",
        help="end in time with what is done (default: the preset's)",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the sweep, prints the table and the path of the CSV."""
    rank = this_rank()
    device = env.default_device(rank.local)
    if device.type == "cpu":
        # More threads wait for each other at every operation, and on a machine with anything else
        # to do they measure the scheduler: a digits step took 8 ms or 200 ms with two threads.
        torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    todo = jobs(selected(preset.grids, args), args.seed)
    path = args.out or Path(default_name(args, device))
    conditions = Conditions(device, args.seed, preset.seconds, preset.rounds)
    with together(rank):
        if rank.index == 0:
            _check_output(path, args.resume)
        wait_for_all(rank)
        store = _open(path, rank, args.resume)
        share = todo[rank.index :: rank.count]
        progress = Progress(len(unfinished(share, store)), shown=rank.index == 0)
        budget = args.budget or preset.budget
        ending = sweep(share, store, conditions, ranks=rank.count, budget=budget, progress=progress)
        progress.close()
        wait_for_all(rank)
        if rank.index == 0:
            merge(path, parts_of(path))
            _report(path, todo, ending)
    return STATUSES[ending]


def selected(grids: Sequence[Grid], args: argparse.Namespace) -> tuple[Grid, ...]:
    """Returns the grids of the chosen levels with the axes that the command line gives.

    Raises:
        UsageError: no grid of the preset has a chosen level, or a chosen workload.
    """
    levels, workloads = args.level or cases.LEVELS, args.workload or tuple(cases.LEVEL_OF)
    of_level = [grid for grid in grids if grid.level in levels]
    kept = [
        replace(grid, workloads=names)
        for grid in of_level
        if (names := tuple(name for name in grid.workloads if name in workloads))
    ]
    for option, chosen, present in (
        ("--level", args.level, {grid.level for grid in of_level}),
        ("--workload", args.workload, {name for grid in kept for name in grid.workloads}),
    ):
        missing = [name for name in chosen or () if name not in present]
        if missing:
            raise UsageError(
                f"{option}: the preset {args.preset} has no {', '.join(missing)} cases"
            )
    given = {
        "batches": _flat(args.batch),
        "resolutions": _flat(args.resolution),
        "Ms": _flat(args.branches),
        "stages": args.stage,
        "dtypes": args.dtype,
        "layouts": args.layout,
        "modes": args.mode,
        "providers": args.provider,
    }
    axes = {name: tuple(values) for name, values in given.items() if values}
    return tuple(replace(grid, **axes) for grid in kept)


def default_name(args: argparse.Namespace, device: torch.device) -> str:
    """Returns a file name that says what was measured where: what was chosen, device, torch."""
    what = "-".join((args.preset, *(args.level or ()), *(args.workload or ())))
    where = re.sub(r"\W+", "-", env.gpu_name(device).lower()) or "cpu"
    return f"perf-{what}-{where}-torch{torch.__version__.partition('+')[0]}.csv"


def positive(text: str) -> int:
    """Parses a positive number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def sizes(text: str) -> list[int]:
    """Parses a positive number, or a range START:STOP:STEP that includes STOP."""
    match = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", text)
    numbers = [int(group) for group in match.groups() if group] if match else []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor a range")
    if len(numbers) == 1:
        return numbers
    start, stop, step = numbers
    if start > stop:
        raise argparse.ArgumentTypeError(f"the range {text!r} is empty")
    return list(range(start, stop + 1, step))


def positive_seconds(text: str) -> float:
    """Parses a positive number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def _flat(lists: list[list[int]] | None) -> list[int]:
    return [size for sizes in lists or () for size in sizes]


def _check_output(path: Path, resume: bool) -> None:
    """Refuses what cannot be written, and collects what ranks of an earlier run left behind."""
    if not path.parent.is_dir():
        raise UsageError(f"--out: {path.parent} is no directory")
    parts = parts_of(path)
    for left in (path, *parts):
        if left.exists() and not resume:
            raise UsageError(
                f"--out: {left} exists; go on with it by --resume, or choose another --out"
            )
    try:
        merge(path, parts)
        if path.exists():
            schema.check_header(schema.complete_lines(path) or schema.header(), path)
    except schema.SchemaError as error:
        raise UsageError(f"--out: {error}") from error


def _open(path: Path, rank: Rank, resume: bool) -> Store:
    """Opens this rank's part, which counts the rows of the report as its own."""
    store = open_store(part_of(path, rank), resume=resume)
    if rank.count > 1 and path.exists():
        store.keys |= schema.keys(schema.complete_lines(path))
    return store


def _report(path: Path, todo: list[Job], ending: Ending) -> None:
    frame = schema.read(path)
    print(tables.table(frame))
    for line in tables.not_measured(frame):
        print(line)
    missing = unfinished(todo, open_store(path, resume=True))
    if missing:
        why = {
            "interrupt": "interrupted",
            "budget": "the budget is spent",
            "lost": "the device is lost",
            "complete": "cut short",
        }
        rows = sum(len(job.providers) for job in todo)
        rest = sum(len(job.providers) for job in missing)
        print(
            f"{why[ending]}: {rows - rest} of {rows} rows done; missing (--resume measures them):"
        )
        for job in missing:
            print(f"  {job.case.label}: {', '.join(job.providers)}")
    print(path)
