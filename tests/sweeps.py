"""Reports for tests: rows that are made up, and sweeps of cases that take no time."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from perf.__main__ import main
from perf.peers import baseline
from perf.rows import env, schema
from perf.rows.schema import Case, Result
from perf.rows.store import open_store
from perf.rows.typed_csv import Values, values_of
from perf.sweep import measure, sweep, workloads
from perf.sweep.contest import Conditions, measure_case
from perf.sweep.providers import PROVIDERS, Provider
from perf.sweep.workloads import make_case
from tests.helpers import ROOT

Patch = pytest.MonkeyPatch
Printed = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
CONDITIONS = Conditions(CPU, seed=0, seconds=0.002, rounds=2)
PLAIN, OURS = PROVIDERS["plain-eager"], PROVIDERS["ours-pytorch-eager"]
REPORTS = ROOT / "perf" / "reports"
TINY = ["run", "--level", "op", "--batch", "2", "--resolution", "32", "--mode", "infer"]

# Rows that are made up
ENV = env.snapshot(CPU, seed=3, ranks=1)
CASE = make_case("sk_conv", "train", batch=8, resolution=64, stage=2)


def row(provider: str = PLAIN.name, case: Case = CASE, **result: object) -> Values:
    """Returns a row that is ok and took 1.5 ms, where ``result`` says nothing else."""
    found = Result(**{"status": "ok", "ms_p50": 1.5, **result})  # type: ignore[arg-type]  # by name
    return values_of(case, found, ENV, provider=provider)


@dataclass
class MadeUp:
    """Stands in for measuring: every provider takes a millisecond, and the cases are kept."""

    seconds: float = 0.0  # that a case takes in truth
    most: int | None = None  # cases, after which the next never ends
    asked: list[Case] = field(default_factory=list)

    def __call__(
        self, case: Case, providers: tuple[Provider, ...], conditions: Conditions
    ) -> dict[str, Result]:
        time.sleep(3600 if len(self.asked) == self.most else self.seconds)
        self.asked.append(case)
        times = {"ms_p50": 1.0, "ms_p20": 0.9, "ms_p80": 1.1}
        return {provider.name: Result("ok", **times) for provider in providers}  # type: ignore[arg-type]  # times by name


def make_up(monkeypatch: Patch, seconds: float = 0.0) -> MadeUp:
    """Replaces measuring by rows that are made up, and returns what was asked for."""
    made_up = MadeUp(seconds)
    monkeypatch.setattr(sweep, "measure_case", made_up)
    return made_up


def plant(
    monkeypatch: Patch, workload: str, ours: nn.Module | Callable[..., Tensor], **changes: Any
) -> None:
    """Puts a module or a function in the place of our module of a workload."""
    module = ours if isinstance(ours, nn.Module) else baseline.Function(ours)
    changed = replace(workloads.WORKLOADS[workload], ours=lambda case: module, **changes)
    monkeypatch.setitem(workloads.WORKLOADS, workload, changed)


def take_times(monkeypatch: Patch, ms: list[float], call_ms: Iterable[float] = ()) -> list[str]:
    """Lets every run take times that are made up, and returns the names of those that did."""
    timed: list[str] = []

    def made_up(runs: dict[str, object], *_: object) -> tuple[dict[str, measure.Times], Any]:
        timed.extend(runs)
        return {name: measure.Times(env.switches(), ms, [*call_ms]) for name in runs}, {}

    monkeypatch.setattr(measure, "interleaved", made_up)
    return timed


def stub_cuda(monkeypatch: Patch, **stubs: Callable[..., object]) -> None:
    """Puts what answers in the place of functions of `torch.cuda`."""
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)


def small(workload: str, mode: str, **axes: object) -> Case:
    """Returns a case of 4 images of 32 x 32 px, where ``axes`` say nothing else."""
    return make_case(workload, mode, **{"batch": 4, "resolution": 32, **axes})  # type: ignore[arg-type]  # axes by name


def measured(case: Case, *providers: Provider) -> list[Result]:
    """Measures a case by providers, in truth and for a moment."""
    return list(measure_case(case, providers, CONDITIONS).values())


def refusal(capsys: Printed, *arguments: str, silent: bool = True) -> str:
    """Returns the one line with which a command is refused; a ``silent`` one prints nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    said = capsys.readouterr()
    assert (stopped.value.code, said.err.count("\n")) == (2, 1)
    assert not (silent and said.out)
    return said.err


def state(folder: Path) -> dict[str, bytes | None]:
    """Returns what is in a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def in_a_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the harness in a process of its own, as a user does."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, **{"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, **options}
    )


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(done: Callable[[], bool]) -> None:
    """Waits until something is so, for a minute at most."""
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.002)


def write_report(path: Path, rows: Iterable[Values]) -> pd.DataFrame:
    """Writes a new report of ``rows``, and returns it as it is read."""
    with open_store(path, resume=False) as store:
        store.append(rows)
    return schema.read(path)
