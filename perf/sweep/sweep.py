"""The sweep: goes through the jobs, keeps every row, and ends in time or by ^C with what it has."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import torch

from perf.rows import env
from perf.rows.schema import Row, key_of
from perf.rows.store import Store
from perf.sweep.contest import BudgetSpentError, Conditions, DeviceLostError, measure_case
from perf.sweep.passes import measure_pass
from perf.sweep.presets import Job
from perf.sweep.progress import Progress
from perf.sweep.providers import PROVIDERS

Ending = Literal["complete", "budget", "interrupt", "lost"]


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
    if conditions.device.type == "cuda":
        # What times and synchronises takes the current device.
        torch.cuda.set_device(conditions.device)
    try:
        with deadline(budget):
            for job in unfinished(jobs, store):
                with progress.working_on(job):
                    _measure(job, store, conditions, ranks)
    except DeviceLostError as error:
        print(f"{job.case.label}: the device is lost: {error}", file=sys.stderr)
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
