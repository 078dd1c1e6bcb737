"""What measures and judges: the sweep, its check alone, and the environment of its rows."""

import argparse
import math
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from perf.commands.options import (
    DEVICES,
    check_providers,
    check_times,
    chosen_device,
    duration,
    seed,
    sizes,
    whole_number,
)
from perf.report import tables
from perf.rows import UsageError, schema
from perf.rows import env as environment
from perf.rows.store import Store, collect, open_store
from perf.rows.typed_csv import contents
from perf.sweep.contest import Conditions, DeviceLostError, judge_case
from perf.sweep.presets import PRESETS, Grid, Job, jobs
from perf.sweep.providers import PROVIDERS
from perf.sweep.sweep import (
    Ending,
    Team,
    part_of,
    parts_of,
    sweep,
    this_rank,
    together,
    unfinished,
)
from perf.sweep.workloads import LEVEL_OF

STATUSES: dict[Ending, int] = {
    "complete": 0,
    "budget": 0,
    "interrupt": 128 + signal.SIGINT,
    "lost": 1,
}
MOST_CASES = 10_000
_MOST_THREADS = 1024


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declares the axes, the output and the limits."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="cases to start from (default: quick)")
    add("--level", nargs="+", choices=schema.LEVELS, help="keep only these levels of the preset")
    add(
        "--workload",
        nargs="+",
        choices=LEVEL_OF,
        metavar="NAME",
        help=f"keep only these workloads of the preset: {', '.join(LEVEL_OF)}",
    )
    add("--batch", nargs="+", type=sizes, metavar="N", help="batch sizes, or START:STOP:STEP")
    add("--resolution", nargs="+", type=sizes, metavar="N", help="image sizes, or START:STOP:STEP")
    add("--stage", nargs="+", type=int, choices=schema.STAGES, help="SKNet stages (op and layer)")
    add("--branches", nargs="+", type=sizes, metavar="M", help="numbers of branches M")
    add("--dtype", nargs="+", choices=schema.DTYPES)
    add("--layout", nargs="+", choices=schema.LAYOUTS)
    add(
        "--mode",
        nargs="+",
        choices=schema.MODES,
        help="infer: forward; train: forward and backward; bwd: backward alone, not of models",
    )
    add("--provider", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add("--device", choices=DEVICES, help="default: a GPU where there is one")
    add("--out", type=Path, metavar="FILE.csv", help="default: named after preset and machine")
    add("--resume", action="store_true", help="go on with --out and skip the rows it has")
    add(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="of inputs, parameters and the order (default: 0)",
    )
    add(
        "--threads",
        type=whole_number(1, _MOST_THREADS),
        default=1,
        metavar="N",
        help="of PyTorch, where there is no GPU (default: 1)",
    )
    add(
        "--budget",
        type=duration("seconds"),
        metavar="SECONDS",
        help="end in time with what is done (default: the preset's)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure: a sweep over cases and providers, written to one CSV and shown as a table.

    Without arguments it runs the preset quick. The preset family has the modules of other packages
    before (plain-...) and after accelerate (ours-...). --level and --workload pick from the preset;
    every other choice replaces the preset's own values, in every case that has such a value. A
    range START:STOP:STEP includes STOP. Under torchrun the cases are shared out over the processes.
    Exits with 1 where the device was lost.
    """
    rank = this_rank()
    device = chosen_device(args.device, rank)
    if device.type == "cpu":
        # More threads wait for each other at every operation, and on a machine with anything else
        # to do they measure the scheduler: a digits step took 8 ms or 200 ms with two threads.
        torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    todo = jobs(selected(preset.grids, args), args.seed)
    path = args.out or Path(default_name(args, device))
    conditions = Conditions(device, args.seed, preset.seconds, preset.rounds)
    budget = args.budget or preset.budget
    with together(rank) as team, _opened(path, team, resume=args.resume) as (report, own):
        share = todo[rank.index :: rank.count]
        first = rank.index == 0
        ending = sweep(share, own, conditions, ranks=rank.count, budget=budget, shown=first)
        own.close()
        team.wait()
        if report is not None:
            collect(report, parts_of(path))
            _show(report, todo, ending)
    return STATUSES[ending]


def selected(grids: Sequence[Grid], args: argparse.Namespace) -> tuple[Grid, ...]:
    """Returns the grids of the chosen levels with the axes that the command line gives.

    Raises:
        UsageError: no grid of the preset has a chosen level, or a chosen workload.
    """
    levels, workloads = args.level or schema.LEVELS, args.workload or tuple(LEVEL_OF)
    chosen_names = {name for name in workloads if LEVEL_OF[name] in levels}
    kept = [
        replace(grid, workloads=names)
        for grid in grids
        if (names := tuple(name for name in grid.workloads if name in chosen_names))
    ]
    for option, chosen, present in (
        ("--level", args.level, {LEVEL_OF[name] for grid in grids for name in grid.workloads}),
        ("--workload", args.workload, {name for grid in kept for name in grid.workloads}),
    ):
        missing = [name for name in chosen or () if name not in present]
        if missing:
            raise UsageError(
                f"{option}: the preset {args.preset} has no {', '.join(missing)} cases"
            )
    given = {
        "batches": _flat("--batch", args.batch),
        "resolutions": _flat("--resolution", args.resolution),
        "Ms": _flat("--branches", args.branches),
        "stages": args.stage,
        "dtypes": args.dtype,
        "layouts": args.layout,
        "modes": args.mode,
        "providers": args.provider,
    }
    axes = {name: tuple(values) for name, values in given.items() if values}
    chosen = tuple(replace(grid, **axes) for grid in kept)
    combinations = sum(math.prod(map(len, grid.axes)) for grid in chosen)
    if combinations > MOST_CASES:
        raise UsageError(f"{combinations:,} cases are more than the {MOST_CASES:,} of a sweep")
    return chosen


def default_name(args: argparse.Namespace, device: torch.device) -> str:
    """Returns a file name that says what was measured where: what was chosen, device, torch."""
    what = "-".join((args.preset, *(args.level or ()), *(args.workload or ())))
    where = re.sub(r"\W+", "-", environment.gpu_name(device).lower()) or "cpu"
    return f"perf-{what}-{where}-torch{torch.__version__.partition('+')[0]}.csv"


def _flat(option: str, ranges: list[range] | None) -> list[int]:
    values = sum(map(len, ranges or ()))
    if values > MOST_CASES:
        raise UsageError(f"{option}: {values:,} values are more than the {MOST_CASES:,} of a sweep")
    return [size for sizes in ranges or () for size in sizes]


@contextmanager
def _opened(path: Path, team: Team, *, resume: bool) -> Iterator[tuple[Store | None, Store]]:
    """Opens the report, which rank 0 keeps, and the file that this rank writes.

    What ranks of an earlier run left behind is in the report by then, and what is in the report
    this rank counts as its own.
    """
    with ExitStack() as stack:
        report = None
        with team.all_or_none():
            if team.rank.index == 0:
                left = parts_of(path) if path.parent.is_dir() else []
                if left and not resume:
                    raise UsageError(f"{left[0]} is left of another run; --resume collects it")
                report = stack.enter_context(open_store(path, resume=resume))
                there = schema.read(path)
                check_providers(path, there)
                check_times(path, there)
                collect(report, left)
        if team.rank.count == 1:
            assert report is not None
            yield report, report
            return
        with team.all_or_none():
            own = stack.enter_context(open_store(part_of(path, team.rank), resume=False))
            own.keys |= schema.SCHEMA.rows(contents(path), path).keys()
        yield report, own


def _show(report: Store, todo: list[Job], ending: Ending) -> None:
    frame = schema.read(report.path)
    print(tables.table(frame))
    for line in tables.not_measured(frame):
        print(line)
    missing = unfinished(todo, report)
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
    print(report.path)


def add_check(parser: argparse.ArgumentParser) -> None:
    """Declares the cases, who carries them out, and where."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="gpu-checks", help="cases (default: gpu-checks)")
    add("--provider", nargs="+", choices=PROVIDERS, metavar="NAME", help="not the preset's")
    add("--device", choices=DEVICES, help="default: a GPU where there is one")
    add("--seed", type=seed, default=0, metavar="N")


def check(args: argparse.Namespace) -> int:
    """Check the kernels' results on chosen cases, against float64; nothing is timed or written.

    Prints a line for each case and provider, and exits with 1 where one is not right or the device
    was lost. Meant to run under compute-sanitizer as well, which slows every access down.
    """
    device = chosen_device(args.device, this_rank())
    conditions = Conditions(device, args.seed, seconds=0.0, rounds=1)
    wrong = 0
    for job in jobs(PRESETS[args.preset].grids, args.seed):
        names = args.provider or job.providers
        try:
            results = judge_case(job.case, tuple(PROVIDERS[name] for name in names), conditions)
        except DeviceLostError as error:
            print(f"{job.case.label}: the device is lost: {error}", file=sys.stderr)
            return STATUSES["lost"]
        for name, result in results.items():
            wrong += result.status not in ("ok", "unsupported")
            line = f"{result.status:11} {job.case.label}: {name} {result.reason}"
            print(line.rstrip(), flush=True)
    return int(wrong > 0)


def env(args: argparse.Namespace) -> int:
    """Print the environment that a row would carry."""
    rank = this_rank()
    device = environment.default_device(rank.local)
    for name, value in asdict(environment.snapshot(device, seed=0, ranks=rank.count)).items():
        print(f"{name:14} {value}")
    return 0
