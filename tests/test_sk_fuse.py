import pytest
import torch
from torch import Tensor

from sknet_kernels.config import LaunchConfig, cdiv
from sknet_triton import Backend, functional, use_backend
from tests.helpers import Case, assert_matches, averaged, every_case, laid_out, magnitudes, wide
from tests.launchers import fuse

# A lane adds at most this many numbers one after the other; the tree that joins lanes adds ten.
ROUNDINGS = 64.0


def check(out: Tensor, xs: list[Tensor], positions: int = 1) -> None:
    """Asserts the average over space, times ``positions``."""
    magnitude = positions * averaged(magnitudes(xs))
    assert_matches(out, positions * averaged(wide(xs)), magnitude, ROUNDINGS)


@every_case
def test_forward_matches_float64(case: Case, device: torch.device) -> None:
    xs = case.branches(device)
    out = fuse(xs)
    assert out.dtype == case.dtype
    check(out, xs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_split_over_programs_is_right_and_repeatable(
    layout: str, splits: int, reduction: str, device: torch.device
) -> None:
    xs = Case((2, 5, 7, 8), M=3, layout=layout, dtype=torch.bfloat16).branches(device)
    config = LaunchConfig(block_c=4, block_s=8, splits=splits, num_warps=1)
    out = fuse(xs, reduction, config=config)
    check(out, xs, positions=56 if reduction == "sum" else 1)
    assert torch.equal(out, fuse(xs, reduction, config=config))


def test_a_split_without_positions_adds_nothing(device: torch.device) -> None:
    xs = Case((1, 2, 9)).branches(device)
    config = LaunchConfig(block_c=2, block_s=4, splits=4, num_warps=1)
    assert cdiv(9, 4) < config.splits
    check(fuse(xs, config=config), xs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_a_share_of_the_average(
    layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    xs = [x.requires_grad_() for x in Case((2, 3, 5, 4), 3, layout, dtype).branches(device)]
    dout = torch.randn(2, 3, device=device).to(dtype)
    with use_backend("triton"):
        grads = torch.autograd.grad(functional.sk_fuse(xs), xs, dout)
    for x, grad in zip(xs, grads, strict=True):
        share = (dout.double() / 20).to(dtype)[:, :, None, None].expand_as(x)
        torch.testing.assert_close(grad, share, rtol=torch.finfo(dtype).eps, atol=0)


def test_branches_of_different_layouts(device: torch.device) -> None:
    xs = Case((2, 4, 3, 5), M=3).branches(device)
    xs[1], xs[2] = laid_out(xs[1], "channels_last"), laid_out(xs[2], "sliced")
    check(fuse(xs), xs)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_sum_and_its_gradient_on_both_backends(backend: Backend, device: torch.device) -> None:
    case = Case((2, 3, 3, 2), M=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in case.branches(device)]
    weights = torch.randn(2, 3, dtype=torch.float64, device=device)
    with use_backend(backend):
        out = functional.sk_fuse(leaves, reduction="sum")
        grads = torch.autograd.grad((out * weights).sum(), leaves)
    torch.testing.assert_close(out, 6 * averaged(leaves), rtol=1e-12, atol=1e-12)
    for grad in grads:
        expected = weights[:, :, None, None].expand(2, 3, 3, 2)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
