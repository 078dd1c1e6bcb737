"""Measure on a GPU that is there for minutes: right, then bandwidth, then against others.

The plan is printed first; --dry-run stops there. Every part is a process of its own and appends to
one report; what it prints goes to a log beside it. The time is shared out anew before each part.
It may be cut off anywhere, and --resume goes on.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import torch

from perf.commands.arguments import DEVICES, duration
from perf.commands.run import STATUSES
from perf.report import tables
from perf.rows import schema
from perf.rows.env import CHECKOUT
from perf.rows.errors import UsageError
from perf.rows.store import open_store
from perf.sweep.campaign import Part, parts, share

# Sizes for a processor, where the campaign can only be rehearsed.
REHEARSAL = ("--batch", "2", "--resolution", "32")
# Seconds that a part gets to end by itself after its budget, and after it was told to.
GRACE = 10.0
TERMINATED = 128 + signal.SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the time, the output and the device."""
    add = parser.add_argument
    add("--minutes", type=duration("minutes"), default=30.0, metavar="N", help="default: 30")
    add("--dry-run", action="store_true", help="print the plan and do nothing")
    names = [part.name for part in parts(which=str)]
    add("--part", nargs="+", choices=names, metavar="NAME", help=f"only: {', '.join(names)}")
    add("--device", choices=DEVICES, default="cuda", help="cpu rehearses it at small sizes")
    add("--out", type=Path, default=Path("campaign.csv"), metavar="FILE.csv")
    add("--resume", action="store_true", help="go on with --out and skip the rows it has")


def main(args: argparse.Namespace) -> int:
    """Runs the parts and prints the report; exits with 1 where a part failed."""
    planned = [part for part in parts() if part.name in (args.part or (part.name,))]
    if not planned:
        raise UsageError("--part: compute-sanitizer is not installed")
    print(plan(planned, 60 * args.minutes))
    if args.dry_run:
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: there is no GPU; cpu rehearses the campaign")
    open_store(args.out, resume=args.resume).close()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        status = _carry_out(planned, args)
    except KeyboardInterrupt:
        status = STATUSES["interrupt"]
    print(tables.table(schema.read(args.out)))
    print(args.out)
    return status


def _carry_out(planned: Sequence[Part], args: argparse.Namespace) -> int:
    """Runs the parts, and again those that their time was too short for; 1 where one failed."""
    deadline = time.monotonic() + 60 * args.minutes - GRACE
    statuses: list[int | None] = []
    cut: list[Part] = []
    with args.out.with_name(f"{args.out.name}.log").open("a") as log:
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
                if part.rows and turn is planned and not status and took > seconds - 2 * GRACE:
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
    whole = part.command
    if part.rows:
        budget = max(seconds - 2 * GRACE, 1.0)
        out = args.out.with_name(f"{args.out.stem}{part.beside}{args.out.suffix}")
        whole = (*whole, f"--out={out}", "--resume", "--budget", f"{budget:.0f}")
    if args.device == "cpu" and part.rows:
        whole = (*whole, "--device", "cpu", *REHEARSAL)
    return whole


def _run(part: Part, command: Sequence[str], seconds: float, log: IO[str]) -> int | None:
    """Runs a part for at most ``seconds``; returns its exit status, None where it was cut off."""
    print(f"\n{part.name}: {' '.join(command)}", file=log, flush=True)
    # It finds what this process finds, installed or not.
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "kernels"), *filter(None, sys.path)])
    environment = {**os.environ, **part.environment, "PYTHONPATH": path}
    # A session of its own, so that what it has started ends with it.
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a part and all that it has started: it may close its report first."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)
