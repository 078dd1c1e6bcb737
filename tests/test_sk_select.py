from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from sknet_kernels.config import LaunchConfig
from sknet_triton import Backend, functional, use_backend
from tests.helpers import (
    BACKENDS,
    DEVICE,
    Case,
    assert_close,
    assert_matches,
    every_case,
    laid_out,
    magnitudes,
    weighed,
    weights,
    wide,
)
from tests.launchers import select, select_bwd, tiled

# exp, its argument, the quotient, the product and one addition a branch.
ROUNDINGS = 16.0
SUM_ROUNDINGS = 80.0


def textbook(branches: list[Tensor], logits: Tensor, activation: str | None = "softmax") -> Tensor:
    """The weighted sum of the branches, as every tutorial writes it."""
    return weighed(branches, weights(logits, activation))


def spread(logits: Tensor) -> float:
    """The error of a weight in units of its rounding: it grows with its logit's distance."""
    return 1.0 + (logits.amax(1) - logits.amin(1)).max().item() if logits.numel() else 1.0


def check_forward(out: Tensor, xs: list[Tensor], logits: Tensor) -> None:
    magnitude = textbook(magnitudes(xs), logits.double())
    terms = ROUNDINGS * spread(logits)
    assert_matches(out, textbook(wide(xs), logits.double()), magnitude, terms)


def check_backward(
    grads: tuple[list[Tensor], Tensor], dout: Tensor, xs: list[Tensor], logits: Tensor
) -> None:
    *exact_xs, exact_logits = leaves = [t.requires_grad_() for t in wide([*xs, logits])]
    out = textbook(exact_xs, exact_logits)
    *dxs, dlogits = torch.autograd.grad(out, leaves, dout.double())
    for i, (dx, exact) in enumerate(zip(grads[0], dxs, strict=True)):
        assert_matches(dx, exact, exact.abs(), ROUNDINGS * spread(logits), f"dx{i}")
    # The sum of magnitudes: no difference is taken.
    attn = weights(logits.double())
    sums = [(dout.double().abs() * x).flatten(2).sum(2) for x in magnitudes(xs)]
    shares = attn * torch.stack(sums, 1)
    magnitude = shares + attn * shares.sum(1, keepdim=True)
    assert_matches(grads[1], dlogits, magnitude, SUM_ROUNDINGS * spread(logits), "dlogits")


@every_case
def test_forward_and_backward_match_float64(case: Case) -> None:
    xs, logits, dout = case.branches(), case.logits(), case.tensor(seed=99)
    out = select(xs, logits)
    assert out.dtype == case.dtype
    check_forward(out, xs, logits)
    check_backward(select_bwd(dout, xs, logits), dout, xs, logits)


@pytest.mark.parametrize("M", [2, 3])
@pytest.mark.parametrize(
    ("backend", "layout"),
    [
        *(("triton", layout) for layout in ("contiguous", "channels_last", "sliced", "transposed")),
        *(("reference", layout) for layout in ("contiguous", "channels_last")),
    ],
)
def test_output_has_the_layout_of_the_first_branch(backend: Backend, layout: str, M: int) -> None:
    first, *rest = Case((2, 8, 6, 5), M, layout).branches()
    other = "channels_last" if layout == "contiguous" else "contiguous"
    xs = [first, *(laid_out(x.contiguous(), other) for x in rest)]
    with use_backend(backend):
        out = functional.sk_select(xs, torch.randn(2, M, 8, device=DEVICE))
    expected = torch.empty_like(first).stride() if layout != "transposed" else (240, 30, 5, 1)
    assert out.stride() == expected


@pytest.mark.parametrize(
    ("splits", "layout", "M"),
    [(2, "contiguous", 1), (3, "contiguous", 3), (2, "channels_last", 3), (3, "channels_last", 1)],
)
def test_backward_split_over_programs(splits: int, layout: str, M: int) -> None:
    case = Case((2, 5, 7, 4), M=M, layout=layout, dtype=torch.bfloat16)
    xs, logits, dout = case.branches(), case.logits(), case.tensor(seed=99)
    config = LaunchConfig(block_c=4, block_s=4, splits=splits, num_warps=1)
    grads = select_bwd(dout, xs, logits, config=config)
    check_backward(grads, dout, xs, logits)
    again = select_bwd(dout, xs, logits, config=config)
    assert torch.equal(grads[1], again[1])


LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "BCM": lambda x: x.movedim(1, 2).contiguous().movedim(2, 1),
    "MCB": lambda x: x.movedim(0, 2).contiguous().movedim(2, 0),
    "sliced": lambda x: torch.cat([x, x + 1, x], 2)[:, :, : x.shape[2]],
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
    "in float32": lambda x: x.float(),
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_stride_and_in_float32_beside_half_branches(
    dtype: torch.dtype, name: str
) -> None:
    case = Case((2, 5, 4, 4), M=3, dtype=dtype)
    xs, dout = case.branches(), case.tensor(seed=99)
    xs[1], xs[2] = laid_out(xs[1], "channels_last"), laid_out(xs[2], "sliced")
    logits = LOGITS[name](case.logits())
    check_forward(select(xs, logits), xs, logits)
    grads = select_bwd(dout, xs, logits)
    assert grads[1].dtype == logits.dtype
    check_backward(grads, dout, xs, logits)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_far_apart_choose_one_branch(activation: str) -> None:
    xs = Case((1, 2, 3, 3), M=3).branches()
    third = 0.0 if activation == "softmax" else -1e4
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4], [third, third]]], device=DEVICE)
    out = select(xs, logits, activation=activation)
    assert torch.equal(out[:, 0], xs[0][:, 0])
    assert torch.equal(out[:, 1], xs[1][:, 1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda out: out.sum(),
        lambda out: torch.cat([out, out * 2], 1)[:, 3:7].square().sum(),
        lambda out: out.mean((2, 3)).square().sum(),
        lambda out: out.transpose(2, 3).contiguous().flatten(2)[..., ::2].square().sum(),
    ],
    ids=["stride-0", "cat", "mean", "strided"],
)
def test_gradients_that_arrive_with_any_stride(loss: Callable[[Tensor], Tensor]) -> None:
    case = Case((2, 5, 4, 3), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*case.branches(), case.logits())]
    with use_backend("triton"):
        grads = torch.autograd.grad(loss(functional.sk_select(leaves[:-1], leaves[-1])), leaves)
    expected = torch.autograd.grad(loss(textbook(leaves[:-1], leaves[-1])), leaves)
    assert_close(grads, expected, bound=1e-12)


def test_saved_for_the_backward_is_the_branches_and_the_logits() -> None:
    case = Case((2, 4, 5, 5), M=3)
    leaves = [t.requires_grad_() for t in (*case.branches(), case.logits())]
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        functional.sk_select(leaves[:-1], leaves[-1])
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in leaves)


ACTIVATIONS = (*get_args(functional.Activation)[1:], None)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 24, 7, 7), M=1),
        Case((2, 6, 5, 4), M=3, layout="channels_last"),
        Case((1, 63, 14, 14), M=2, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_other_activations_match_float64(
    case: Case, backend: Backend, activation: functional.Activation | None
) -> None:
    xs, logits = case.branches(), case.logits()
    with use_backend(backend):
        out = functional.sk_select(xs, logits, activation=activation)
    # Weights that do not sum to one: every branch is as large as its weight lets it be.
    terms = ROUNDINGS * (1.0 + logits.double().abs().max().item())
    attn = weights(logits.double(), activation)
    assert_matches(out, weighed(wide(xs), attn), weighed(magnitudes(xs), attn.abs()), terms)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", ["triton", "reference", "split"])
@pytest.mark.parametrize("M", [1, 3])
def test_gradients_of_other_activations(
    M: int, way: str, activation: functional.Activation | None
) -> None:
    case = Case((2, 5, 7, 4), M, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*case.branches(), case.logits())]
    dout = case.tensor(seed=99)
    split = LaunchConfig(block_c=4, block_s=4, splits=3, num_warps=1)
    backend: Backend = "reference" if way == "reference" else "triton"
    with use_backend(backend), tiled(split if way == "split" else None):
        out = functional.sk_select(leaves[:-1], leaves[-1], activation=activation)
        grads = torch.autograd.grad(out, leaves, dout)
    expected = torch.autograd.grad(textbook(leaves[:-1], leaves[-1], activation), leaves, dout)
    assert_close(grads, expected, bound=1e-12)
