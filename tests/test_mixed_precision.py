"""Low dtypes: autocast, gradient scaling, sums beyond a dtype's range, and what is not a number.

Overflow, infinities and NaN are to come out as the same formula in plain PyTorch gives them.
"""

import copy
import math
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sknet_triton import SKConv, functional, use_backend
from sknet_triton.backend import Backend
from tests.helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    assert_same,
    averaged,
    beside_branches,
    images,
    outcome,
    plain_fuse_select,
    ramp,
    small_conv,
    store_rounding,
    trained,
    weighed,
)
from tests.plain_sknet import distance

LOW = (torch.bfloat16, torch.float16)
low = pytest.mark.parametrize("dtype", LOW, ids=str)
both = pytest.mark.parametrize("backend", BACKENDS)


def quiet_interpreter() -> AbstractContextManager[None]:
    """Numpy, on which the interpreter runs, warns of infinities."""
    return np.errstate(all="ignore")


# --- autocast and gradient scaling --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["reference", "triton", "compile"])
@low
def test_forward_under_autocast_and_backward_outside(dtype: torch.dtype, way: str) -> None:
    module, x = small_conv(dtype=torch.float32).eval(), images().float()
    exact = copy.deepcopy(module).double()
    expected = outcome(exact, exact, x.double())
    run: Any = module
    if way == "compile":
        torch._dynamo.reset()
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
    with use_backend("triton" if way == "triton" else "reference"):
        seen = outcome(run, module, x, forward=torch.autocast(DEVICE.type, dtype=dtype))
    assert seen["out"].dtype == dtype
    assert {t.dtype for name, t in seen.items() if name.startswith(("dx", "grad"))} == {x.dtype}
    # Half-eps roundings: input, weights, convolution, norm, selection, the logits' path and the
    # same again backwards: 16 of them, those of the interpreter's bfloat16 stores doubled.
    assert seen.keys() == expected.keys()
    assert distance(seen["out"], expected["out"]) < 10 * torch.finfo(dtype).eps
    assert distance(seen["dx"], expected["dx"]) < 16 * torch.finfo(dtype).eps


@both
def test_the_backward_computes_in_the_same_dtypes_inside_autocast_and_outside(
    backend: Backend,
) -> None:
    module, x = small_conv(dtype=torch.float32), images().float()
    autocast = torch.autocast(DEVICE.type, dtype=torch.bfloat16)
    twin = copy.deepcopy(module)
    with use_backend(backend):
        outside = outcome(module, module, x, forward=autocast)
        with autocast:
            assert_same(outcome(twin, twin, x), outside, bound=0)


@both
def test_a_step_with_an_infinite_gradient_is_skipped_and_the_scale_halved(backend: Backend) -> None:
    module = small_conv(dtype=torch.float32)
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**16)
    x = images().float()
    x[1, 2, 3, 3] = math.inf
    with use_backend(backend), quiet_interpreter():
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            out = module(x).float()
        torch.autograd.backward(scaler.scale((out * ramp(out)).sum()))
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert all(map(torch.equal, module.parameters(), before))


def values(x: Tensor) -> set[float]:
    return set(x.detach().double().flatten().tolist())


# --- sums beyond fp16 ---------------------------------------------------------------------------

# In fp16 a sum of a thousand would be over at the 66th term; 1024 * 1024 of them make 1e9.
SIDES: dict[Backend, int] = {"reference": 1024, "triton": 24}


def constant(value: float, side: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.full((1, 1, side, side), value, dtype=dtype, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("M", [1, 2, 5])
@both
def test_a_mean_whose_sum_is_beyond_fp16(backend: Backend, M: int) -> None:
    side = SIDES[backend]
    branches = [constant(1000.0, side) for _ in range(M)]
    with use_backend(backend):
        pooled = functional.sk_fuse(branches)
    assert pooled.item() == 1000.0 * M
    dx, *_ = torch.autograd.grad(pooled, branches, torch.full_like(pooled, 64.0))
    # 64 / 2^20 = 2^-14, the least normal number; 64 / 576 is rounded once.
    expected = torch.tensor(64 / side**2, dtype=torch.float64, device=DEVICE).half()
    assert torch.equal(dx, expected.expand_as(dx))


@both
def test_a_sum_beyond_fp16_is_infinite_where_it_is_asked_for(backend: Backend) -> None:
    x = constant(1000.0, 9)
    with use_backend(backend), quiet_interpreter():
        assert functional.sk_fuse([x], reduction="sum").item() == math.inf == x.sum().item()
        assert functional.sk_fuse([x.bfloat16()], reduction="sum").isfinite().all()


@both
def test_select_and_its_gradient_beyond_fp16(backend: Backend) -> None:
    # out is 60000; the gradient of a logit sums 576 products of 60000 before it is weighed.
    xs = [constant(60000.0, 24), constant(59968.0, 24)]
    logits = torch.zeros(1, 2, 1, dtype=torch.float16, device=DEVICE, requires_grad=True)
    with use_backend(backend):
        out = functional.sk_select(xs, logits)
        dx, dlogits = torch.autograd.grad(out, [xs[0], logits], torch.full_like(out, 2.0))
    assert values(out) in ({59968.0}, {60000.0})  # 59984 lies between
    # a_1 a_2 (g_1 - g_2) = 576 * 2 * 32 / 4, of g near 7e7.
    assert dlogits.flatten().tolist() == [9216.0, -9216.0]
    assert values(dx) == {1.0}


@both
def test_the_whole_of_fuse_select_beyond_fp16(backend: Backend) -> None:
    sk = SKConv(1, 1, G=1, d=1, branches=[(1, 1, 1), (1, 1, 1)], device=DEVICE).eval()
    with torch.no_grad():
        for p in sk.parameters():
            p.fill_(1.0)
        sk.fc2.weight.fill_(0.0)
        for bn in (m for m in sk.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.bias.zero_()
            bn.eps = 1e-12  # nothing beside 1 in float32; torch 2.11 refuses 0
    x = constant(1000.0, 24)
    with use_backend(backend):
        out = sk.half()(x)
        (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert values(out) == {1000.0}
    assert values(dx) == {1.0}
    # The pooled sum of two branches: 576 * 2000 would be infinite, 2000 is not.
    assert sk.logits(functional.sk_fuse([x, x])).isfinite().all()


# The interpreter's bfloat16 has no subnormal values.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.bfloat16), ("reference", torch.float16), ("triton", torch.float16)],
)
def test_subnormal_values_are_kept(backend: Backend, dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    x, y = constant(6 * least, 2, dtype), constant(2 * least, 2, dtype)
    assert x.detach().double().max() == 6 * least, "not kept by the conversion itself"
    logits = torch.zeros(1, 2, 1, dtype=dtype, device=DEVICE)
    with use_backend(backend):
        assert functional.sk_fuse([x, y]).double().item() == 8 * least
        out = functional.sk_select([x, y], logits)
        (dx,) = torch.autograd.grad(out, x, torch.full_like(out, 2 * least))
    assert values(out) == {4 * least}
    assert values(dx) == {least}


# --- infinities and NaN -------------------------------------------------------------------------

INF, NAN = math.inf, math.nan
SPECIAL: dict[str, tuple[float, ...]] = {
    "+inf": (INF,),
    "-inf": (-INF,),
    "+inf -inf": (INF, -INF),
    "nan": (NAN,),
    "nan +inf": (NAN, INF),
}


def spoilt_branches(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Returns two branches; image 1 of the first has the special values in channel 2."""
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(3, 3, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    values = torch.tensor(SPECIAL[name], dtype=torch.float64)
    xs[0][1, 2].view(-1)[1 : 1 + len(values)] = values
    return [x.to(DEVICE, dtype).requires_grad_() for x in xs]


def kinds(x: Tensor) -> str:
    """Writes one letter an element: finite, plus and minus infinity, NaN."""
    marks = {INF: "+", -INF: "-"}
    return "".join("n" if v != v else marks.get(v, ".") for v in x.detach().flatten().tolist())


def assert_same_kinds(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert kinds(a) == kinds(e), i
        a, e = (t.detach().double().nan_to_num(0, 0, 0) for t in (a, e))
        # Finite values are rounded: one store, and sums of 18 terms in float32 or wider.
        eps = torch.finfo(actual[i].dtype).eps
        torch.testing.assert_close(a, e, rtol=4 * store_rounding(actual[i]) * eps, atol=8 * eps)


def backward(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [out, *torch.autograd.grad((out * ramp(out)).sum(), inputs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
@both
def test_fuse_of_what_is_not_finite(backend: Backend, name: str, dtype: torch.dtype) -> None:
    xs = spoilt_branches(name, dtype)
    with use_backend(backend), quiet_interpreter():
        actual = backward(functional.sk_fuse(xs), xs)
    wide = [x.detach().double().requires_grad_() for x in xs]
    assert_same_kinds(actual, backward(averaged(wide), wide))


LOGITS: dict[str, tuple[float, float]] = {
    "finite": (0.3, -0.2),
    "one -inf": (-INF, 0.5),  # a weight of exactly 0 for the branch with the special values
    "one +inf": (INF, 0.0),
    "all -inf": (-INF, -INF),
    "nan": (NAN, 0.0),
    "far apart": (-400.0, 400.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["fp64", "fp16"])
@pytest.mark.parametrize("pair", LOGITS)
@pytest.mark.parametrize("name", ["+inf", "-inf", "nan"])
@both
def test_select_of_what_is_not_finite(
    backend: Backend, name: str, pair: str, dtype: torch.dtype
) -> None:
    xs = spoilt_branches(name, dtype)
    logits = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 2, 3)
    logits[1, :, 2] = torch.tensor(LOGITS[pair])
    logits[2, :, 0] = torch.tensor(LOGITS[pair])  # beside branches that are finite
    logits = logits.to(DEVICE, dtype).requires_grad_()
    with use_backend(backend), quiet_interpreter():
        actual = backward(functional.sk_select(xs, logits), [*xs, logits])
    wide = [x.detach().double().requires_grad_() for x in (*xs, logits)]
    assert_same_kinds(actual, backward(weighed(wide[:2], torch.softmax(wide[2], 1)), wide))


def centred(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device=DEVICE) - 0.5


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SPECIAL)
@both
def test_the_whole_of_fuse_select_of_what_is_not_finite(
    backend: Backend, name: str, training: bool
) -> None:
    xs = spoilt_branches(name, torch.float64)
    # Positive weights and small biases: the ReLU stops no channel of an image altogether.
    arguments = beside_branches(2, 3, d=4, batch_stats=training, draw=centred)
    norms = [replace(n, weight=n.weight.abs() + 0.5) for n in arguments["norms"]]
    arguments["norms"] = norms
    leaves = [*xs, *trained(arguments)]
    with use_backend(backend), quiet_interpreter():
        actual = backward(functional.sk_fuse_select(xs, **arguments).out, leaves)
    expected = backward(plain_fuse_select(xs, **arguments).out, leaves)
    # The ReLU stops -inf. PyTorch multiplies its gradient, 0, by the infinity all the same, the
    # kernels leave it out.
    if name == "-inf" and not training and backend == "triton":
        stopped = 1 + [id(x) for x in leaves].index(id(norms[0].weight))
        assert kinds(expected.pop(stopped)) == "..n"
        assert kinds(actual.pop(stopped)) == "..."
    assert_same_kinds(actual, expected)
