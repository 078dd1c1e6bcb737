"""Reports for tests: rows that are made up, and sweeps of cases that take no time."""

import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from perf.__main__ import main
from perf.rows.schema import Case, Result
from perf.rows.store import open_store
from perf.rows.typed_csv import Values
from perf.sweep import sweep
from perf.sweep.contest import Conditions, measure_case
from perf.sweep.providers import Provider
from perf.sweep.workloads import make_case
from tests.helpers import ROOT

Patch = pytest.MonkeyPatch
Printed = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
CONDITIONS = Conditions(CPU, seed=0, seconds=0.002, rounds=2)


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


def write_report(path: Path, rows: Iterable[Values]) -> None:
    """Writes a new report of ``rows``."""
    with open_store(path, resume=False) as store:
        store.append(rows)
