"""The sweep: goes through the jobs, keeps every row, and ends in time or by ^C with what it has.

Ranks, as torchrun starts them, may share one.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from perf.rows import StopError, UsageError, env, one_line
from perf.rows.schema import SCHEMA
from perf.rows.store import Store
from perf.rows.typed_csv import values_of
from perf.sweep.contest import BudgetSpentError, Conditions, DeviceLostError, measure_case
from perf.sweep.presets import Job
from perf.sweep.providers import PROVIDERS

Ending = Literal["complete", "budget", "interrupt", "lost"]

PATIENCE = timedelta(minutes=1)
# A rank may be busy with its last case for long while the others wait.
_LONGEST_CASE = timedelta(days=1)


def sweep(
    jobs: Sequence[Job],
    store: Store,
    conditions: Conditions,
    *,
    ranks: int,
    budget: float | None,
    shown: bool,
) -> Ending:
    """Measures every job that ``store`` has no row of, appends its rows, and tells why it ended.

    A device that is lost in the middle of a case leaves no row of that case, so that the sweep can
    be resumed in a process with a new hold on the device. Where ``shown`` and stderr is a terminal,
    a bar shows the remaining time.
    """
    hidden = not (shown and sys.stderr.isatty())
    rest = unfinished(jobs, store)

    def measure(job: Job) -> None:
        providers = tuple(PROVIDERS[name] for name in job.providers)
        results = measure_case(job.case, providers, conditions)
        now = env.snapshot(conditions.device, conditions.seed, ranks)
        store.append(
            values_of(job.case, found, now, provider=name) for name, found in results.items()
        )
        if len(results) < len(providers):
            raise BudgetSpentError

    def tasks() -> Iterator[tuple[str, Callable[[], None]]]:
        with tqdm(rest, unit="case", file=sys.stderr, disable=hidden, leave=False) as bar:
            for job in bar:
                bar.set_postfix_str(job.case.label)
                yield job.case.label, partial(measure, job)

    return in_turn(tasks(), conditions.device, budget)


def in_turn(
    tasks: Iterable[tuple[str, Callable[[], None]]], device: torch.device, budget: float | None
) -> Ending:
    """Carries out every task, each with its name in one short line, and tells why it ended."""
    if device.type == "cuda":
        # What times and synchronises takes the current device.
        torch.cuda.set_device(device)
    try:
        with deadline(budget):
            for label, carry_out in tasks:
                try:
                    carry_out()
                except DeviceLostError as error:
                    print(f"{label}: the device is lost: {error}", file=sys.stderr)
                    return "lost"
    except KeyboardInterrupt:
        return "interrupt"
    except BudgetSpentError:
        return "budget"
    return "complete"


def unfinished(jobs: Sequence[Job], store: Store) -> list[Job]:
    """Returns the jobs without those providers that have a row."""
    rest = []
    for job in jobs:
        keys = {name: SCHEMA.key_of(values_of(job.case, provider=name)) for name in job.providers}
        if names := tuple(name for name, key in keys.items() if key not in store.keys):
            rest.append(Job(job.case, names))
    return rest


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raises `BudgetSpentError` inside the block after ``seconds``, in the middle of a case too."""
    if seconds is None:
        yield
        return

    def expire(signum: int, frame: FrameType | None) -> None:
        raise BudgetSpentError

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass(frozen=True)
class Rank:
    """This process among those that share the sweep; ``local`` counts on this host."""

    index: int
    local: int
    count: int


def this_rank() -> Rank:
    """Returns what torchrun says, or the only rank; UsageError where the variables name none."""
    index = _number("RANK", os.environ.get("RANK", "0"))
    local = _number("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0"))
    count = _number("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if index >= count:
        raise UsageError(f"RANK: expected less than WORLD_SIZE, which is {count}, got {index}")
    return Rank(index, local, count)


def _number(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"{name}: expected a whole number, got {text!r}")
    return int(text)


class Team:
    """The ranks of one sweep, which can wait for each other."""

    def __init__(self, rank: Rank, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self._group = group

    def wait(self) -> None:
        """Returns when every rank has come here; StopError where one is gone."""
        if self._group is None:
            return
        try:
            dist.barrier(self._group)
        except RuntimeError as error:
            raise StopError(
                "another rank is gone; --resume collects the rows that every rank left behind"
            ) from error

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A context that every rank leaves, or none: the mistake of one stops all, said once."""
        mistake = ""
        try:
            yield
        except UsageError as error:
            mistake = str(error)
        mistakes = [mistake] * self.rank.count
        if self._group is not None:
            dist.all_gather_object(mistakes, mistake, self._group)
        saying = next((i for i, said in enumerate(mistakes) if said), None)
        if saying == self.rank.index:
            raise UsageError(mistake)
        if saying is not None:
            raise SystemExit(2)


@contextmanager
def together(rank: Rank) -> Iterator[Team]:
    """A context in which the ranks are a team; UsageError where the others do not come."""
    if rank.count == 1:
        yield Team(rank, None)
        return
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
        group = dist.new_group(timeout=_LONGEST_CASE)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"rank {rank.index} of {rank.count} (RANK, WORLD_SIZE) met no others within "
            f"{PATIENCE.seconds} seconds: {one_line(str(error))}"
        ) from error
    try:
        yield Team(rank, group)
    finally:
        dist.destroy_process_group()


def part_of(path: Path, rank: Rank) -> Path:
    """Returns the file that this rank writes: the report itself where it is alone."""
    return path if rank.count == 1 else path.with_name(f"{path.name}.part{rank.index}")


def parts_of(path: Path) -> list[Path]:
    """Returns the parts of a report that ranks have left behind, in the order of the ranks."""
    found = {}
    for other in path.parent.iterdir():
        index = other.name.removeprefix(f"{path.name}.part")
        if index != other.name and re.fullmatch("[0-9]+", index):
            found[int(index)] = other
    return [found[index] for index in sorted(found)]
