"""The traffic table: its counters agree with what is known, and the CSV with what is promised."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from perf.static.traffic import traffic

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "perf" / "reports" / "traffic-cpu-torch2.13.0.csv"
PLANS = ("plain-eager", "plain-compile", "ours-pytorch-compile", "ours-triton-eager")


def test_the_committed_table_keeps_the_promises() -> None:
    table = pd.read_csv(REPORT)
    for M, training, inference, saved in ((2, 15.3, 5.1, 2.02), (3, 21.4, 7.1, 3.03)):
        ours = table[(table.provider == "ours-triton-eager") & (table.M == M)]
        assert len(ours) == 2
        assert (ours.training.between(6 * M + 3, training)).all()
        assert (ours.inference.between(2 * M + 1, inference)).all()
        assert (ours.saved.between(M, saved)).all()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted in the interpreter")
def test_every_plan_is_counted() -> None:
    rows = list(itertools.islice(traffic((2, 8, 14, 14), torch.float32), len(PLANS)))
    assert [row.provider for row in rows] == list(PLANS)
    eager, compiled, reference, triton = rows
    assert eager.training > compiled.training > reference.training > triton.training >= 15
    assert eager.inference > compiled.inference > triton.inference >= 5
    assert compiled.saved > reference.saved >= 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["traffic", "--shape", "1", "8", "4", "4"], "--shape: expected B >= 2"),
        (["kernels"], "TRITON_INTERPRET: kernels cannot be compiled where it is 1"),
    ],
    ids=["traffic", "kernels"],
)
def test_wrong_arguments_are_one_line_and_exit_2(arguments: list[str], line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "perf", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
