"""What holds for branches of any size, dtype and memory layout, on both backends.

The examples, how they are drawn and how a failure is reproduced: `tests.strategies`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sknet_kernels.config import MAX_BRANCHES, LaunchConfig
from sknet_triton import Backend, functional, use_backend
from sknet_triton.functional import Activation, Reduction
from sknet_triton.reference import accumulation_dtype, passes
from tests import launchers, strategies
from tests.helpers import (
    BACKENDS,
    assert_matches,
    averaged,
    magnitudes,
    store_rounding,
    weighed,
    weights,
    wide,
)
from tests.strategies import (
    DTYPES,
    Sample,
    examples,
    launch_configs,
    samples,
)

pytestmark = pytest.mark.slow

ACTIVATIONS = (*get_args(Activation), None)
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")

_Check = TypeVar("_Check", bound=Callable[..., None])


@dataclass(frozen=True)
class Budget:
    """Examples of one property; one in the interpreter costs as much as ten without it."""

    reference: int = 0
    triton: int = 0


SELECT = Budget(reference=800, triton=60)
FUSE = Budget(reference=700, triton=60)
FUSE_SELECT = Budget(reference=60, triton=15)
LOW_FUSE_SELECT = Budget(reference=60, triton=20)
CONFIGS, LAYOUT, MANY_BRANCHES = 30, 150, 60


def holds(
    budget: Budget, **drawn: st.SearchStrategy[Any]
) -> Callable[[_Check], Callable[[Backend], None]]:
    """Makes a test of both backends from a check of ``backend`` and what is drawn."""

    def decorate(check: _Check) -> Callable[[Backend], None]:
        @pytest.mark.parametrize("backend", BACKENDS)
        def test(backend: Backend) -> None:
            property_test = given(backend=st.just(backend), **drawn)(check)
            examples(getattr(budget, backend))(property_test)()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
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


@holds(SELECT, sample=samples(), activation=st.sampled_from(ACTIVATIONS))
def test_select_and_its_gradients_match_float64(
    backend: Backend, sample: Sample, activation: Activation | None
) -> None:
    check_select(backend, sample, activation)


def check_select(backend: Backend, sample: Sample, activation: Activation | None) -> None:
    *xs, logits = leaves_of([*sample.random_branches(), sample.random_logits()])
    dout = sample.random_dout()
    with use_backend(backend):
        out = functional.sk_select(xs, logits, activation=activation)
        *dxs, dlogits = torch.autograd.grad(out, [*xs, logits], dout)
    if backend == "triton" and sample.shape[0]:
        for result, x in zip((out, *dxs), (xs[0], *xs), strict=True):
            assert strides(result) == strides(like(x)), (x.shape, x.stride())
    assert [g.dtype for g in dxs] == [sample.dtype] * sample.num_branches
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


@holds(FUSE, sample=samples(), reduction=st.sampled_from(REDUCTIONS))
def test_fuse_and_its_gradients_match_float64(
    backend: Backend, sample: Sample, reduction: Reduction
) -> None:
    check_fuse(backend, sample, reduction)


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
    (B, C), M = sample.shape[:2], sample.num_branches
    norms, logits = launchers.random_norms(M, C, dout), sample.small(1, B, M, C)
    norm, attn = launchers.norm_rows(norms), torch.softmax(logits, 1)
    share, drift = sample.small(2, B, C), sample.small(3, 2, M, C)
    pairs: list[tuple[Tensor, Tensor]] = [
        (launchers.fuse_norm(xs, norms, config=config), passes.fuse(xs, norm)),
        (launchers.select(xs, logits, norms, config=config), passes.select(xs, logits, norm)),
        (launchers.sums(dout, xs, norms, config=config), passes.sums(dout, xs, norm)),
    ]
    got = launchers.dx(dout, xs, norms, logits, share, drift, config=config)
    rows = drift.transpose(0, 1)
    pairs += zip(got, passes.gradients(dout, xs, norm, attn, share, rows), strict=True)
    if B:
        pairs += zip(launchers.moments(xs, config=config)[:2], passes.moments(xs), strict=True)
    for actual, exact in pairs:
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-11)


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


@dataclass(frozen=True)
class Parts:
    """What `sk_fuse_select` takes beside the branches, in float64."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc1_gamma: Tensor
    fc1_beta: Tensor
    fc1_mean: Tensor
    fc1_var: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    @classmethod
    def of(cls, sample: Sample, d: int) -> "Parts":
        C, M = sample.shape[1], sample.num_branches
        shapes = [(M, C)] * 4 + [(d, C)] + [(d,)] * 5 + [(M * C, d), (M * C,)]
        drawn = dict(zip(cls.__dataclass_fields__, shapes, strict=True))
        parts = {k: sample.small(i, *shape) for i, (k, shape) in enumerate(drawn.items())}
        for variance in ("var", "fc1_var"):
            parts[variance] = parts[variance].abs() + 0.5
        parts["fc1_weight"] /= C**0.5
        parts["fc2_weight"] /= d**0.5
        return cls(**parts)

    def trained(self) -> list[Tensor]:
        """Returns what has a gradient."""
        constant = ("mean", "var", "fc1_mean", "fc1_var")
        return [x for name, x in vars(self).items() if name not in constant]


@holds(
    FUSE_SELECT,
    sample=samples(branches=st.integers(1, 3), dtypes=(torch.float64,), batches=(2, 3)),
    d=st.integers(1, 5),
    batch_stats=st.booleans(),
    fc1_batch_stats=st.booleans(),
)
def test_fuse_select_equals_its_modules_with_every_gradient(
    backend: Backend, sample: Sample, d: int, batch_stats: bool, fc1_batch_stats: bool
) -> None:
    xs, p, dout = leaves_of(sample.random_branches()), Parts.of(sample, d), sample.random_dout()
    leaves = [*xs, *(x.requires_grad_() for x in p.trained())]
    with use_backend(backend):
        out = fuse_select(xs, p, batch_stats, fc1_batch_stats)
        grads = torch.autograd.grad(out, leaves, dout)
    exact = modules(xs, p, batch_stats, fc1_batch_stats)
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
    backend: Backend, sample: Sample, d: int, batch_stats: bool
) -> None:
    xs, p = sample.random_branches(), Parts.of(sample, d)
    with use_backend(backend):
        out = fuse_select(xs, p, batch_stats, False)
    exact = modules(wide(xs), p, batch_stats, False)
    eps, stored = torch.finfo(torch.float32).eps, torch.finfo(sample.dtype).eps
    bound = FUSE_SELECT_ROUNDINGS * eps / EPS**0.5 * (1 + exact.abs().max())  # one batch norm
    bound = bound + store_rounding(out) * stored * exact.abs()
    assert ((out.double() - exact).abs() <= bound).all()


def fuse_select(xs: Sequence[Tensor], p: Parts, batch_stats: bool, fc1_batch_stats: bool) -> Tensor:
    """V by `sk_fuse_select`, with parameters in the dtype of the sums."""
    dtype = accumulation_dtype(xs[0].dtype)
    q = Parts(**{name: x.to(dtype) for name, x in vars(p).items()})
    rows = zip(q.gamma, q.beta, q.mean, q.var, strict=True)
    norms = [functional.BatchNormArgs(*row, eps=EPS, batch_stats=batch_stats) for row in rows]
    fc1_norm = functional.BatchNormArgs(
        q.fc1_gamma, q.fc1_beta, q.fc1_mean, q.fc1_var, EPS, fc1_batch_stats
    )
    return functional.sk_fuse_select(
        list(xs),
        norms,
        q.fc1_weight,
        fc1_norm,
        q.fc2_weight,
        fc1_bias=q.fc1_bias,
        fc2_bias=q.fc2_bias,
    ).out


def modules(xs: Sequence[Tensor], p: Parts, batch_stats: bool, fc1_batch_stats: bool) -> Tensor:
    """V by the functions that the modules call."""
    F = torch.nn.functional

    def normed(x: Tensor, row: Sequence[Tensor], training: bool) -> Tensor:
        gamma, beta, *running = row
        mean, var = (None, None) if training else running
        return torch.relu(F.batch_norm(x, mean, var, gamma, beta, training, eps=EPS))

    rows = zip(p.gamma, p.beta, p.mean, p.var, strict=True)
    us = [normed(x, row, batch_stats) for x, row in zip(xs, rows, strict=True)]
    hidden = F.linear(averaged(us, "mean"), p.fc1_weight, p.fc1_bias)
    row = (p.fc1_gamma, p.fc1_beta, p.fc1_mean, p.fc1_var)
    z = normed(hidden, row, fc1_batch_stats)
    logits = F.linear(z, p.fc2_weight, p.fc2_bias).view(len(hidden), len(xs), -1)
    return weighed(us, weights(logits, "softmax"))


# --- what a failure prints ----------------------------------------------------------------------


def test_a_failure_prints_all_that_reproduces_it() -> None:
    seen: list[Sample] = []

    @examples(20)
    @given(sample=samples())
    def fails(sample: Sample) -> None:
        seen.append(sample)
        raise AssertionError

    with pytest.raises(AssertionError) as failure:
        fails()
    printed = "\n".join(failure.value.__notes__)
    assert "@reproduce_failure(" in printed
    found = re.search(r"sample=(Sample\(.*\)),", printed, re.DOTALL)
    assert found is not None
    again = eval(found[1], {**vars(strategies), "torch": torch})
    assert again == seen[-1]
    for x, y in zip(again.random_branches(), seen[-1].random_branches(), strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()
