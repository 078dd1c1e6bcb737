import pytest
import torch
from torch import Tensor

from sknet_kernels.config import LaunchConfig
from sknet_triton import Backend, functional, use_backend
from sknet_triton.functional import Reduction
from tests.helpers import (
    BACKENDS,
    DEVICE,
    Case,
    assert_matches,
    averaged,
    every_case,
    laid_out,
    magnitudes,
    wide,
)
from tests.launchers import fuse

# A lane adds at most this many numbers one after the other; the tree that joins lanes adds ten.
ROUNDINGS = 64.0


def check(out: Tensor, xs: list[Tensor], positions: int = 1) -> None:
    """Asserts the average over space, times ``positions``."""
    magnitude = positions * averaged(magnitudes(xs))
    assert_matches(out, positions * averaged(wide(xs)), magnitude, ROUNDINGS)


@every_case
def test_forward_matches_float64(case: Case) -> None:
    xs = case.branches()
    out = fuse(xs)
    assert out.dtype == case.dtype
    check(out, xs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 7])  # the last of 5 splits has no positions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_split_over_programs_is_right_and_repeatable(
    layout: str, splits: int, reduction: str
) -> None:
    xs = Case((2, 5, 7, 8), M=3, layout=layout, dtype=torch.bfloat16).branches()
    config = LaunchConfig(block_c=4, block_s=8, splits=splits, num_warps=1)
    out = fuse(xs, reduction, config=config)
    check(out, xs, positions=56 if reduction == "sum" else 1)
    assert torch.equal(out, fuse(xs, reduction, config=config))


def test_branches_of_different_layouts() -> None:
    xs = Case((2, 4, 3, 5), M=3).branches()
    xs[1], xs[2] = laid_out(xs[1], "channels_last"), laid_out(xs[2], "sliced")
    check(fuse(xs), xs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("reduction", "positions"), [("mean", 20), ("sum", 1)])
def test_the_gradient_is_a_share_of_what_arrives(
    reduction: Reduction,
    positions: int,
    dtype: torch.dtype,
    layout: str,
    backend: Backend,
) -> None:
    xs = [x.requires_grad_() for x in Case((2, 3, 5, 4), 3, layout, dtype).branches()]
    dout = torch.randn(2, 3, dtype=dtype, device=DEVICE)
    with use_backend(backend):
        out = functional.sk_fuse(xs, reduction=reduction)
    check(out, xs, 20 // positions)
    share = (dout.double() / positions).to(dtype)[:, :, None, None].expand_as(xs[0])
    for grad in torch.autograd.grad(out, xs, dout):
        torch.testing.assert_close(grad, share, rtol=torch.finfo(dtype).eps, atol=0)
