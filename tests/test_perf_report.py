"""The CSV: columns, types, refusal of other schemas, torn tails, resuming."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from perf.report import tables
from perf.rows import env, schema
from perf.rows.schema import SCHEMA, Case, Result
from perf.rows.store import open_store
from perf.rows.typed_csv import Values, values_of
from perf.sweep.workloads import make_case
from tests.sweeps import write_report

ENV = env.snapshot(torch.device("cpu"), seed=3, ranks=1)
CASE = make_case("sk_conv", "train", batch=8, resolution=64, stage=2)


def row(provider: str = "plain-eager", case: Case = CASE, **result: object) -> Values:
    found = Result(**{"status": "ok", "ms_p50": 1.5, **result})  # type: ignore[arg-type]
    return values_of(case, found, ENV, provider=provider)


def test_round_trip_keeps_values_and_types(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    reason = 'says "no", twice'
    write_report(
        path,
        [
            row(n=7, gbps=12.5),
            row("ours-triton-eager", status="unsupported", reason=reason, ms_p50=None),
        ],
    )
    frame = schema.read(path)
    assert tuple(frame.columns) == schema.SCHEMA.names
    assert frame.B.tolist() == [8, 8]
    assert frame.reason.tolist() == ["", reason]
    assert frame.ms_p50[0] == 1.5
    assert pd.isna(frame.ms_p50[1])
    assert pd.isna(frame.n[1])
    assert frame.n[0] == 7
    assert frame.git_dirty.dtype == bool
    assert frame.gpu.tolist() == ["", ""]
    assert frame.seed.tolist() == [3, 3]


def test_report_torn_at_any_byte_resumes_with_its_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # this disk keeps its power
    path = tmp_path / "a.csv"
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


def test_draft_of_a_killed_start_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"")
    with open_store(path, resume=True) as store:
        assert store.keys == set()
    assert schema.read(path).empty


def test_table_compares_with_the_baseline_and_groups_reasons(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    other = replace(CASE, B=1)
    absent: dict[str, Any] = {"status": "unsupported", "reason": "no GPU", "ms_p50": None}
    write_report(
        path,
        [
            row("plain-eager", ms_p50=4.0),
            row("ours-pytorch-eager", ms_p50=2.0, ms_p20=1.9, ms_p80=2.1),
            row("ours-triton-eager", **absent),
            row("ours-triton-eager", other, **absent),
        ],
    )
    frame = schema.read(path)
    text = tables.table(frame)
    assert text.count(CASE.label) == 1
    reference = next(line for line in text.splitlines() if "ours-pytorch-eager" in line)
    assert reference.split() == ["ours-pytorch-eager", "2", "1.9", "to", "2.1", "2"]
    assert tables.not_measured(frame) == ["unsupported: ours-triton-eager (2 rows): no GPU"]


def test_pairs_are_of_providers_that_are_called_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_report(
        path,
        [
            row("plain-eager", ms_p50=4.0, ms_p20=3.0, ms_p80=5.0, saved_mb=8.0, saved_own_mb=6.0),
            row(
                "ours-pytorch-eager",
                ms_p50=2.0,
                ms_p20=1.5,
                ms_p80=2.5,
                saved_mb=4.0,
                saved_own_mb=2.0,
            ),
            row("ours-pytorch-compile", ms_p50=1.0),
            row("plain-compile", status="unverified", reason="output off", ms_p50=None),
        ],
    )
    lines = tables.pairs(schema.read(path), markdown=True).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        CASE.label,
        "plain-eager, ours-pytorch-eager",
        "4 (3 to 5)",
        "2 (1.5 to 2.5)",
        "2.00",
        "8.0 to 4.0",
        "6.0 to 2.0",
    ]
    assert len(lines) == 3
