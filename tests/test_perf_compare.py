"""Two reports: what is a regression, what is noise, and what cannot be compared."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perf.__main__ import main
from perf.peers import baseline
from perf.report import tables
from perf.rows import env, schema
from perf.rows.schema import Result
from perf.rows.typed_csv import values_of
from perf.sweep import measure, workloads
from perf.sweep.workloads import make_case
from tests.sweeps import refusal, write_report

ENV = env.snapshot(torch.device("cpu"), seed=0, ranks=1)
CASE = make_case("sk_conv", "infer", batch=8, resolution=64)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a report of one row and returns its path."""
    names = itertools.count()

    def report(p50: float | None = 1.0, spread: float = 0.02, **changes: Any) -> Path:
        path = tmp_path / f"{next(names)}.csv"
        times = {}
        if p50 is not None:
            times = {"ms_p50": p50, "ms_p20": p50 * (1 - spread), "ms_p80": p50 * (1 + spread)}
        provider = changes.pop("provider", "plain-eager")
        environment = replace(ENV, torch=changes.pop("torch", ENV.torch))
        result = Result(**{"status": "ok", **times, **changes})
        write_report(path, [values_of(CASE, result, environment, provider=provider)])
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


def test_row_that_is_no_longer_ok_is_a_regression(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(write(), write(None, status="unverified", reason="output off")) == 1
    assert "unverified: output off" in capsys.readouterr().out


def test_row_that_was_not_ok_before_is_not_compared(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = write(None, status="oom", reason="full"), write()
    assert "no measured row in common" in refusal(capsys, "compare", *map(str, reports))


def test_other_environment_is_said(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(write(), write(torch="9.9.9")) == 0
    out = capsys.readouterr().out
    assert f"different environment: torch: {ENV.torch} -> 9.9.9" in out


def test_noise_of_either_run_counts(write: Write) -> None:
    quiet, noisy = write(spread=0.01), write(1.2, spread=0.08)
    assert compare(quiet, noisy) == 0
    assert compare(noisy, write(1.5, spread=0.01)) == 0
    assert compare(quiet, write(1.2, spread=0.01)) == 1


def test_planted_slowdown_is_found_and_a_repeat_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = 0.0  # in milliseconds, which only the planted module moves

    def sample(run: measure.Run, device: torch.device, seconds: float) -> list[float]:
        before = clock
        run()
        return [(1.0 + clock - before) * noise for noise in (0.98, 1.0, 1.02)]

    def measured(name: str, slowdown: float) -> Path:
        class Slow(nn.Module):
            def forward(self, *branches: Tensor) -> Tensor:
                nonlocal clock
                clock += 9.0 * slowdown
                out: Tensor = baseline.plain_fuse(*branches)
                return out

        planted = replace(workloads.WORKLOADS["sk_fuse"], ours=lambda case: Slow())
        monkeypatch.setitem(workloads.WORKLOADS, "sk_fuse", planted)
        path = tmp_path / name
        size = ["--batch", "1", "--resolution", "32", "--mode", "infer"]
        chosen = ["--level", "op", "--provider", "ours-pytorch-eager", *size]
        assert main(["run", *chosen, "--out", str(path)]) == 0
        return path

    monkeypatch.setattr(measure, "sample", sample)
    measure.copy_gbps.cache_clear()
    old, repeat, slow = measured("old.csv", 1), measured("new.csv", 1), measured("slow.csv", 1.2)
    measure.copy_gbps.cache_clear()
    assert compare(old, slow, "--max-regression", "10%") == 1
    assert compare(slow, old, "--max-regression", "10%") == 0
    assert compare(old, repeat) == 0
    rows = tables.compare(schema.read(old), schema.read(slow), 0.1).rows
    verdicts = dict(zip(rows.workload, rows.verdict, strict=True))
    assert [name for name, verdict in verdicts.items() if verdict == "slower"] == ["sk_fuse"]
