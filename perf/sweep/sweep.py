"""The sweep: goes through the jobs, keeps every row, and ends in time or by ^C with what it has."""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal, Protocol, TypeVar

import torch
from tqdm import tqdm

from perf.rows import env
from perf.rows.schema import Row, key_of
from perf.rows.store import Store
from perf.sweep.contest import BudgetSpentError, Conditions, DeviceLostError, measure_case
from perf.sweep.presets import Job
from perf.sweep.providers import PROVIDERS
from perf.sweep.streaming import measure_pass

Ending = Literal["complete", "budget", "interrupt", "lost"]


class Progress:
    """A bar over cases with the remaining time; invisible where stderr is no terminal."""

    def __init__(self, total: int, *, shown: bool) -> None:
        hidden = not (shown and sys.stderr.isatty())
        self._bar = tqdm(total=total, unit="case", file=sys.stderr, disable=hidden, leave=False)

    @contextmanager
    def working_on(self, job: Job) -> Iterator[None]:
        """Shows ``job`` while the block runs, and counts it when it is done."""
        self._bar.set_postfix_str(job.label)
        yield
        self._bar.update()

    def close(self) -> None:
        """Takes the bar off the screen."""
        self._bar.close()


def sweep(
    jobs: Sequence[Job],
    store: Store,
    conditions: Conditions,
    *,
    ranks: int,
    budget: float | None,
    progress: Progress,
) -> Ending:
    """Measures every job that ``store`` has no row of, appends its rows, and tells why it ended.

    A device that is lost in the middle of a case leaves no row of that case, so that the sweep can
    be resumed in a process with a new hold on the device.
    """

    def measure(job: Job) -> None:
        with progress.working_on(job):
            _measure(job, store, conditions, ranks)

    return in_turn(unfinished(jobs, store), measure, conditions.device, budget)


class Labelled(Protocol):
    """What can be named in one short line."""

    @property
    def label(self) -> str:
        """That line."""


_Item = TypeVar("_Item", bound=Labelled)


def in_turn(
    items: Iterable[_Item],
    measure: Callable[[_Item], None],
    device: torch.device,
    budget: float | None,
) -> Ending:
    """Calls ``measure`` with every item, and tells why it ended."""
    if device.type == "cuda":
        # What times and synchronises takes the current device.
        torch.cuda.set_device(device)
    label = ""
    try:
        with deadline(budget):
            for item in items:
                label = item.label
                measure(item)
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
        names = tuple(name for name in job.providers if key_of(job.case, name) not in store.keys)
        if names:
            rest.append(Job(job.case, names))
    return rest


def _measure(job: Job, store: Store, conditions: Conditions, ranks: int) -> None:
    providers = tuple(PROVIDERS[name] for name in job.providers)
    measure = measure_pass if job.case.level == "pass" else measure_case
    results = measure(job.case, providers, conditions)
    now = env.snapshot(conditions.device, conditions.seed, ranks)
    store.append(Row(job.case, name, result, now) for name, result in results.items())
    if len(results) < len(job.providers):
        raise BudgetSpentError


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
