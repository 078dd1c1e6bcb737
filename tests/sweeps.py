"""Reports for tests: rows that are made up, and sweeps of cases that take no time."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from perf.rows.cases import Case
from perf.rows.schema import Result, Row
from perf.rows.store import open_store
from perf.sweep import sweep
from perf.sweep.contest import Conditions
from perf.sweep.providers import Provider


@dataclass
class MadeUp:
    """Stands in for measuring: every provider takes a millisecond, and the cases are kept."""

    seconds: float = 0.0
    asked: list[Case] = field(default_factory=list)

    def __call__(
        self, case: Case, providers: tuple[Provider, ...], conditions: Conditions
    ) -> dict[str, Result]:
        self.asked.append(case)
        time.sleep(self.seconds)
        times = {"ms_p50": 1.0, "ms_p20": 0.9, "ms_p80": 1.1}
        return {provider.name: Result("ok", **times) for provider in providers}  # type: ignore[arg-type]  # times by name


def make_up(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> MadeUp:
    """Replaces measuring by rows that are made up, and returns what was asked for."""
    made_up = MadeUp(seconds)
    monkeypatch.setattr(sweep, "measure_case", made_up)
    return made_up


def write_report(path: Path, rows: Iterable[Row]) -> None:
    """Writes a new report of ``rows``."""
    with open_store(path, resume=False) as store:
        store.append(rows)
