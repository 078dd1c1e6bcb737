"""fuse and select with batch norm and ReLU inside, against the composition of modules."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from perf.static.bytes import counted_bytes
from sknet_kernels import launch as launching
from sknet_kernels.config import LaunchConfig
from sknet_kernels.norms import Norms
from sknet_triton import SKConv, functional, fused, use_backend
from sknet_triton.backend import Backend
from sknet_triton.layers import parts
from sknet_triton.reference import passes
from tests import launchers
from tests.helpers import (
    BACKENDS,
    EXACT,
    Case,
    Recorded,
    assert_matches,
    assert_same,
    counted_launches,
    is_plain,
    outcome,
    wide,
)
from tests.plain_sknet import for_norms, without_affine, without_tracking

# --- the passes one by one, Triton against the formulas in float64 ------------------------------

PASS_CASES = (
    Case((2, 24, 7, 7), why="unaligned rows"),
    Case((2, 24, 7, 7), M=3, layout="channels_last", dtype=torch.bfloat16),
    Case((2, 5, 14, 14), M=3, dtype=torch.bfloat16, why="rows aligned to 4"),
    Case((1, 2, 56, 56), dtype=torch.float16, why="several tiles a row"),
    Case((1, 8, 56, 56), layout="channels_last"),
    Case((3, 63, 5), M=1, why="one axis of space"),
    Case((2, 3, 2, 3, 5), M=8, layout="channels_last", why="three axes, as many branches as go"),
    Case((2, 8, 6, 6), layout="sliced"),
    Case((2, 8, 6, 6), layout="cropped"),
    Case((2, 8, 6, 6), layout="unaligned", dtype=torch.bfloat16),
    Case((2, 1, 1, 1), why="sizes that Triton makes constants"),
    Case((2, 3, 4, 4), dtype=torch.float64),
)


def norms_of(case: Case, device: torch.device) -> Norms:
    return launchers.random_norms(case.M, case.shape[1], case.tensor(device))


@pytest.mark.parametrize("case", PASS_CASES, ids=str)
def test_moments(case: Case, device: torch.device) -> None:
    xs = case.branches(device)
    mean, var, unbiased = launchers.moments(xs)
    exact_mean, exact_var = passes.moments(wide(xs))
    scale = torch.stack([x.double().abs().amax() for x in xs])[:, None]
    eps = torch.finfo(mean.dtype).eps
    assert ((mean - exact_mean).abs() <= 64 * eps * scale).all()
    assert ((var - exact_var).abs() <= 64 * eps * scale.square()).all()
    n = xs[0].numel() // xs[0].shape[1]
    torch.testing.assert_close(unbiased, var * (n / (n - 1)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("splits", [1, 5])
def test_moments_of_a_large_mean_keep_their_digits(
    splits: int, layout: str, device: torch.device
) -> None:
    xs = [x + 1e4 for x in Case((4, 6, 5, 7), layout=layout).branches(device)]
    config = LaunchConfig(block_c=4, block_s=8, splits=splits, num_warps=1)
    mean, var, _ = launchers.moments(xs, config=config)
    exact_mean, exact_var = passes.moments(wide(xs))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    # A mean near 1e4 has an ulp of 1e-3, and parts lie up to half a deviation apart. For scale:
    # E[x^2] - E[x]^2 in float32 would be off by 1e8 * 6e-8, more than the variance itself.
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-3, atol=0)


@pytest.mark.parametrize("case", PASS_CASES, ids=str)
def test_sums(case: Case, device: torch.device) -> None:
    xs, dout, norms = case.branches(device), case.tensor(device, 99), norms_of(case, device)
    got, norm = launchers.sums(dout, xs, norms), launchers.norm_rows(norms)
    exact = passes.sums(dout.double(), wide(xs), norm)
    magnitude = passes.sums(dout.double().abs(), wide(xs), norm)
    xhat = passes.sums(torch.ones_like(dout.double()), wide(xs), norm)[1]
    assert got.shape == exact.shape
    # |dout k xhat| <= |dout| * 8: samples of a normal distribution, centred and scaled.
    bound = 256 * torch.finfo(got.dtype).eps * (8 * magnitude[0] + 8 * xhat + 1)
    bad = ~((got - exact).abs() <= bound)
    assert not bad.any(), [int(row.sum()) for row in bad]


def test_sums_split_over_programs(device: torch.device) -> None:
    case = Case((2, 5, 6, 4), M=3, dtype=torch.float64)
    xs, dout, norms = case.branches(device), case.tensor(device, 99), norms_of(case, device)
    config = LaunchConfig(block_c=4, block_s=8, splits=3, num_warps=1)
    got = launchers.sums(dout, xs, norms, config=config)
    exact = passes.sums(dout, xs, launchers.norm_rows(norms))
    torch.testing.assert_close(got, exact, rtol=EXACT, atol=EXACT)
    assert torch.equal(got, launchers.sums(dout, xs, norms, config=config))


@pytest.mark.parametrize("drifts", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", PASS_CASES, ids=str)
def test_gradients(case: Case, drifts: bool, device: torch.device) -> None:
    xs, dout, norms = case.branches(device), case.tensor(device, 99), norms_of(case, device)
    norm, logits = launchers.norm_rows(norms), case.logits(device)
    share = torch.randn(case.shape[:2], device=device).to(cast(Tensor, norms.mean[0]).dtype)
    drift = torch.randn(2, case.M, case.shape[1], device=device).to(share.dtype)
    got = launchers.dx(dout, xs, norms, logits, share, drift if drifts else None)

    inputs = (dout.double(), wide(xs), norm, torch.softmax(logits.double(), 1), share.double())
    exact = passes.gradients(*inputs, drift.double().transpose(0, 1) if drifts else None)
    # |xhat| stays under 16, so this bounds every term.
    spatial = (1,) * (dout.dim() - 2)
    terms = inputs[0].abs() + inputs[4].abs().view(*share.shape, *spatial)
    if drifts:
        terms = terms + 17 * drift.double().abs().amax()
    for i, dx in enumerate(got):
        assert dx.dtype == case.dtype
        magnitude = terms * norm[i, 2].abs().view(1, -1, *spatial)
        assert_matches(dx, exact[i], magnitude, terms=16, name=f"dx{i}")


@pytest.mark.parametrize("drifts", [True, False], ids=["training", "eval"])
def test_an_input_at_exactly_zero_passes_no_gradient(drifts: bool, device: torch.device) -> None:
    case = Case((2, 4, 3, 4), dtype=torch.float64)
    xs, dout, norms = case.branches(device), case.tensor(device, 99), norms_of(case, device)
    norms = norms._replace(bias=(None,) * case.M)
    for x, mean in zip(xs, norms.mean, strict=True):
        x[:, :, 1] = cast(Tensor, mean)[:, None]  # y = (x - mean) * scale + 0 is 0 there
    logits = case.logits(device)
    share = torch.randn(2, 4, dtype=torch.float64, device=device)
    drift = torch.randn(2, 2, 4, dtype=torch.float64, device=device) if drifts else None
    got = launchers.dx(dout, xs, norms, logits, share, drift)
    zeros = norms._replace(bias=tuple(torch.zeros_like(share[0]) for _ in xs))
    rows = None if drift is None else drift.transpose(0, 1)
    attn = torch.softmax(logits, 1)
    exact = passes.gradients(dout, xs, launchers.norm_rows(zeros), attn, share, rows)
    for dx, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(dx, expected, rtol=EXACT, atol=EXACT)
    if not drifts:
        assert all((dx[:, :, 1] == 0).all() for dx in got)


# --- SKConv against its own modules, called one after the other ---------------------------------


def scrambled(sk: SKConv) -> SKConv:
    """Gives every norm weights of both signs, biases and running statistics that matter."""
    for module in sk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.get_buffer("running_mean"))
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2.0)
    return sk


def composed(sk: SKConv) -> SKConv:
    """Returns a copy that a do-nothing hook keeps from using `sk_fuse_select`."""
    twin = copy.deepcopy(sk)
    cast(Any, twin.branches[0]).bn.register_forward_hook(lambda *_: None)
    assert not is_plain(twin)
    return twin


@pytest.fixture(params=["kernels", "formulas", "composed"])
def way_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Returns the backend that takes one of the ways, eager PyTorch the formulas by request."""
    if request.param == "formulas":
        monkeypatch.setattr(fused, "way_of", lambda x: "formulas")
    return "triton" if request.param == "kernels" else "reference"


def test_every_backend_has_its_way(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    sk, x = SKConv(3, 4, G=1, d=5, device=device), torch.randn(2, 3, 4, 4, device=device)
    run, ways = parts.run, []

    def recorded(found: parts.Parts, maps: list[Tensor], way: fused.Way) -> Tensor:
        ways.append(way)
        return run(found, maps, way)

    monkeypatch.setattr(parts, "run", recorded)
    for backend in BACKENDS:
        with use_backend(backend):
            sk(x)
            sk(x[:0])  # by the modules
            composed(sk)(x)
    with use_backend("reference"):
        torch.export.export(sk, (x,), strict=False)
        torch.jit.trace(sk, (x,), check_trace=False)  # type: ignore[no-untyped-call]  # torch's
    assert sorted(ways) == ["composed", "kernels"]


def set_momentum_none(bn: nn.BatchNorm2d) -> None:
    bn.momentum = None


def zero_weight(bn: nn.BatchNorm2d) -> None:
    nn.init.zeros_(bn.weight)


def zero_weight_and_bias(bn: nn.BatchNorm2d) -> None:
    nn.init.zeros_(bn.weight)
    nn.init.zeros_(bn.bias)


def negative_weight(bn: nn.BatchNorm2d) -> None:
    bn.weight.data = -bn.weight.data.abs()


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def freeze_branches(sk: SKConv) -> None:
    for branch in sk.branches:
        cast(Any, branch).bn.eval()


def freeze_fc1(sk: SKConv) -> None:
    cast(Any, sk.fc1).bn.eval()


def other_eps(sk: SKConv) -> None:
    for branch in sk.branches:
        cast(Any, branch).bn.eps = 0.1
    cast(Any, sk.fc1).bn.eps = 0.3


VARIANTS: dict[str, tuple[Callable[[SKConv], Any], bool]] = {
    "training": (lambda sk: sk.train(), True),
    "eval": (lambda sk: sk.eval(), True),
    "momentum None": (for_norms(set_momentum_none), True),
    "one other momentum": (lambda sk: setattr(sk.branches[1].bn, "momentum", 0.3), True),
    "momentum 0": (for_norms(lambda bn: setattr(bn, "momentum", 0.0)), True),
    "frozen weights": (for_norms(lambda bn: bn.requires_grad_(False)), True),
    "hook on a convolution": (lambda sk: hook(sk.get_submodule("branches.0.conv")), True),
    "hook on fc1": (lambda sk: hook(sk.fc1), False),
    "frozen branches": (freeze_branches, True),
    "frozen fc1": (freeze_fc1, True),
    "all frozen": (for_norms(lambda bn: bn.eval()), True),
    "gamma zero": (for_norms(zero_weight), True),
    "gamma and beta zero": (for_norms(zero_weight_and_bias), True),
    "gamma negative": (for_norms(negative_weight), True),
    "no affine": (for_norms(without_affine), True),
    "no tracking": (for_norms(without_tracking), True),
    "no tracking, eval": (lambda sk: (for_norms(without_tracking)(sk), sk.eval()), True),
    "other eps": (other_eps, True),
    "one frozen branch": (lambda sk: cast(Any, sk.branches[0]).bn.eval(), False),
    "one other eps": (lambda sk: setattr(sk.branches[1].bn, "eps", 0.1), False),
    "group norm": (lambda sk: setattr(sk.branches[1], "bn", nn.GroupNorm(2, 4)), False),
    "no norm": (lambda sk: setattr(sk.branches[0], "bn", nn.Identity()), False),
    "other activation": (lambda sk: setattr(sk.branches[0], "act", nn.SiLU()), False),
    "fc1 of 3 x 3": (
        lambda sk: setattr(sk.fc1, "conv", nn.Conv2d(4, 5, 3, padding=1, bias=False)),
        False,
    ),
    "fc1 layer norm": (lambda sk: setattr(sk.fc1, "bn", nn.GroupNorm(1, 5)), False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_skconv_equals_its_modules(name: str, way_backend: Backend, device: torch.device) -> None:
    change, plain = VARIANTS[name]
    sk = scrambled(SKConv(3, 4, M=2, G=1, d=5, dtype=torch.float64, device=device))
    change(sk)
    sk.double()
    assert is_plain(sk) == plain
    twin = composed(sk) if plain else copy.deepcopy(sk)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, device=device)
    dout = torch.randn(3, 4, 4, 4, dtype=torch.float64, device=device)
    # A second step starts from the running statistics of the first.
    for _ in range(2 if name in ("training", "momentum None") else 1):
        with use_backend(way_backend):
            actual = outcome(sk, sk, x, dout)
        with use_backend("reference"):
            expected = outcome(twin, twin, x, dout)
        assert_same(actual, expected)


def another_momentum(sk: SKConv) -> None:
    cast(Any, sk.branches[1]).bn.momentum = 0.4


def one_norm_for_all(sk: SKConv) -> None:
    cast(Any, sk.branches[1]).bn = cast(Any, sk.branches[0]).bn


def strided_statistics(bn: nn.BatchNorm2d) -> None:
    for name in ("running_mean", "running_var"):
        wide = torch.ones(len(bn.weight), 2, device=bn.weight.device)
        setattr(bn, name, wide[:, 0])


# What is done to a module between two steps.
CHANGES: dict[str, Callable[[SKConv], Any]] = {
    "nothing": lambda sk: None,
    "momentum": for_norms(lambda bn: setattr(bn, "momentum", 0.7)),
    "momentum of one norm": another_momentum,
    "momentum None": for_norms(set_momentum_none),
    "a shared norm": one_norm_for_all,
    "new buffers": for_norms(lambda bn: bn.reset_running_stats()),
    "frozen branches": freeze_branches,
    "frozen fc1": freeze_fc1,
    "no tracking": for_norms(without_tracking),
    "statistics of any strides": for_norms(strided_statistics),
}


@pytest.mark.parametrize("name", CHANGES)
def test_running_statistics_move_as_the_modules_move_them(
    name: str, way_backend: Backend, device: torch.device
) -> None:
    sk = scrambled(SKConv(3, 4, M=2, G=1, d=5, device=device)).train()
    twin = composed(sk)
    for step in range(4):
        if step == 2:
            for module in (sk, twin):
                CHANGES[name](module)
        x = torch.randn(3, 3, 4, 4, device=device)
        for module, chosen in ((sk, way_backend), (twin, "reference")):
            with use_backend(chosen):
                module(x)
        for (key, got), exact in zip(sk.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(got, exact, rtol=3e-6, atol=1e-6, msg=f"{key}, step {step}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_skconv_in_low_precision_is_as_close_as_its_modules(
    layout: str,
    dtype: torch.dtype,
    way_backend: Backend,
    device: torch.device,
) -> None:
    exact = scrambled(SKConv(4, 8, M=2, G=2, d=5, dtype=torch.float64, device=device))
    sk = copy.deepcopy(exact).to(dtype)
    twin = composed(sk)
    x, dout = Case((4, 4, 6, 6), 1, layout, dtype).tensor(device, 1), torch.randn(4, 8, 6, 6)
    dout = dout.to(device, dtype)
    oracle = outcome(exact, exact, x.double(), dout.double())
    with use_backend(way_backend):
        actual = outcome(sk, sk, x, dout)
    with use_backend("reference"):
        modules = outcome(twin, twin, x, dout)
    eps = torch.finfo(dtype).eps
    for key, value in oracle.items():
        if key.endswith("num_batches_tracked"):
            continue
        error = (actual[key].double() - value).norm()
        # The convolutions' rounding is in both; ours rounds less often in between.
        limit = 2 * (modules[key].double() - value).norm() + 2 * eps * (value.norm() + 1)
        assert error <= limit, f"{key}: {error} > {limit}"
    contiguous = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert actual["out"].is_contiguous(memory_format=contiguous)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_as_in_the_modules(
    value: float, way_backend: Backend, device: torch.device
) -> None:
    sk = scrambled(SKConv(3, 4, G=1, d=5, device=device)).eval()
    x = torch.randn(2, 3, 7, 7, device=device)
    x[1, 0, 3, 3] = value
    with use_backend("reference"):
        expected = composed(sk)(x)
    with use_backend(way_backend):
        out = sk(x)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert out[0].isfinite().all()
    assert not out[1].isfinite().all()


# --- one forward and one backward ---------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """What `functional.sk_fuse_select` takes beside the branches, random and in float64."""

    device: torch.device
    C: int
    M: int
    training: bool
    d: int = 3

    def leaf(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=self.device).requires_grad_()

    def norm(self, n: int) -> functional.BatchNormArgs:
        mean, var = (None if self.training else self.leaf(n).detach().exp() for _ in range(2))
        weight, bias, eps = self.leaf(n), self.leaf(n), 1e-3
        return functional.BatchNormArgs(weight, bias, mean, var, eps, batch_stats=self.training)

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Returns what stands after the branches, by place and by name."""
        norms, fc1_norm = [self.norm(self.C) for _ in range(self.M)], self.norm(self.d)
        weights = self.leaf(self.d, self.C), self.leaf(self.M * self.C, self.d)
        biases = {"fc1_bias": self.leaf(self.d), "fc2_bias": self.leaf(self.M * self.C)}
        return [norms, weights[0], fc1_norm, weights[1]], biases


def leaves_of(x: Any) -> list[Tensor]:
    """Returns the tensors in ``x`` that ask for a gradient."""
    if isinstance(x, functional.BatchNormArgs):
        return leaves_of([x.weight, x.bias])
    if isinstance(x, dict):
        return leaves_of(list(x.values()))
    if isinstance(x, (list, tuple)):
        return [leaf for y in x for leaf in leaves_of(y)]
    return [x] if x.requires_grad else []


# How `sk_fuse_select` is carried out: the steps in PyTorch, by launchers, as operators.
WAYS: dict[str, tuple[fused.Way, bool]] = {
    "formulas": ("formulas", False),
    "launchers": ("kernels", False),
    "operators": ("kernels", True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("M", [1, 3])
def test_every_gradient_is_that_of_pytorchs_own_operators(
    M: int, training: bool, way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((3, 5, 3, 4), M, "channels_last", torch.float64)
    xs = [x.detach().requires_grad_() for x in case.branches(device)]
    positional, biases = Small(device, 5, M, training).arguments()
    leaves = [*xs, *leaves_of(positional), *leaves_of(biases)]
    dout = case.tensor(device, 99)

    def run() -> list[Tensor]:
        result = functional.sk_fuse_select(xs, *positional, **biases)
        statistics = [x for x in result[1:] if x is not None]
        return [result.out, *statistics, *torch.autograd.grad(result.out, leaves, dout)]

    with use_backend("reference"):
        expected = run()
    monkeypatch.setattr(fused, "way_of", lambda x: WAYS[way][0])
    monkeypatch.setattr(fused, "_watched", lambda tensors: WAYS[way][1])
    for got, exact in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=EXACT, atol=EXACT)


class Subclass(Tensor):
    """A tensor that may have rules of its own."""


def test_launchers_run_on_plain_tensors_and_operators_in_graphs(device: torch.device) -> None:
    xs = [x.double() for x in Case((2, 3, 4, 4)).branches(device)]
    positional, biases = Small(device, 3, 2, training=False).arguments()
    recorded: list[list[str]] = []
    for branches in (xs, [x.as_subclass(Subclass) for x in xs]):
        with use_backend("triton"), torch.no_grad(), Recorded() as mode:
            functional.sk_fuse_select(branches, *positional, **biases)
        recorded.append(sorted(mode.calls))
    assert recorded == [["sk_hidden", "sk_logits", "sk_out"]] * 2
    assert not fused._watched([*xs, None, positional[1]])
    assert fused._watched([xs[0].as_subclass(Subclass)])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_flops_are_those_of_the_modules(training: bool, device: torch.device) -> None:
    sk, x = SKConv(4, 6, G=2, d=5, device=device).train(training), torch.randn(3, 4, 5, 5)
    counted = []
    for backend in BACKENDS:
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            torch.autograd.backward(sk(x.to(device)).sum())
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


# --- what it costs ------------------------------------------------------------------------------

TRAFFIC = [
    Case((2, 8, 56, 56), M, layout, torch.bfloat16)
    for M in (2, 3)
    for layout in ("contiguous", "channels_last")
]
TRAINING_PASSES = {2: 15.3, 3: 21.4}
INFERENCE_PASSES = {2: 5.1, 3: 7.1}
SAVED_TENSORS = {2: 2.02, 3: 3.03}


def fuse_select_of(
    case: Case, device: torch.device, backend: Backend = "triton"
) -> Callable[[bool], Tensor]:
    C, d = case.shape[1], 4
    xs = [x.detach().requires_grad_() for x in case.branches(device)]
    weights = [torch.randn(C, device=device).requires_grad_() for _ in range(2 * case.M)]
    fc1 = torch.randn(d, C, device=device).requires_grad_()
    fc2 = torch.randn(case.M * C, d, device=device).requires_grad_()

    def run(training: bool) -> Tensor:
        def norm(weight: Tensor | None, bias: Tensor | None, size: int) -> Any:
            zero, one = torch.zeros(size, device=device), torch.ones(size, device=device)
            return functional.BatchNormArgs(weight, bias, zero, one, batch_stats=training)

        norms = [norm(weights[2 * i], weights[2 * i + 1], C) for i in range(case.M)]
        with use_backend(backend):
            return functional.sk_fuse_select(xs, norms, fc1, norm(None, None, d), fc2).out

    return run


def one_pass(case: Case) -> int:
    return torch.Size(case.shape).numel() * 2


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("case", [TRAFFIC[0], TRAFFIC[-1]], ids=str)
def test_traffic(case: Case, device: torch.device) -> None:
    run = fuse_select_of(case, device)
    with counted_bytes() as training:
        torch.autograd.backward(run(True), case.tensor(device, 99))
    assert 6 * case.M + 3 <= training.passes(one_pass(case)) <= TRAINING_PASSES[case.M]
    with counted_bytes() as inference, torch.no_grad():
        run(False)
    assert 2 * case.M + 1 <= inference.passes(one_pass(case)) <= INFERENCE_PASSES[case.M]


def recording(names: list[str], call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``call`` such that it leaves its name at every call."""

    def recorded(*args: Any) -> Any:
        names.append(call.__name__)
        return call(*args)

    return recorded


@pytest.mark.parametrize(
    ("M", "layout", "dtype", "operators"),
    [
        (1, "contiguous", torch.float32, []),
        (3, "channels_last", torch.bfloat16, []),
        # Kernels take scalars in float32: these running statistics are moved by operators.
        (2, "contiguous", torch.float64, ["_foreach_add_", "_foreach_mul_", "_foreach_add_"]),
    ],
)
def test_launches(
    M: int,
    layout: str,
    dtype: torch.dtype,
    operators: list[str],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sk = SKConv(4, 4, M=M, G=2, device=device, dtype=dtype)
    x = Case((2, 4, 5, 5), 1, layout, dtype).tensor(device)
    foreach: list[str] = []
    for name in ("_foreach_add_", "_foreach_mul_", "_foreach_lerp_"):
        monkeypatch.setattr(torch, name, recording(foreach, getattr(torch, name)))
    with use_backend("triton"):
        for again in range(2):  # what is remembered launches the same
            foreach.clear()
            with counted_launches() as forward:
                out = sk.train()(x)
            with counted_launches() as backward:
                torch.autograd.backward(out.sum())
            assert (forward.total(), foreach, backward.total()) == (6, operators, 4), again
            with counted_launches() as inference, torch.no_grad():
                sk.eval()(x)
            assert inference.total() == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TRAFFIC, ids=str)
def test_saved_for_the_backward(
    case: Case, backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is kept is no matter of values: no kernel runs.
    monkeypatch.setattr(launching, "_PLANS", {})
    monkeypatch.setattr(launching, "_compiled", lambda first: lambda *pointers: None)
    run = fuse_select_of(case, device, backend)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(True)
    # PyTorch's own operators keep the u_i beside the branches.
    kept = 1 if backend == "triton" else 2
    assert case.M * kept <= sum(saved.values()) / one_pass(case) <= SAVED_TENSORS[case.M] * kept


# --- wrong arguments ----------------------------------------------------------------------------


def bad_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    x = torch.randn(2, 3, 4, 4)
    norm, fc1_norm = functional.BatchNormArgs(None, None), functional.BatchNormArgs(None, None)
    w1, w2 = torch.randn(5, 3), torch.randn(6, 5)
    call = functional.sk_fuse_select
    other = functional.BatchNormArgs(None, None, eps=0.1)
    frozen = functional.BatchNormArgs(None, None, batch_stats=False)
    yield "norms: expected one a branch, 2, got 1", lambda: call([x, x], [norm], w1, fc1_norm, w2)
    yield (
        r"norms\[1\]: expected eps, batch_stats and process_group of norms\[0\]",
        lambda: call([x, x], [norm, other], w1, fc1_norm, w2),
    )
    yield (
        r"fc1_weight: expected shape \[d, C\] with C = 3, got \(5, 4\)",
        lambda: call([x, x], [norm, norm], torch.randn(5, 4), fc1_norm, w2),
    )
    yield (
        r"fc2_weight: expected shape \[M \* C, d\] = \(6, 5\), got \(3, 5\)",
        lambda: call([x, x], [norm, norm], w1, fc1_norm, torch.randn(3, 5)),
    )
    yield (
        "running_mean and running_var are needed where batch_stats is False",
        lambda: call([x, x], [frozen, frozen], w1, fc1_norm, w2),
    )
    yield (
        "fc1's batch statistics need a batch of at least 2, got 1",
        lambda: call([x[:1], x[:1]], [norm, norm], w1, fc1_norm, w2),
    )
    yield (
        r"batch statistics need more than one value a channel, got shape \(1, 3, 1, 1\)",
        lambda: call([x[:1, :, :1, :1]] * 2, [norm, norm], w1, fc1_norm, w2),
    )


@pytest.mark.parametrize(("message", "call"), list(bad_calls()), ids=lambda v: str(v)[:20])
def test_wrong_arguments_are_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
