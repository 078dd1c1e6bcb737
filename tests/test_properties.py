"""What holds for branches of any size, dtype and memory layout, on both backends.

The examples, how they are drawn and how a failure is reproduced: `tests.strategies`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sknet_kernels.config import MAX_BRANCHES, LaunchConfig
from sknet_triton import Backend, functional, use_backend
from sknet_triton.functional import Activation, Reduction
from sknet_triton.reference import accumulation_dtype, steps
from tests import launchers
from tests.helpers import (
    BACKENDS,
    DTYPES,
    assert_close,
    assert_matches,
    averaged,
    beside_branches,
    magnitudes,
    plain_fuse_select,
    store_rounding,
    trained,
    weighed,
    weights,
    wide,
)
from tests.strategies import Sample, examples, launch_configs, samples

pytestmark = pytest.mark.slow

ACTIVATIONS = (*get_args(Activation), None)
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")

# Examples of a property by backend; one in the interpreter costs as much as ten without it.
SELECT = {"reference": 800, "triton": 60}
FUSE = {"reference": 700, "triton": 60}
FUSE_SELECT = {"reference": 60, "triton": 15}
LOW_FUSE_SELECT = {"reference": 60, "triton": 20}
CONFIGS, LAYOUT, MANY_BRANCHES = 30, 150, 60


def holds(
    budget: dict[str, int], **drawn: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[Backend], None]]:
    """Makes a test of both backends from a check of ``backend`` and what is drawn."""

    def decorate(check: Callable[..., None]) -> Callable[[Backend], None]:
        @pytest.mark.parametrize("backend", BACKENDS)
        def test(backend: Backend) -> None:
            examples(budget[backend])(given(backend=st.just(backend), **drawn)(check))()

        return test

    return decorate


# exp, its argument, the quotient, the product and one addition a branch, as in test_sk_select.
ROUNDINGS = 16.0
# A lane adds at most this many numbers one after the other; the tree that joins lanes adds ten.
SUM_ROUNDINGS = 80.0


# --- float64 oracles and the magnitudes that bound their rounding -------------------------------


def reach(logits: Tensor) -> float:
    """The error of a weight in units of its rounding: it grows with its logit's distance."""
    return 1.0 + 2.0 * float(logits.detach().double().abs().amax()) if logits.numel() else 1.0


def assert_is(
    actual: Tensor, exact: Tensor, magnitude: Tensor, terms: float, name: str, branch: torch.dtype
) -> None:
    """`assert_matches`, where ``actual`` is no finer than its sums were."""
    finer = actual.dtype == torch.float64 and accumulation_dtype(branch) == torch.float32
    assert_matches(actual.float() if finer else actual, exact, magnitude, terms, name)


def leaves_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    # A leaf keeps its layout only as a detached view.
    return [x.detach().requires_grad_() for x in tensors]


# --- forward and backward against float64 -------------------------------------------------------


def check_select(backend: Backend, sample: Sample, activation: Activation | None) -> None:
    *xs, logits = leaves_of([*sample.random_branches(), sample.random_logits()])
    dout = sample.random_dout()
    with use_backend(backend):
        out = functional.sk_select(xs, logits, activation=activation)
        *dxs, dlogits = torch.autograd.grad(out, [*xs, logits], dout)
    if backend == "triton" and sample.shape[0]:
        for result, x in zip((out, *dxs), (xs[0], *xs), strict=True):
            assert strides(result) == strides(like(x)), (x.shape, x.stride())
    assert [g.dtype for g in dxs] == [sample.dtype] * len(sample.branches)
    assert (out.dtype, dlogits.dtype) == (sample.dtype, sample.logits_dtype)

    exact_leaves = leaves_of(wide([*xs, logits]))
    exact = weighed(exact_leaves[:-1], weights(exact_leaves[-1], activation))
    exact_grads = torch.autograd.grad(exact, exact_leaves, dout.double())
    attn = weights(logits.detach().double(), activation).abs()
    terms = ROUNDINGS * reach(logits)
    assert_is(out, exact.detach(), weighed(magnitudes(xs), attn), terms, "out", sample.dtype)
    for i, dx in enumerate(dxs):
        share = weighed([dout.double().abs()], attn[:, i : i + 1])
        assert_is(dx, exact_grads[i], share, terms, f"dx{i}", sample.dtype)
    sums = torch.stack([(dout.double().abs() * x).flatten(2).sum(2) for x in magnitudes(xs)], 1)
    if activation == "softmax":
        sums = attn * (sums + (attn * sums).sum(1, keepdim=True))
    elif activation == "sigmoid":
        sums = attn * sums  # 1 - a is off by a rounding of one
    terms = SUM_ROUNDINGS * reach(logits)
    assert_is(dlogits, exact_grads[-1], sums, terms, "dlogits", sample.dtype)


def check_fuse(backend: Backend, sample: Sample, reduction: Reduction) -> None:
    xs = leaves_of(sample.random_branches())
    dpooled = sample.small(0, *sample.shape[:2]).to(sample.dtype)
    with use_backend(backend):
        out = functional.sk_fuse(xs, reduction=reduction)
        dxs = torch.autograd.grad(out, xs, dpooled)
    exact, magnitude = (averaged(ys, reduction) for ys in (wide(xs), magnitudes(xs)))
    assert out.dtype == sample.dtype
    assert_is(out, exact, magnitude, SUM_ROUNDINGS, "pooled", sample.dtype)
    positions = torch.Size(sample.shape[2:]).numel() if reduction == "mean" else 1
    share = (dpooled.double() / positions).view(*sample.shape[:2], *(1,) * (len(sample.shape) - 2))
    share = share.expand(sample.shape)
    for i, dx in enumerate(dxs):
        assert dx.dtype == sample.dtype
        assert_is(dx, share, share.abs(), ROUNDINGS, f"dx{i}", sample.dtype)


test_select_and_its_gradients_match_float64 = holds(
    SELECT, sample=samples(), activation=st.sampled_from(ACTIVATIONS)
)(check_select)
test_fuse_and_its_gradients_match_float64 = holds(
    FUSE, sample=samples(), reduction=st.sampled_from(REDUCTIONS)
)(check_fuse)


@examples(MANY_BRANCHES)
@given(
    sample=samples(branches=st.integers(MAX_BRANCHES + 1, 20)),
    activation=st.sampled_from(ACTIVATIONS),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_the_reference_takes_any_number_of_branches(
    sample: Sample, activation: Activation | None, reduction: Reduction
) -> None:
    check_select("reference", sample, activation)
    check_fuse("reference", sample, reduction)


@examples(CONFIGS)
@given(sample=samples(), config=launch_configs())
def test_any_tile_and_any_split_give_the_same(sample: Sample, config: LaunchConfig) -> None:
    xs, dout, logits = sample.random_branches(), sample.random_dout(), sample.random_logits()
    attn = weights(logits.double(), "softmax")
    terms = SUM_ROUNDINGS * reach(logits)

    pooled, average = launchers.fuse(xs, config=config), averaged(magnitudes(xs), "mean")
    assert_is(pooled, averaged(wide(xs), "mean"), average, terms, "pooled", sample.dtype)
    out, largest = launchers.select(xs, logits, config=config), weighed(magnitudes(xs), attn)
    assert_is(out, weighed(wide(xs), attn), largest, terms, "out", sample.dtype)
    dxs, dlogits = launchers.select_bwd(dout, xs, logits, config=config)
    for i, dx in enumerate(dxs):
        exact = weighed([dout.double()], attn[:, i : i + 1])
        assert_is(dx, exact, exact.abs(), terms, f"dx{i}", sample.dtype)
    sums = torch.stack([(dout.double() * x).flatten(2).sum(2) for x in wide(xs)], 1)
    bounds = torch.stack([(dout.double() * x).abs().flatten(2).sum(2) for x in wide(xs)], 1)
    exact = attn * (sums - (attn * sums).sum(1, keepdim=True))
    bounds = attn * (bounds + (attn * bounds).sum(1, keepdim=True))
    assert_is(dlogits, exact, bounds, terms, "dlogits", sample.dtype)
    check_norm_kernels(sample, config)


def check_norm_kernels(sample: Sample, config: LaunchConfig) -> None:
    """The kernels that know norms, in float64 and so to its last digits."""
    xs, dout = wide(sample.random_branches()), sample.random_dout().double()
    (B, C), M = sample.shape[:2], len(sample.branches)
    norms, logits = launchers.random_norms(M, C, dout), sample.small(1, B, M, C)
    share, drift = sample.small(2, B, C), sample.small(3, 2, M, C)
    actual = [
        launchers.fuse_norm(xs, norms, config=config),
        launchers.select(xs, logits, norms, config=config),
        launchers.sums(dout, xs, norms, config=config),
        *launchers.dx(dout, xs, norms, logits, share, drift, config=config),
    ]
    exact = [
        steps.fuse(xs, norms),
        steps.out(xs, logits, norms),
        steps.sums(dout, xs, norms),
        *steps.dx(dout, xs, logits, norms, share, drift),
    ]
    if B:
        actual += launchers.moments(xs, config=config)[:2]
        exact += map(torch.stack, zip(*map(steps.moments_of, xs), strict=True))
    assert_close(actual, exact)


@examples(LAYOUT)
@given(sample=samples(first_kinds=("contiguous", "channels_last", "sliced")))
def test_the_reference_keeps_the_two_usual_layouts(sample: Sample) -> None:
    xs, logits = sample.random_branches(), sample.random_logits()
    with use_backend("reference"):
        out = functional.sk_select(xs, logits)
    assert strides(out) == strides(like(xs[0])) or 0 in out.shape


def like(x: Tensor) -> Tensor:
    """A new tensor in the layout of ``x``, contiguous where its space is uneven."""
    new = torch.empty_like(x)
    return new if new.flatten(2).data_ptr() == new.data_ptr() else torch.empty(x.shape)


def strides(x: Tensor) -> list[int]:
    """The strides that mean something: an axis of one index has any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


# --- everything between the convolutions and V --------------------------------------------------

# Each is multiplied by the gain of a norm, at most 1 / sqrt(eps), of which there are two in a row.
FUSE_SELECT_ROUNDINGS = 64.0
EPS = 1e-5


def beside(sample: Sample, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """Returns what `sk_fuse_select` takes beside the sample's branches, always the same."""
    streams = count()
    arguments = beside_branches(
        len(sample.branches),
        sample.shape[1],
        dtype=dtype,
        draw=lambda *shape: sample.small(next(streams), *shape),
        **options,
    )
    norms, fc1_norm = arguments["norms"], arguments["fc1_norm"]
    return arguments | {
        "norms": [replace(norm, eps=EPS) for norm in norms],
        "fc1_norm": replace(fc1_norm, eps=EPS),
    }


@holds(
    FUSE_SELECT,
    sample=samples(branches=st.integers(1, 3), dtypes=(torch.float64,), batches=(2, 3)),
    d=st.integers(1, 5),
    batch_stats=st.booleans(),
    fc1_batch_stats=st.booleans(),
)
def test_fuse_select_equals_its_modules_with_every_gradient(
    backend: Backend, sample: Sample, **options: Any
) -> None:
    xs, dout = leaves_of(sample.random_branches()), sample.random_dout()
    arguments = beside(sample, torch.float64, **options)
    leaves = [*xs, *trained(arguments)]
    with use_backend(backend):
        out = functional.sk_fuse_select(xs, **arguments).out
        grads = torch.autograd.grad(out, leaves, dout)
    exact = plain_fuse_select(xs, **arguments).out
    exact_grads = torch.autograd.grad(exact, leaves, dout)
    relative = FUSE_SELECT_ROUNDINGS * torch.finfo(torch.float64).eps / EPS
    for i, (got, expected) in enumerate(zip((out, *grads), (exact, *exact_grads), strict=True)):
        size = 1 + expected.abs().max()
        assert (got - expected).abs().max() <= relative * size, f"result {i}"


@holds(
    LOW_FUSE_SELECT,
    sample=samples(branches=st.integers(1, 3), dtypes=DTYPES[:3], batches=(2, 3)),
    d=st.integers(1, 5),
    batch_stats=st.booleans(),
)
def test_fuse_select_of_low_dtypes_rounds_only_what_it_stores(
    backend: Backend, sample: Sample, **options: Any
) -> None:
    options["fc1_batch_stats"] = False
    xs = sample.random_branches()
    with use_backend(backend):
        out = functional.sk_fuse_select(xs, **beside(sample, torch.float32, **options)).out
    exact = plain_fuse_select(wide(xs), **beside(sample, torch.float64, **options)).out
    eps, stored = torch.finfo(torch.float32).eps, torch.finfo(sample.dtype).eps
    bound = FUSE_SELECT_ROUNDINGS * eps / EPS**0.5 * (1 + exact.abs().max())  # one batch norm
    bound = bound + store_rounding(out) * stored * exact.abs()
    assert ((out.double() - exact).abs() <= bound).all()
