"""`python -m perf host` and its driver: kernels are compiled and launched, and nothing runs."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from perf.static import launches
from tests.helpers import source_environment

ROOT = Path(__file__).parent.parent
COMPILED = source_environment(TRITON_INTERPRET="0")


def test_it_refuses_a_process_that_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: nothing is launched where it is 1"):
        launches.install()


@pytest.mark.slow
def test_the_command_times_both_sides_and_writes_a_report(tmp_path: Path) -> None:
    path = tmp_path / "host.csv"
    subprocess.run(
        [sys.executable, "-m", "perf", "host", "--rounds", "2", "--out", str(path)],
        env=COMPILED,
        cwd=ROOT,
        check=True,
    )
    report = pd.read_csv(path)
    assert list(zip(report.M, report["mode"], strict=True)) == [
        (2, "infer"),
        (2, "train"),
        (3, "infer"),
        (3, "train"),
    ]
    assert (report[["ours_us", "plain_us", "ratio"]] > 0).all(axis=None)
    # With two rounds both percentiles lie outside of the median's two.
    assert (report.ratio_p20 <= report.ratio).all()
    assert (report.ratio <= report.ratio_p80).all()
