"""The passes that kernels/README.md promises, counted in the interpreter, and those of plans."""

import itertools
from collections.abc import Callable

import pytest
import torch

from perf.static.bytes import counted_bytes
from perf.static.traffic import traffic
from sknet_kernels.config import LaunchConfig
from tests.helpers import Case
from tests.launchers import fuse, select, select_bwd

pytestmark = pytest.mark.interpreter

# One split, as large batches have: what is counted beside the branches is their sums, once.
WHOLE = LaunchConfig(block_c=8, block_s=64)


CASES = [
    Case(shape, M=M, layout=layout, dtype=torch.bfloat16)
    # 24 channels leave lanes of a tile over, which may not touch memory.
    for shape, M in (((2, 24, 28, 28), 2), ((2, 16, 14, 14), 2), ((2, 16, 14, 14), 3))
    for layout in ("contiguous", "channels_last")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_passes_of_the_stages_by_themselves(case: Case) -> None:
    xs, logits, dout = case.branches(), case.logits(), case.tensor(seed=9)
    calls: list[tuple[Callable[[], object], int]] = [
        (lambda: fuse(xs, config=WHOLE), case.M),
        (lambda: select(xs, logits), case.M + 1),
        (lambda: select_bwd(dout, xs, logits, config=WHOLE), 2 * case.M + 1),
    ]
    written = []
    for call, passes in calls:
        with counted_bytes() as count:
            call()
        assert count.passes(dout.nbytes) == pytest.approx(passes, rel=0.02)
        written.append(count.written)
    assert written[1] == dout.nbytes


PLANS = ("plain-eager", "plain-compile", "ours-pytorch-compile", "ours-triton-eager")


@pytest.mark.slow
def test_every_plan_is_counted() -> None:
    rows = list(itertools.islice(traffic((2, 8, 14, 14), torch.float32), len(PLANS)))
    assert [row.provider for row in rows] == list(PLANS)
    eager, compiled, reference, triton = rows
    # The plan of our formulas comes near the kernels' passes; here small tensors decide.
    assert eager.training > compiled.training > max(reference.training, triton.training)
    assert min(reference.training, triton.training) >= 15
    assert eager.inference > compiled.inference > triton.inference >= 5
    assert compiled.saved > reference.saved >= 2
