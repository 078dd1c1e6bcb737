"""The traffic table: its counters agree with what is known."""

import itertools

import pytest
import torch

from perf.static.traffic import traffic

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
