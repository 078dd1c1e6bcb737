"""The passes that kernels/README.md promises, counted in the interpreter, and those of plans."""

import itertools

import pytest
import torch

from perf.static.bytes import counted_bytes
from perf.static.traffic import traffic
from sknet_kernels.config import LaunchConfig
from tests.helpers import Case
from tests.launchers import fuse, select, select_bwd

pytestmark = pytest.mark.interpreter

LAYOUTS = ("contiguous", "channels_last")
# One split, as large batches have: what is counted beside the branches is their sums, once.
WHOLE = LaunchConfig(block_c=8, block_s=64)


def one_pass(case: Case) -> int:
    return int(torch.Size(case.shape).numel()) * torch.finfo(case.dtype).bits // 8


def cases() -> list[Case]:
    # 24 channels leave lanes of a tile over, which may not touch memory.
    return [Case((2, 24, 28, 28), layout=layout, dtype=torch.bfloat16) for layout in LAYOUTS] + [
        Case((2, 16, 14, 14), M=M, layout=layout, dtype=torch.bfloat16)
        for M in (2, 3)
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_fuse_reads_every_branch_once(case: Case, device: torch.device) -> None:
    xs = case.branches(device)
    with counted_bytes() as count:
        fuse(xs, config=WHOLE)
    assert count.passes(one_pass(case)) == pytest.approx(case.M, rel=0.02)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_select_reads_every_branch_and_writes_one(case: Case, device: torch.device) -> None:
    xs, logits = case.branches(device), case.logits(device)
    with counted_bytes() as count:
        select(xs, logits)
    assert count.written == one_pass(case)
    assert count.passes(one_pass(case)) == pytest.approx(case.M + 1, rel=0.02)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_select_backward_reads_everything_once(case: Case, device: torch.device) -> None:
    xs, logits, dout = case.branches(device), case.logits(device), case.tensor(device, seed=9)
    with counted_bytes() as count:
        select_bwd(dout, xs, logits, config=WHOLE)
    assert count.passes(one_pass(case)) == pytest.approx(2 * case.M + 1, rel=0.02)


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
