"""The campaign: what to measure on a GPU that is there for minutes, in which order, for how long.

Every part is a command of its own process, so that a part that hangs or loses the device costs its
own time only. The time left is dealt out anew before each part, by the parts' estimates.
"""

import argparse
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from perf.commands.options import DEVICES, duration
from perf.commands.run import STATUSES
from perf.report import tables
from perf.rows import StopError, UsageError, schema
from perf.rows.env import CHECKOUT
from perf.rows.schema import SCHEMA, TUNED, Level
from perf.rows.store import lock, open_store
from perf.rows.typed_csv import Schema
from perf.sweep.presets import PRESETS, jobs
from perf.sweep.providers import PROVIDERS

# Sizes for a processor, where the campaign can only be rehearsed.
REHEARSAL = ("--batch", "2", "--resolution", "32")
# Seconds that a part gets to end by itself after its budget, and after it was told to.
GRACE = 10.0
TERMINATED = 128 + signal.SIGTERM
# Ends its process group when its input ends, which nobody holds open but who started it.
LEASH = ("sh", "-c", "read line; kill -s KILL 0")
PERF = (sys.executable, "-m", "perf")

# Seconds that a part gets at least.
LEAST = 30.0
# Seconds of a process before it measures, and of a case before its providers: the float64 check.
START = 15.0
CHECK: dict[Level, float] = {"pass": 0.6, "op": 2.0, "layer": 3.0, "model": 10.0}
# Seconds that a provider takes to compile inference; training takes twice as long. Estimates for a
# dozen cores; nobody has measured them.
COMPILATION: dict[Level, float] = {"op": 6.0, "layer": 8.0, "model": 45.0}
# Seconds of a streaming kernel's candidates at one size, compilation included; as little measured.
# Kernels by layouts, stages and batches; small kernels come after them, in what time is left.
TUNING, _TUNED = 6.0, 6 * 2 * 4 * 2


@dataclass(frozen=True)
class Part:
    """One command of the campaign.

    Attributes:
        name: in one word.
        what: it shows, in a line.
        command: to run, without what the campaign adds.
        seconds: estimated.
        columns: of the file that it appends to; it takes a budget, as ``run`` does. None appends
            nothing.
        beside: what tells the name of that file from the report's.
        environment: variables of its own.
    """

    name: str
    what: str
    command: tuple[str, ...]
    seconds: float
    columns: Schema | None = SCHEMA
    beside: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def file(self, report: Path) -> Path:
        """Returns the file that it appends to."""
        return report.with_name(f"{report.stem}{self.beside}{report.suffix}")


def parts(which: Callable[[str], str | None] = shutil.which) -> tuple[Part, ...]:
    """Returns the parts in their order: right, then raw bandwidth, then against others.

    Args:
        which: finds a program; the sanitizer's part is there only where the sanitizer is.
    """
    sanitizer = which("compute-sanitizer")
    return (
        Part(
            "environment", "device, driver, versions, commit", (*PERF, "env"), START, columns=None
        ),
        _swept("copy", "copies at the sizes of the stages", "gpu-passes", "copy"),
        _swept("checks", "twenty chosen cases against float64", "gpu-checks"),
        *(_watched(sanitizer, tool) for tool in ("memcheck", "racecheck") if sanitizer),
        _swept(
            "passes",
            "every streaming kernel alone, at the four stages",
            "gpu-passes",
            *("moments", "fuse", "select", "sums", "dx"),
        ),
        _swept(
            "fuse-select",
            "between the convolutions and V, against torch.compile",
            "gpu-fuse-select",
        ),
        _swept("conv", "SKConv, against torch.compile and timm", "gpu-conv"),
        _swept("network", "SKNet-50, against timm's networks", "gpu-network"),
        _swept("small", "small batches, in CUDA graphs and without", "gpu-small"),
        Part(
            "tune",
            "launch configurations of every kernel, against the heuristics'",
            (*PERF, "tune"),
            START + _TUNED * TUNING,
            columns=TUNED,
            beside="-tuned",
            environment={"TRITON_INTERPRET": "0"},
        ),
    )


def _watched(sanitizer: str, tool: str) -> Part:
    return Part(
        tool,
        "the twenty cases again, every access watched by the sanitizer",
        (sanitizer, "--tool", tool, "--error-exitcode", "1", *PERF, "check"),
        150.0,
        columns=None,
        # Between the blocks of PyTorch's cache an access beyond a tensor would go unseen.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def share(seconds: float, part: Part, rest: Sequence[Part]) -> float:
    """Returns the seconds of ``part`` when ``seconds`` are left for it and for ``rest``.

    They are in proportion to the estimates, but a part that is begun gets enough to end; 0 where
    that is not left. Parts that come first are worth more.
    """
    proportional = seconds * part.seconds / (part.seconds + sum(later.seconds for later in rest))
    return min(max(proportional, LEAST), seconds) if seconds >= LEAST else 0.0


def _swept(name: str, what: str, preset: str, *workloads: str) -> Part:
    chosen = ("--workload", *workloads) if workloads else ()
    command = (*PERF, "run", "--preset", preset, *chosen)
    return Part(name, what, command, START + _seconds(preset, workloads))


def _seconds(preset: str, workloads: tuple[str, ...]) -> float:
    """Estimates the cases of ``workloads`` in a preset, of all where none is named."""
    chosen = PRESETS[preset]
    total = 0.0
    for job in jobs(chosen.grids, seed=0):
        case = job.case
        if workloads and case.workload not in workloads:
            continue
        total += CHECK[case.level]
        for name in job.providers:
            total += 2 * chosen.seconds
            if PROVIDERS[name].compiles:
                total += COMPILATION[case.level] * (2 if case.differentiates else 1)
    return total


def add_campaign(parser: argparse.ArgumentParser) -> None:
    """Declares the time, the output and the device."""
    add = parser.add_argument
    add("--minutes", type=duration("minutes"), default=30.0, metavar="N", help="default: 30")
    add("--dry-run", action="store_true", help="print the plan and do nothing")
    names = [part.name for part in parts(which=str)]
    add("--part", nargs="+", choices=names, metavar="NAME", help=f"only: {', '.join(names)}")
    add("--device", choices=DEVICES, default="cuda", help="cpu rehearses it at small sizes")
    add("--out", type=Path, default=Path("campaign.csv"), metavar="FILE.csv")
    add("--resume", action="store_true", help="go on with --out and skip the rows it has")


def campaign(args: argparse.Namespace) -> int:
    """Measure on a GPU that is there for minutes: right, then bandwidth, then against others.

    The plan is printed first; --dry-run stops there. Every part is a process of its own and appends
    to one report; what it prints goes to a log beside it. The time is shared out anew before each
    part. It may be cut off anywhere, which ends the part as well, and --resume goes on. Exits with
    1 where a part failed.
    """
    planned = [part for part in parts() if part.name in (args.part or (part.name,))]
    if not planned:
        raise UsageError("--part: compute-sanitizer is not installed")
    print(plan(planned, 60 * args.minutes))
    if args.dry_run:
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: there is no GPU; cpu rehearses the campaign")
    with _logged(Path(f"{args.out}.log")) as log:
        _create(planned, args)
        signal.signal(signal.SIGTERM, _terminated)
        try:
            status = _carry_out(planned, args, log)
        except KeyboardInterrupt:
            status = STATUSES["interrupt"]
    print(tables.table(schema.read(args.out)))
    print(args.out)
    return status


@contextmanager
def _logged(path: Path) -> Iterator[FileIO]:
    """The log, which is this campaign's alone in the context; one that stays empty is removed.

    Raises:
        UsageError: it cannot be written, or another campaign is writing it.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
    try:
        log = FileIO(path, "a", opener=lambda name, _: os.open(name, flags, 0o666))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    with log:
        lock(path, log.fileno())
        try:
            yield log
        finally:
            if not os.fstat(log.fileno()).st_size:
                path.unlink(missing_ok=True)


def _create(planned: Sequence[Part], args: argparse.Namespace) -> None:
    """Creates the report and the other files of the parts, or none of them.

    Raises:
        UsageError: one cannot be written, or is there and is not to be resumed.
    """
    with ExitStack() as stack:
        stack.enter_context(open_store(args.out, resume=args.resume))
        for part in planned:
            if part.columns and part.beside:
                path = part.file(args.out)
                stack.enter_context(open_store(path, resume=args.resume, columns=part.columns))


def _carry_out(planned: Sequence[Part], args: argparse.Namespace, log: FileIO) -> int:
    """Runs the parts, and again those that their time was too short for; 1 where one failed."""
    deadline = time.monotonic() + 60 * args.minutes - GRACE
    statuses: list[int | None] = []
    cut: list[Part] = []
    for turn in (planned, cut):
        for i, part in enumerate(turn):
            left = deadline - time.monotonic()
            seconds = share(left, part, turn[i + 1 :])
            if not seconds:
                if turn is planned:
                    print(f"{part.name}: left out, {left:.0f} s are left", flush=True)
                continue
            start = time.monotonic()
            status = _run(part, command(part, args, seconds), seconds, log)
            took = time.monotonic() - start
            statuses.append(status)
            if part.columns and turn is planned and not status and took > seconds - 2 * GRACE:
                cut.append(part)
            print(f"{part.name}: {_ending(status)} after {took:.0f} s", flush=True)
    return int(any(statuses))


def _ending(status: int | None) -> str:
    if status is None:
        return "cut off"
    return f"failed with {status}" if status else "done"


def plan(planned: Sequence[Part], seconds: float) -> str:
    """Returns the parts with the minutes that they would take and those that they get."""
    total, left = sum(part.seconds for part in planned), seconds
    lines = [f"{'part':12} {'estimate':>8} {'gets':>6}  minutes; estimated, not measured"]
    for i, part in enumerate(planned):
        given = share(left, part, planned[i + 1 :])
        left -= given
        lines.append(f"{part.name:12} {part.seconds / 60:8.1f} {given / 60:6.1f}  {part.what}")
    lines.append(f"{'together':12} {total / 60:8.1f} {seconds / 60:6.1f}")
    return "\n".join(lines)


def command(part: Part, args: argparse.Namespace, seconds: float) -> tuple[str, ...]:
    """Returns what to run for ``part`` in ``seconds``."""
    if not part.columns:
        return part.command
    budget = max(seconds - 2 * GRACE, 1.0)
    limits = (f"--out={part.file(args.out)}", "--resume", "--budget", f"{budget:.0f}")
    rehearsal = ("--device", "cpu", *REHEARSAL) if args.device == "cpu" else ()
    return (*part.command, *limits, *rehearsal)


def _run(part: Part, command: Sequence[str], seconds: float, log: FileIO) -> int | None:
    """Runs a part for at most ``seconds``; returns its exit status, None where it was cut off."""
    try:
        log.write(os.fsencode(f"\n{part.name}: {' '.join(command)}\n"))
    except OSError as error:
        raise StopError(f"{os.fsdecode(log.name)}: {error.strerror}") from error
    # It finds what this process finds, installed or not.
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "kernels"), *filter(None, sys.path)])
    environment = {**os.environ, **part.environment, "PYTHONPATH": path}
    with _group() as group:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=functools.partial(os.setpgid, 0, group),
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:  # it may close its report
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
    process.wait()
    return status


@contextmanager
def _group() -> Iterator[int]:
    """A process group, by its number: what is in it ends with the context and with this process.

    So it does where this process is killed, which could not end it.
    """
    with subprocess.Popen(LEASH, stdin=subprocess.PIPE, preexec_fn=os.setpgrp) as leader:
        yield leader.pid


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)
