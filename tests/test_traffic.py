"""The traffic table: its counters agree with what is known."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from perf.static.traffic import traffic
from tests.helpers import ROOT

PLANS = ("plain-eager", "plain-compile", "ours-pytorch-compile", "ours-triton-eager")


@pytest.mark.slow
@pytest.mark.interpreter
def test_every_plan_is_counted() -> None:
    rows = list(itertools.islice(traffic((2, 8, 14, 14), torch.float32), len(PLANS)))
    assert [row.provider for row in rows] == list(PLANS)
    eager, compiled, reference, triton = rows
    # The plan of our formulas comes near the kernels' passes; here small tensors decide.
    assert eager.training > compiled.training > max(reference.training, triton.training)
    assert min(reference.training, triton.training) >= 15
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
