"""The small kernels between fuse and select against float64, most of it through PyTorch's autograd.

Rounding errors are bounded by the sums of the magnitudes that a result is made of.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perf.static.specialisations import chosen
from sknet_kernels.norms import ChannelGradients, Norms, Running
from sknet_kernels.sk_fuse_mlp import (
    sk_channels_bwd,
    sk_hidden,
    sk_hidden_bwd,
    sk_logits,
)
from sknet_kernels.small import CHANNELS_BWD, HIDDEN, HIDDEN_BWD, LOGITS, SmallConfig
from tests.helpers import DEVICE, assert_matches

EPS = 1e-5
S = 6


@dataclass(frozen=True)
class MLPCase:
    """Sizes and settings of the MLP and of the norms around it, and why they are tested."""

    B: int
    C: int
    d: int
    M: int
    splits: int = 1
    dtype: torch.dtype = torch.float32
    acc: torch.dtype = torch.float32
    affine: bool = True
    fc1_affine: bool = True
    biases: bool = True
    batch_stats: bool = True
    fc1_batch_stats: bool = True
    why: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"B{self.B}-C{self.C}-d{self.d}-M{self.M}-{str(self.dtype).removeprefix('torch.')}"


CASES = (
    MLPCase(5, 24, 32, 2, splits=3, why="the usual"),
    MLPCase(17, 130, 48, 2, splits=2, why="several blocks of images, channels and hidden layer"),
    MLPCase(17, 24, 5, 3, splits=5, dtype=torch.bfloat16),
    MLPCase(5, 130, 32, 8, dtype=torch.float16, splits=9, why="as many branches as go"),
    MLPCase(2, 3, 5, 1, splits=2, why="one branch: its weight is one"),
    MLPCase(1, 24, 5, 2, batch_stats=False, fc1_batch_stats=False, why="one image"),
    MLPCase(1, 1, 1, 1, batch_stats=False, fc1_batch_stats=False, why="all sizes are one"),
    MLPCase(5, 1, 1, 2, splits=2),
    MLPCase(17, 3, 48, 3, splits=4, batch_stats=False, why="constants for the branches alone"),
    MLPCase(17, 24, 32, 2, fc1_batch_stats=False, why="constants for fc1 alone"),
    MLPCase(5, 24, 5, 2, affine=False, fc1_affine=False, biases=False, why="no parameters"),
    MLPCase(5, 24, 5, 2, affine=False, biases=True, splits=2),
    MLPCase(5, 24, 5, 3, fc1_affine=False, biases=False),
    MLPCase(17, 24, 33, 2, splits=3, dtype=torch.float64, acc=torch.float64),
    MLPCase(5, 3, 70, 2, dtype=torch.float32, acc=torch.float64, why="d past a block"),
    MLPCase(2, 4, 300, 2, dtype=torch.bfloat16, why="a wide hidden layer"),
)
# Tiles so small that every loop of a kernel has several turns, the last of them partly filled.
VECTOR_TILES = SmallConfig(block_b=2, block_c=32, block_d=8, block_p=2, num_warps=1)
MATRIX_TILES = SmallConfig(16, block_c=4, block_d=16, block_n=16, block_r=4, num_warps=1)
TILES = {
    HIDDEN: VECTOR_TILES,
    HIDDEN_BWD: VECTOR_TILES,
    LOGITS: MATRIX_TILES,
    CHANNELS_BWD: MATRIX_TILES,
}
EMPTY = MLPCase(0, 24, 5, 2, splits=2)


class Given:
    """Random tensors of a case: parameters in their dtype, the rest in the accumulation dtype."""

    def __init__(self, case: MLPCase) -> None:
        B, C, d, M = case.B, case.C, case.d, case.M
        self.case = case

        def small(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=case.acc, device=DEVICE)

        def parameter(size: int, present: bool) -> Tensor | None:
            drawn = torch.randn(size, dtype=torch.float64, device=DEVICE)
            return drawn.to(case.dtype) if present else None

        def weight(rows: int, columns: int) -> Tensor:
            return (small(rows, columns) / math.sqrt(columns)).to(case.dtype)

        def norms(count: int, size: int, affine: bool, constant: bool) -> Norms:
            return Norms(
                mean=tuple(small(size) if constant else None for _ in range(count)),
                var=tuple(small(size).square() + 0.5 if constant else None for _ in range(count)),
                weight=tuple(parameter(size, affine) for _ in range(count)),
                bias=tuple(parameter(size, affine) for _ in range(count)),
                eps=EPS,
            )

        self.fc1_weight, self.fc2_weight = weight(d, C), weight(M * C, d)
        self.fc1_bias = parameter(d, case.biases)
        self.fc2_bias = parameter(M * C, case.biases)
        self.norms = norms(M, C, case.affine, constant=True)
        # As the forward takes it.
        self.fc1_norm = norms(1, d, case.fc1_affine, constant=not case.fc1_batch_stats)
        self.partials = S * small(case.splits, B, C)
        self.pooled, self.logits = small(B, C), small(B, M, C)
        self.partial_sums = small(case.splits, 4, B, M, C)
        bias = None if self.fc1_bias is None else self.fc1_bias.double()
        exact = F.linear(self.pooled.double(), self.fc1_weight.double(), bias)
        self.hidden = exact.to(case.acc)


def wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def or_else(x: Tensor | None, size: int, value: float) -> Tensor:
    """Returns a parameter in float64, or what its absence means."""
    return torch.full((size,), value, dtype=torch.float64) if x is None else x.double().cpu()


def assert_close(name: str, got: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Asserts that a sum is right up to its cast and 32 roundings of its terms' magnitudes."""
    assert_matches(got, exact, magnitude, 32, name)


@pytest.fixture(params=CASES, ids=str)
def given(request: pytest.FixtureRequest) -> Given:
    return Given(request.param)


def test_hidden(given: Given) -> None:
    pooled, hidden = sk_hidden(given.partials, S, given.fc1_weight, given.fc1_bias)
    partials, weight = given.partials.double(), given.fc1_weight.double()
    exact, magnitude = partials.sum(0) / S, partials.abs().sum(0) / S
    assert_close("pooled", pooled, exact, magnitude)
    bias = or_else(given.fc1_bias, given.case.d, 0.0)
    assert_close(
        "hidden", hidden, F.linear(exact, weight, bias), magnitude @ weight.abs().t() + bias.abs()
    )
    assert pooled.dtype == hidden.dtype == given.case.acc


def test_logits(given: Given) -> None:
    case, hidden = given.case, given.hidden.double()
    logits, stats, kept = sk_logits(
        given.hidden, given.fc1_norm, given.fc2_weight, given.fc2_bias, case.M
    )
    (mean,), (var,), (gamma,), (beta,), _ = given.fc1_norm
    if stats is None or kept is None:
        assert mean is not None
        assert var is not None
        mean, var = mean.double(), var.double()
    else:
        assert mean is None
        mean, var = hidden.mean(0), hidden.var(0, correction=0)
        size = hidden.abs().amax(0)
        assert_close("stats", stats, torch.stack([mean, var]), torch.stack([size, size**2]))
        # With two images the unbiased variance is twice the biased one and so is its error.
        unbiased = torch.stack([mean, hidden.var(0)])
        assert_close("kept", kept, unbiased, torch.stack([size, 2 * size**2]))
    rstd = torch.rsqrt(var + EPS)
    scale = or_else(gamma, case.d, 1.0) * rstd
    y = (hidden - mean) * scale + or_else(beta, case.d, 0.0)
    weight, bias = given.fc2_weight.double(), or_else(given.fc2_bias, case.M * case.C, 0.0)
    size = (hidden.abs() + mean.abs()) * scale.abs() + or_else(beta, case.d, 0.0).abs()
    # A mean's error counts as often as it is scaled by, one of the variance as hhat is.
    size = size + hidden.abs().amax(0) * scale.abs() * (1 + (hidden.abs().amax(0) * rstd) ** 2)
    assert_close(
        "logits",
        logits.flatten(1),
        F.linear(torch.relu(y), weight, bias),
        F.linear(size, weight.abs(), bias.abs()),
    )
    assert logits.shape == (case.B, case.M, case.C)


def test_hidden_bwd(given: Given) -> None:
    case = given.case
    sums, dlogits, dz = sk_hidden_bwd(
        given.partial_sums, given.logits, given.norms, given.fc2_weight
    )
    exact = given.partial_sums.double().sum(0)
    size = given.partial_sums.double().abs().sum(0)
    assert_close("sums", sums, exact, size)
    gamma = torch.stack([or_else(x, case.C, 1.0) for x in given.norms.weight])
    beta = torch.stack([or_else(x, case.C, 0.0) for x in given.norms.bias])
    dattn = gamma * exact[2] + beta * exact[0]
    leaf = given.logits.double().requires_grad_()
    (exact_dlogits,) = torch.autograd.grad(torch.softmax(leaf, 1), leaf, dattn)
    size = (gamma.abs() * size[2] + beta.abs() * size[0]).sum(1, keepdim=True).expand_as(dlogits)
    assert_close("dlogits", dlogits, exact_dlogits, size)
    weight = given.fc2_weight.double()
    assert_close("dz", dz, exact_dlogits.flatten(1) @ weight, size.flatten(1) @ weight.abs())


def test_channels_bwd(given: Given) -> None:
    got = channels_bwd(given)
    exact, sizes = exact_channels_bwd(given), magnitudes(given)
    for name, value in got._asdict().items():
        expected = getattr(exact, name)
        assert (value is None) == (expected is None), name
        if value is not None:
            assert_close(name, value, expected, getattr(sizes, name))
    parameters = (given.fc1_weight, given.fc1_bias, given.fc2_weight, given.fc2_bias)
    gradients = (got.fc1_weight, got.fc1_bias, got.fc2_weight, got.fc2_bias)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter is None or (gradient is not None and parameter.dtype == gradient.dtype)
    if given.case.affine:
        assert got.gamma.dtype == got.beta.dtype == given.case.dtype


@pytest.mark.slow
def test_many_tiles() -> None:
    given = Given(MLPCase(17, 36, 20, 2, splits=3))
    for test in (test_hidden, test_logits, test_hidden_bwd, test_channels_bwd):
        with chosen(TILES):
            test(given)


def test_running_statistics_move_once_in_many_tiles() -> None:
    given = Given(MLPCase(17, 36, 20, 2))
    mean, var = torch.zeros(20, device=DEVICE), torch.ones(20, device=DEVICE)
    tracked = torch.tensor(3, device=DEVICE)
    running = Running((mean,), (var,), (tracked,), 0.25)
    fc2 = (given.fc2_weight, given.fc2_bias)
    with chosen(TILES):
        _, stats, kept = sk_logits(given.hidden, given.fc1_norm, *fc2, 2, running)
    assert stats is not None
    assert kept is None
    hidden = given.hidden.double()
    size = hidden.abs().amax(0)
    assert_close("mean", mean, 0.25 * hidden.mean(0), size)
    assert_close("var", var, 0.75 + 0.25 * hidden.var(0), 1 + size**2)
    assert tracked == 4


def test_an_empty_batch_has_gradients_of_zero() -> None:
    given = Given(EMPTY)
    pooled, hidden = sk_hidden(given.partials, S, given.fc1_weight, given.fc1_bias)
    logits, stats, kept = sk_logits(
        hidden, given.fc1_norm, given.fc2_weight, given.fc2_bias, EMPTY.M
    )
    assert (pooled.shape, hidden.shape, logits.shape) == ((0, 24), (0, 5), (0, 2, 24))
    assert stats is not None
    assert kept is not None
    assert stats.shape == kept.shape == (2, 5)
    assert not stats.any()
    sums, dlogits, dz = sk_hidden_bwd(given.partial_sums, logits, given.norms, given.fc2_weight)
    assert (sums.shape, dlogits.shape, dz.shape) == ((4, 0, 2, 24), (0, 2, 24), (0, 5))
    for name, gradient in channels_bwd(given)._asdict().items():
        assert gradient is not None
        assert not gradient.any(), name


def everything(given: Given) -> list[Tensor]:
    results = [
        *sk_hidden(given.partials, S, given.fc1_weight, given.fc1_bias),
        *sk_logits(given.hidden, given.fc1_norm, given.fc2_weight, given.fc2_bias, given.case.M),
        *sk_hidden_bwd(given.partial_sums, given.logits, given.norms, given.fc2_weight),
        *channels_bwd(given),
    ]
    return [x for x in results if x is not None]


@pytest.mark.parametrize(
    "case", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)], ids=str
)
def test_results_repeat_to_the_bit_with_weights_of_any_strides(case: MLPCase) -> None:
    given = Given(case)
    strided = copy.copy(given)
    strided.fc1_weight = given.fc1_weight.t().contiguous().t()
    strided.fc2_weight = given.fc2_weight.t().contiguous().t()
    assert all(map(torch.equal, everything(given), everything(strided)))


def applied(given: Given) -> Norms:
    """fc1's norm with the statistics that its forward applies, as sk_logits writes them."""
    if not given.case.fc1_batch_stats:
        return given.fc1_norm
    hidden = given.hidden.double()
    mean, var = hidden.mean(0), hidden.var(0, correction=0)
    acc = given.case.acc
    return given.fc1_norm._replace(mean=(mean.to(acc),), var=(var.to(acc),))


def upstream(given: Given) -> tuple[Tensor, Tensor]:
    """Random dlogits [B, M, C], and dz [B, d] that belongs to it."""
    generator = torch.Generator().manual_seed(7)
    dlogits = torch.randn(given.logits.shape, generator=generator).to(given.logits)
    dz = dlogits.double().flatten(1) @ given.fc2_weight.double()
    return dlogits, dz.to(given.case.acc)


def channels_bwd(given: Given) -> ChannelGradients:
    dlogits, dz = upstream(given)
    small = (given.partial_sums[0], dlogits, dz, given.logits, given.pooled, given.hidden)
    norms, fc1 = (given.norms, applied(given)), (given.fc1_weight, given.fc1_bias)
    flags = (given.case.batch_stats, given.case.fc1_batch_stats)
    return sk_channels_bwd(*small, *norms, *fc1, given.fc2_weight, given.fc2_bias, S, *flags)


def exact_channels_bwd(given: Given) -> ChannelGradients:
    """The gradients by PyTorch's autograd through batch norm, ReLU and two linear layers."""
    case = given.case
    pooled, fc1_weight, fc2_weight = (
        x.double().requires_grad_() for x in (given.pooled, given.fc1_weight, given.fc2_weight)
    )
    (mean,), (var,), (gamma,), (beta,), _ = given.fc1_norm
    fc1_bias = or_else(given.fc1_bias, case.d, 0.0).requires_grad_()
    fc2_bias = or_else(given.fc2_bias, case.M * case.C, 0.0).requires_grad_()
    gamma1 = or_else(gamma, case.d, 1.0).requires_grad_()
    beta1 = or_else(beta, case.d, 0.0).requires_grad_()
    hidden = F.linear(pooled, fc1_weight, fc1_bias)
    y = F.batch_norm(
        hidden, wide(mean), wide(var), gamma1, beta1, training=case.fc1_batch_stats, eps=EPS
    )
    logits = F.linear(torch.relu(y), fc2_weight, fc2_bias)
    leaves = (pooled, fc1_weight, fc1_bias, gamma1, beta1, fc2_weight, fc2_bias)
    dlogits, _ = upstream(given)
    ds, *mlp = torch.autograd.grad(logits, leaves, dlogits.double().flatten(1))
    present = (True, case.biases, case.fc1_affine, case.fc1_affine, True, case.biases)
    return with_norms(given, ds / S, given.partial_sums[0].double(), mlp, present)


def with_norms(
    given: Given, share: Tensor, sums: Tensor, mlp: list[Tensor], present: tuple[bool, ...]
) -> ChannelGradients:
    attn = torch.softmax(given.logits.double(), 1)
    dbeta = (attn * sums[0] + share[:, None] * sums[1]).sum(0)
    dgamma = (attn * sums[2] + share[:, None] * sums[3]).sum(0)
    drift = torch.stack([dbeta, dgamma]) / (given.case.B * S)
    rest: list[Any] = [x if there else None for x, there in zip(mlp, present, strict=True)]
    return ChannelGradients(share, drift if given.case.batch_stats else None, dgamma, dbeta, *rest)


def magnitudes(given: Given) -> ChannelGradients:
    case = given.case
    (mean,), (var,), (gamma,), (beta,), _ = applied(given)
    assert mean is not None
    assert var is not None
    dlogits, dz = (x.double().abs() for x in upstream(given))
    dz = dlogits.flatten(1) @ given.fc2_weight.double().abs()
    rstd = torch.rsqrt(var.double() + EPS)
    hhat = (given.hidden.double().abs() + mean.double().abs()) * rstd
    gamma1 = or_else(gamma, case.d, 1.0).abs()
    z = hhat * gamma1 + or_else(beta, case.d, 0.0).abs()
    dhidden = dz + case.fc1_batch_stats * (dz.mean(0) + hhat * (dz * hhat).mean(0))
    dhidden = dhidden * gamma1 * rstd
    mlp = [
        dhidden.t() @ given.pooled.double().abs(),
        dhidden.sum(0),
        (dz * hhat).sum(0),
        dz.sum(0),
        dlogits.flatten(1).t() @ z,
        dlogits.flatten(1).sum(0),
    ]
    share = dhidden @ given.fc1_weight.double().abs() / S
    return with_norms(given, share, given.partial_sums[0].double().abs(), mlp, (True,) * 6)
