"""Tuning: the candidates of every kernel, judged and then timed on the device at hand.

Small kernels come last, since how many parts they join is the choice of the streaming kernels. A
kernel that joins the parts of a pass, and a pass whose parts are joined, are timed together.

A candidate is timed where each of its results is off from float64, in the 2-norm, by at most 8
roundings of the result's dtype and sqrt(n) of float32, with n the terms of its longest sum, and
from the heuristics' result nowhere by more than twice as much. It is chosen where its 80 % quantile
lies below the heuristics' 20 %: what is faster by noise alone is not.
"""

import functools
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from perf.rows import env
from perf.rows.schema import TUNED, Timing
from perf.rows.store import Store
from perf.rows.typed_csv import Key, values_of
from perf.static.specialisations import Setting, forgetting_configurations, inputs
from perf.static.trials import AnyConfig, AnyKernel, Given, Subject
from perf.sweep import contest, measure
from perf.sweep.contest import Conditions
from perf.sweep.sweep import Ending, in_turn
from perf.sweep.workloads import DTYPE_OF, LAYOUT_OF, stage_shape
from sknet_kernels import tuned
from sknet_kernels.config import DeviceFacts

_ROUNDINGS = 8


class WrongError(Exception):
    """The heuristics' own results are wrong: there is nothing to compare times with."""


def subjects(
    kernels: Sequence[AnyKernel],
    layouts: Sequence[str],
    stages: Sequence[int],
    batches: Sequence[int],
    *,
    resolution: int,
    M: int,
    dtype: str,
    device: str | torch.device,
) -> list[Subject]:
    """Returns every kernel on branches of an SKNet's stages, first those that move most."""
    found = []
    for kernel, layout, stage, B in itertools.product(kernels, layouts, stages, batches):
        C, side = stage_shape(stage, resolution)
        setting = Setting(M, LAYOUT_OF[layout], DTYPE_OF[dtype], (B, C, side * side), device)
        found.append(Subject(kernel, setting))
    return sorted(found, key=lambda subject: subject.bytes_moved, reverse=True)


def tune(
    chosen: Sequence[Subject], store: Store, conditions: Conditions, *, budget: float | None
) -> Ending:
    """Appends a row of every subject that ``store`` has none of, and tells why it ended.

    ``chosen`` has the small kernels last. A subject whose heuristics are wrong gets no row; stderr
    says so.
    """

    def append(subject: Subject) -> None:
        with in_force(store.path):
            problem = subject.problem(DeviceFacts.of(conditions.device))
            if _key(subject, problem) in store.keys:
                return
            try:
                config, timing = measured(subject, conditions)
            except WrongError as error:
                print(f"{subject.label}: {error}", file=sys.stderr)
                return
        now = env.snapshot(conditions.device, conditions.seed, ranks=1)
        store.append([values_of(problem, config, timing, now, kernel=subject.kernel.name)])

    tasks = ((subject.label, functools.partial(append, subject)) for subject in chosen)
    return in_turn(tasks, conditions.device, budget)


@contextmanager
def in_force(path: Path) -> Iterator[None]:
    """Lets launchers read the table at ``path``, as far as it is written, whatever the device."""
    rows = tuned.read(path)
    with forgetting_configurations(), mock.patch.object(tuned, "table", return_value=rows):
        yield


def unfinished(chosen: Sequence[Subject], store: Store, device: torch.device) -> list[Subject]:
    """Returns the subjects that have no row."""
    facts = DeviceFacts.of(device)
    with in_force(store.path):
        return [s for s in chosen if _key(s, s.problem(facts)) not in store.keys]


def _key(subject: Subject, problem: Any) -> Key:
    return TUNED.key_of(values_of(problem, kernel=subject.kernel.name))


def measured(subject: Subject, conditions: Conditions) -> tuple[AnyConfig, Timing]:
    """Judges and times the candidates of ``subject``; returns the best and why it was chosen."""
    torch.manual_seed(conditions.seed)
    facts = DeviceFacts.of(conditions.device)
    problem: Any = subject.problem(facts)
    configs = subject.kernel.candidates(problem, facts)
    given = inputs(subject.setting)
    right = judged(subject, configs, given, conditions.device)
    calls = {config: subject.prepared(given, config) for config in right}
    times: dict[AnyConfig, list[float]] = {config: [] for config in right}
    seconds = conditions.seconds / conditions.rounds
    for config in measure.turns(right, conditions.rounds):
        times[config] += measure.sample(calls[config], conditions.device, seconds)
    best, heuristic_ms, ms = fastest(times)
    return best, Timing(heuristic_ms, ms, len(right), len(configs) - len(right))


def judged(
    subject: Subject, configs: Sequence[AnyConfig], given: Given, device: torch.device
) -> list[AnyConfig]:
    """Returns the configurations that are right; WrongError where the heuristics' is not."""
    exact = subject.exact(given)
    B, _, S = subject.setting.shape
    first: list[Tensor] | None = None
    right = []
    for config in configs:
        try:
            results = subject.run(given, config)
            reason = _fault(results, exact, first or results, terms=B * S)
        except Exception as error:
            reason = contest.failure(error, device).reason
        if not reason:
            right.append(config)
            first = first or results
        elif first is None:
            raise WrongError(f"the heuristics' {config}: {reason}")
        else:
            print(f"{subject.label}: refused {config}: {reason}", file=sys.stderr)
    return right


def _fault(
    results: Sequence[Tensor], exact: Sequence[Tensor], first: Sequence[Tensor], *, terms: int
) -> str:
    """Says which result is off by how much, nothing where all are right."""
    for i, (result, truth, other) in enumerate(zip(results, exact, first, strict=True)):
        bound = _ROUNDINGS * torch.finfo(result.dtype).eps / 2
        bound += math.sqrt(terms) * torch.finfo(torch.float32).eps / 2
        error = ((result.double() - truth).norm() / truth.norm()).item()
        apart = ((result - other).abs().max() / other.abs().max()).item()
        # NaN is within no bound.
        if not (error <= bound and apart <= 2 * bound):
            return f"result {i} off by {error:.1e} and {apart:.1e}, bound {bound:.1e}"
    return ""


def fastest(times: Mapping[AnyConfig, list[float]]) -> tuple[AnyConfig, float, float]:
    """Returns the configuration to take, the heuristics' median, which come first, and its own."""
    taken = {config: measure.quantiles(ms) for config, ms in times.items()}
    heuristic, (low, heuristic_ms, _) = next(iter(taken.items()))
    best = min(taken, key=lambda config: taken[config][1])
    if taken[best][2] >= low:
        return heuristic, heuristic_ms, heuristic_ms
    return best, heuristic_ms, taken[best][1]
