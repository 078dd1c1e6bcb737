"""The CSV and its tables; two reports: what is a regression, what noise, what not comparable."""

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from perf.__main__ import main
from perf.report import tables
from perf.rows import schema
from perf.rows.schema import SCHEMA
from perf.rows.store import open_store
from perf.sweep.workloads import make_case
from tests.sweeps import CASE, ENV, OURS, Patch, Printed, refusal, row, write_report


def test_round_trip_keeps_values_and_types(path: Path) -> None:
    absent = row("ours-triton-eager", status="unsupported", reason="no GPU", ms_p50=None)
    frame = write_report(path, [row(n=7, gbps=12.5), absent])
    assert tuple(frame.columns) == schema.SCHEMA.names
    assert frame.B.tolist() == [8, 8]
    assert frame.reason.tolist() == ["", "no GPU"]
    assert (frame.ms_p50[0], frame.n[0], frame.gbps[0]) == (1.5, 7, 12.5)
    assert frame.loc[1, ["ms_p50", "n"]].isna().all()
    assert frame.git_dirty.dtype == bool
    assert frame.gpu.tolist() == ["", ""]
    assert frame.seed.tolist() == [3, 3]


def test_report_torn_at_any_byte_resumes_with_its_whole_rows(
    path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # this disk keeps its power
    reasons = {"plain-eager": "", "ours-pytorch-eager": "a, b", "plain-compile": "Übersetzt: 编"}
    rows = [row(provider, reason=reason) for provider, reason in reasons.items()]
    write_report(path, rows)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with open_store(path, resume=True) as store:
            done = [r for r in rows if SCHEMA.key_of(r) in store.keys]
            assert len(done) == max(whole[:length].count(b"\n") - 1, 0)
            store.append(r for r in rows if r not in done)
        assert path.read_bytes() == whole


def test_table_compares_with_the_baseline_and_groups_reasons(path: Path) -> None:
    absent: dict[str, Any] = {"status": "unsupported", "reason": "no GPU", "ms_p50": None}
    rows = [
        row("plain-eager", ms_p50=4.0),
        row("ours-pytorch-eager", ms_p50=2.0, ms_p20=1.9, ms_p80=2.1),
        row("ours-triton-eager", **absent),
        row("ours-triton-eager", replace(CASE, B=1), **absent),
    ]
    frame = write_report(path, rows)
    text = tables.table(frame)
    assert text.count(CASE.label) == 1
    reference = next(line for line in text.splitlines() if "ours-pytorch-eager" in line)
    assert reference.split() == ["ours-pytorch-eager", "2", "1.9", "to", "2.1", "2"]
    assert tables.not_measured(frame) == ["unsupported: ours-triton-eager (2 rows): no GPU"]


def test_pairs_are_of_providers_that_are_called_alike(path: Path) -> None:
    rows = [
        row(ms_p50=4.0, ms_p20=3.0, ms_p80=5.0, saved_mb=8.0, saved_own_mb=6.0),
        row(OURS.name, ms_p50=2.0, ms_p20=1.5, ms_p80=2.5, saved_mb=4.0, saved_own_mb=2.0),
        row("ours-pytorch-compile", ms_p50=1.0),
        row("plain-compile", status="unverified", reason="output off", ms_p50=None),
    ]
    frame = write_report(path, rows)
    _, _, pair = tables.pairs(frame, markdown=True).splitlines()
    assert [cell.strip() for cell in pair.strip("|").split("|")] == [
        CASE.label,
        "plain-eager, ours-pytorch-eager",
        *("4 (3 to 5)", "2 (1.5 to 2.5)", "2.00"),
        *("8.0 to 4.0", "6.0 to 2.0"),
    ]


# Two reports

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a report of one row and returns its path."""
    names = itertools.count()

    def report(
        p50: float | None = 1.0,
        spread: float = 0.02,
        torch_version: str = ENV.torch,
        **changes: Any,
    ) -> Path:
        path = tmp_path / f"{next(names)}.csv"
        times: dict[str, Any] = {"ms_p50": None}
        if p50 is not None:
            times = {"ms_p50": p50, "ms_p20": p50 * (1 - spread), "ms_p80": p50 * (1 + spread)}
        write_report(path, [{**row(**times, **changes), "torch": torch_version}])
        return path

    return report


def compare(old: Path, new: Path, *arguments: str) -> int:
    return main(["compare", str(old), str(new), *arguments])


@pytest.mark.parametrize(
    ("p50", "spread", "limit", "status"),
    [
        (1.20, 0.02, "5%", 1),
        (1.20, 0.02, "25%", 0),
        (1.20, 0.15, "5%", 0),
        (1.20, 0.06, "5%", 0),
        (1.04, 0.001, "5%", 0),
        (1.04, 0.001, "3", 1),
        (0.50, 0.02, "5%", 0),
    ],
    ids=["slower", "allowed", "noise", "apart-but-noise", "small", "small-but-gated", "faster"],
)
def test_exit_status(write: Write, p50: float, spread: float, limit: str, status: int) -> None:
    assert compare(write(spread=spread), write(p50, spread), "--max-regression", limit) == status


def test_row_that_is_no_longer_ok_is_a_regression(write: Write, capsys: Printed) -> None:
    assert compare(write(), write(None, status="unverified", reason="output off")) == 1
    assert "unverified: output off" in capsys.readouterr().out


def test_row_that_was_not_ok_before_is_not_compared(write: Write, capsys: Printed) -> None:
    reports = write(None, status="oom", reason="full"), write()
    assert "no measured row in common" in refusal(capsys, "compare", *map(str, reports))


def test_other_environment_is_said(write: Write, capsys: Printed) -> None:
    assert compare(write(), write(torch_version="9.9.9")) == 0
    out = capsys.readouterr().out
    assert f"different environment: torch: {ENV.torch} -> 9.9.9" in out


def test_noise_of_either_run_counts(write: Write) -> None:
    quiet, noisy = write(spread=0.01), write(1.2, spread=0.08)
    assert compare(quiet, noisy) == 0
    assert compare(noisy, write(1.5, spread=0.01)) == 0


def test_the_row_that_became_slower_is_told_from_the_others(tmp_path: Path) -> None:
    def report(ms: float) -> pd.DataFrame:
        times = {"sk_fuse": ms, "sk_select": 1.0}
        rows = [
            row(case=make_case(name, "infer"), ms_p50=p50, ms_p20=0.98 * p50, ms_p80=1.02 * p50)
            for name, p50 in times.items()
        ]
        return write_report(tmp_path / f"{ms}.csv", rows)

    slow, fast = report(1.18), report(1.0)
    for old, new, verdict in ((fast, slow, "slower"), (slow, fast, "faster"), (fast, fast, "same")):
        compared = tables.compare(old, new, 0.1).rows.set_index("workload")
        assert compared.verdict.to_dict() == {"sk_fuse": verdict, "sk_select": "same"}
