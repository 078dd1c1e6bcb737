"""fuse and select with batch norm and ReLU inside, against the composition of modules."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from perf.static.bytes import counted_bytes
from sknet_kernels import launch as launching
from sknet_kernels.config import LaunchConfig
from sknet_kernels.norms import Norms
from sknet_triton import SKConv, functional, fused, use_backend
from sknet_triton.backend import Backend
from sknet_triton.functional import BatchNormArgs
from sknet_triton.layers import parts
from sknet_triton.reference import steps
from tests import launchers
from tests.helpers import (
    BACKENDS,
    DEVICE,
    EXACT,
    Case,
    Recorded,
    assert_close,
    assert_matches,
    assert_same,
    beside_branches,
    call_one_by_one,
    counted_launches,
    is_plain,
    message_of,
    one_by_one,
    outcome,
    plain_fuse_select,
    trained,
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
every_case = pytest.mark.parametrize("case", PASS_CASES, ids=str)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def given(case: Case) -> tuple[list[Tensor], Tensor, Norms]:
    norms = launchers.random_norms(case.M, case.shape[1], case.tensor())
    return case.branches(), case.tensor(seed=99), norms


@every_case
def test_moments(case: Case) -> None:
    xs = case.branches()
    mean, var, unbiased = launchers.moments(xs)
    exact_mean, exact_var = steps.moments(wide(xs))[0]
    scale = torch.stack([x.double().abs().amax() for x in xs])[:, None]
    eps = torch.finfo(mean.dtype).eps
    assert ((mean - exact_mean).abs() <= 64 * eps * scale).all()
    assert ((var - exact_var).abs() <= 64 * eps * scale.square()).all()
    n = xs[0].numel() // xs[0].shape[1]
    torch.testing.assert_close(unbiased, var * (n / (n - 1)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("splits", [1, 5])
def test_moments_of_a_large_mean_keep_their_digits(splits: int, layout: str) -> None:
    xs = [x + 1e4 for x in Case((4, 6, 5, 7), layout=layout).branches()]
    config = LaunchConfig(block_c=4, block_s=8, splits=splits, num_warps=1)
    mean, var, _ = launchers.moments(xs, config=config)
    exact_mean, exact_var = steps.moments(wide(xs))[0]
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    # A mean near 1e4 has an ulp of 1e-3, and parts lie up to half a deviation apart. For scale:
    # E[x^2] - E[x]^2 in float32 would be off by 1e8 * 6e-8, more than the variance itself.
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-3, atol=0)


@every_case
def test_sums(case: Case) -> None:
    xs, dout, norms = given(case)
    got = launchers.sums(dout, xs, norms)
    exact, magnitude, ones = (
        steps.sums(d, wide(xs), norms)
        for d in (dout.double(), dout.double().abs(), torch.ones_like(dout.double()))
    )
    assert got.shape == exact.shape
    # |dout k xhat| <= |dout| * 8: samples of a normal distribution, centred and scaled.
    bound = 256 * torch.finfo(got.dtype).eps * (8 * magnitude[0] + 8 * ones[1] + 1)
    bad = ~((got - exact).abs() <= bound)
    assert not bad.any(), [int(row.sum()) for row in bad]


def test_sums_split_over_programs() -> None:
    xs, dout, norms = given(Case((2, 5, 6, 4), M=3, dtype=torch.float64))
    config = LaunchConfig(block_c=4, block_s=8, splits=3, num_warps=1)
    got = launchers.sums(dout, xs, norms, config=config)
    assert_close(got, steps.sums(dout, xs, norms))
    assert torch.equal(got, launchers.sums(dout, xs, norms, config=config))


def random_share(case: Case, norms: Norms) -> tuple[Tensor, Tensor]:
    """Returns the share [B, C] and the drift [2, M, C]."""
    like = cast(Tensor, norms.mean[0])
    return like.new_empty(case.shape[:2]).normal_(), like.new_empty(2, case.M, len(like)).normal_()


@in_both_modes
@every_case
def test_gradients(case: Case, training: bool) -> None:
    (xs, dout, norms), logits = given(case), case.logits()
    share, drift = random_share(case, norms)
    got = launchers.dx(dout, xs, norms, logits, share, drift if training else None)

    shares = share.double(), drift.double() if training else None
    exact = steps.dx(dout.double(), wide(xs), logits.double(), norms, *shares)
    # |xhat| stays under 16, so this bounds every term.
    spatial = (1,) * (dout.dim() - 2)
    terms = dout.double().abs() + share.double().abs().view(*share.shape, *spatial)
    if training:
        terms = terms + 17 * drift.double().abs().amax()
    for i, dx in enumerate(got):
        assert dx.dtype == case.dtype
        scale = cast(Tensor, norms.weight[i]) / (cast(Tensor, norms.var[i]) + norms.eps).sqrt()
        magnitude = terms * scale.double().abs().view(-1, *spatial)
        assert_matches(dx, exact[i], magnitude, terms=16, name=f"dx{i}")


@in_both_modes
def test_an_input_at_exactly_zero_passes_no_gradient(training: bool) -> None:
    case = Case((2, 4, 3, 4), dtype=torch.float64)
    (xs, dout, norms), logits = given(case), case.logits()
    norms = norms._replace(bias=(None,) * case.M)
    for x, mean in zip(xs, norms.mean, strict=True):
        x[:, :, 1] = cast(Tensor, mean)[:, None]  # y = (x - mean) * scale + 0 is 0 there
    share, drift = random_share(case, norms)
    shares = share, drift if training else None
    got = launchers.dx(dout, xs, norms, logits, *shares)
    assert_close(got, steps.dx(dout, xs, logits, norms, *shares))
    if not training:
        assert all((dx[:, :, 1] == 0).all() for dx in got)


# --- SKConv against its own modules, called one after the other ---------------------------------


@pytest.fixture(params=["kernels", "formulas", "composed"])
def way_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Returns the backend that takes one of the ways, eager PyTorch the formulas by request."""
    if request.param == "formulas":
        monkeypatch.setattr(fused, "way_of", lambda x: "formulas")
    return "triton" if request.param == "kernels" else "reference"


def test_every_backend_has_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    sk, x = SKConv(3, 4, G=1, d=5, device=DEVICE), torch.randn(2, 3, 4, 4, device=DEVICE)
    run = mock.Mock(wraps=parts.run)
    monkeypatch.setattr(parts, "run", run)
    for backend in BACKENDS:
        with use_backend(backend):
            sk(x)
            sk(x[:0])  # by the modules
            one_by_one(sk)(x)
    with use_backend("reference"):
        torch.export.export(sk, (x,), strict=False)
        torch.jit.trace(sk, (x,), check_trace=False)  # type: ignore[no-untyped-call]  # torch's
    assert sorted(call.args[2] for call in run.call_args_list) == ["composed", "kernels"]


Change = Callable[[SKConv], Any]


def every_norm(**attributes: Any) -> Change:
    return for_norms(lambda bn: vars(bn).update(attributes))


def part(path: str, change: Callable[[Any], Any]) -> Change:
    return lambda sk: change(sk.get_submodule(path))


def put(path: str, name: str, value: Any) -> Change:
    return lambda sk: setattr(sk.get_submodule(path), name, value)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def strided_statistics(bn: nn.BatchNorm2d) -> None:
    for name in ("running_mean", "running_var"):
        setattr(bn, name, torch.ones(len(bn.weight), 2, device=bn.weight.device)[:, 0])


class Mixed(nn.Module):
    """Adds half of its neighbour to every row of a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 0) / 2


def weight_norm(module: nn.Module) -> None:
    cast(Any, parametrizations).weight_norm(module, "weight")
    with torch.no_grad():  # g starts as the norm of v, which changes nothing yet
        cast(Any, module).parametrizations.weight.original0.mul_(1.5)


def old_weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        cast(Any, nn.utils).weight_norm(module, "weight")
    with torch.no_grad():
        cast(Any, module).weight_g.mul_(1.5)


def pruned(module: nn.Module) -> None:
    cast(Any, prune).l1_unstructured(module, "weight", amount=0.5)


def pruned_for_good(module: nn.Module) -> None:
    pruned(module)
    cast(Any, prune).remove(module, "weight")


def new_parameter(module: Any) -> None:
    module.weight = nn.Parameter(module.weight.detach() / 3)


def mixed(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Mixed())


def without_gradient(*paths: str) -> Change:
    return lambda sk: [sk.get_submodule(path).requires_grad_(False) for path in paths]


def shared(path: str, name: str) -> Change:
    """Gives the second branch a part of the first."""

    def change(sk: SKConv) -> None:
        first, second = (sk.get_submodule(f"branches.{i}{path}") for i in range(2))
        setattr(second, name, getattr(first, name))

    return change


# What is done to an SKConv that is still an `sk_fuse_select`, and to one that then is not.
VARIANTS: dict[str, Change] = {
    "nothing": lambda sk: None,
    "eval": lambda sk: sk.eval(),
    "momentum None": every_norm(momentum=None),
    "one other momentum": put("branches.1.bn", "momentum", 0.3),
    "momentum": every_norm(momentum=0.7),
    "momentum 0": every_norm(momentum=0.0),
    "frozen weights": for_norms(lambda bn: bn.requires_grad_(False)),
    "hook on a convolution": part("branches.0.conv", hook),
    "frozen branches": part("branches", for_norms(lambda bn: bn.eval())),
    "frozen fc1": part("fc1.bn", lambda bn: bn.eval()),
    "all frozen": for_norms(lambda bn: bn.eval()),
    "gamma zero": for_norms(lambda bn: nn.init.zeros_(bn.weight)),
    "gamma and beta zero": for_norms(lambda bn: [x.data.zero_() for x in bn.parameters()]),
    "gamma negative": for_norms(lambda bn: bn.weight.data.abs_().neg_()),
    "no affine": for_norms(without_affine),
    "no tracking": for_norms(without_tracking),
    "no tracking, eval": lambda sk: (for_norms(without_tracking)(sk), sk.eval()),
    "other eps": lambda sk: (every_norm(eps=0.1)(sk), put("fc1.bn", "eps", 0.3)(sk)),
    "a shared norm": shared("", "bn"),
    "a shared weight": shared(".conv", "weight"),
    "new buffers": for_norms(lambda bn: bn.reset_running_stats()),
    "statistics of any strides": for_norms(strided_statistics),
    "all norms without gradient": for_norms(lambda bn: bn.eval().requires_grad_(False)),
    "convolutions without gradient": without_gradient("branches.0.conv", "branches.1.conv"),
    "a branch without gradient": without_gradient("branches.1"),
    "fc1 without gradient": without_gradient("fc1"),
    "fc2 without gradient": without_gradient("fc2"),
    "nothing with a gradient": without_gradient(""),
    "fc2 alone with a gradient": without_gradient("branches", "fc1"),
    "a bias without gradient": part("branches.0.bn", lambda bn: bn.bias.requires_grad_(False)),
    "old weight_norm of a convolution": part("branches.1.conv", old_weight_norm),
    "new parameter of fc2": part("fc2", new_parameter),
    "new parameter of a norm": part("branches.0.bn", new_parameter),
    "fc2 pruned for good": part("fc2", pruned_for_good),
}
OTHERS: dict[str, Change] = {
    "hook on fc1": part("fc1", hook),
    "one frozen branch": part("branches.0.bn", lambda bn: bn.eval()),
    "one other eps": put("branches.1.bn", "eps", 0.1),
    "group norm": put("branches.1", "bn", nn.GroupNorm(2, 4)),
    "no norm": put("branches.0", "bn", nn.Identity()),
    "other activation": put("branches.0", "act", nn.SiLU()),
    "fc1 of 3 x 3": lambda sk: put("fc1", "conv", nn.Conv2d(4, 5, 3, padding=1, bias=False))(sk),
    "fc1 layer norm": put("fc1", "bn", nn.GroupNorm(1, 5)),
    # A norm's weight has one axis, whose weight norm is a sign.
    "parametrization of fc2": part("fc2", mixed),
    "parametrization of fc1": part("fc1.conv", mixed),
    "parametrization of fc1's norm": part("fc1.bn", mixed),
    "parametrization of a norm": part("branches.0.bn", mixed),
    "weight_norm of fc1": part("fc1.conv", weight_norm),
    "weight_norm of fc2": part("fc2", weight_norm),
    "old weight_norm of fc2": part("fc2", old_weight_norm),
    "fc2 pruned": part("fc2", pruned),
    "a norm pruned": part("branches.0.bn", pruned),
}
# Those that are also compiled, which is slow.
COMPILED = (
    *("all norms without gradient", "a branch without gradient", "a shared norm"),
    *("a shared weight", "parametrization of fc2", "parametrization of a norm"),
    "weight_norm of fc1",
)
# Those that are also made between two steps.
BETWEEN_STEPS = (
    *("nothing", "momentum", "one other momentum", "momentum None", "a shared norm"),
    *("new buffers", "frozen branches", "frozen fc1", "no tracking", "statistics of any strides"),
)


def build(dtype: torch.dtype) -> SKConv:
    """Returns a layer whose norms have weights of both signs, biases and statistics that matter."""
    torch.manual_seed(0)
    sk = SKConv(3, 4, M=2, G=1, d=5, dtype=dtype, device=DEVICE)
    for name, tensor in sk.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0) if "var" in name else nn.init.normal_(tensor)
    return sk


def assert_equals_its_modules(name: str, backend: Backend, compiled: bool = False) -> None:
    def changed() -> SKConv:
        sk = build(torch.float64)
        (VARIANTS | OTHERS)[name](sk)
        return sk.double().to(DEVICE)

    sk, twin = changed(), changed()
    assert is_plain(sk) == (name in VARIANTS)
    call_one_by_one(twin)
    run = torch.compile(sk, fullgraph=True, backend="aot_eager") if compiled else sk
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    # A second step starts from the running statistics of the first.
    for _ in range(2 if name in ("nothing", "momentum None") else 1):
        with use_backend(backend):
            actual = outcome(run, sk, x)
        with use_backend("reference"):
            expected = outcome(twin, twin, x)
        # Along the direction of a weight that has a norm of its own the gradient is a sum that
        # cancels.
        assert_same(actual, expected, 10 * EXACT if "weight_norm" in name else EXACT)


@pytest.mark.parametrize("name", [*VARIANTS, *OTHERS])
def test_skconv_equals_its_modules(name: str, way_backend: Backend) -> None:
    assert_equals_its_modules(name, way_backend)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", COMPILED)
def test_skconv_equals_its_modules_under_compile(name: str) -> None:
    assert_equals_its_modules(name, "reference", compiled=True)


@pytest.mark.parametrize("name", BETWEEN_STEPS)
def test_running_statistics_move_as_the_modules_move_them(name: str, way_backend: Backend) -> None:
    sk = build(torch.float32)
    twin = one_by_one(sk)
    for step in range(4):
        if step == 2:
            for module in (sk, twin):
                VARIANTS[name](module)
        x = torch.randn(3, 3, 4, 4, device=DEVICE)
        for module, chosen in ((sk, way_backend), (twin, "reference")):
            with use_backend(chosen):
                module(x)
        for (key, got), exact in zip(sk.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(got, exact, rtol=3e-6, atol=1e-6, msg=f"{key}, step {step}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_skconv_in_low_precision_is_as_close_as_its_modules(
    layout: str, dtype: torch.dtype, way_backend: Backend
) -> None:
    exact = build(torch.float64)
    sk = copy.deepcopy(exact).to(dtype)
    twin = one_by_one(sk)
    x = Case((4, 3, 6, 6), 1, layout, dtype).tensor(seed=1)
    dout = torch.randn(4, 4, 6, 6).to(DEVICE, dtype)
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
def test_what_is_not_finite_is_as_in_the_modules(value: float, way_backend: Backend) -> None:
    sk, x = build(torch.float32).eval(), torch.randn(2, 3, 7, 7, device=DEVICE)
    x[1, 0, 3, 3] = value
    with use_backend("reference"):
        expected = one_by_one(sk)(x)
    with use_backend(way_backend):
        out = sk(x)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert out[0].isfinite().all()
    assert not out[1].isfinite().all()


# --- one forward and one backward ---------------------------------------------------------------

# How `sk_fuse_select` is carried out: PyTorch's operators, the steps in PyTorch, by launchers, as
# operators; the last says whether somebody is watching.
WAYS: dict[str, tuple[fused.Way, bool]] = {
    "composed": ("composed", False),
    "formulas": ("formulas", False),
    "launchers": ("kernels", False),
    "operators": ("kernels", True),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen, watched = WAYS[request.param]
    monkeypatch.setattr(fused, "way_of", lambda x: chosen)
    monkeypatch.setattr(fused, "_watched", lambda tensors: watched)
    return str(request.param)


FUNCTION_CASES: tuple[tuple[Case, dict[str, Any]], ...] = (
    (Case((3, 5, 3, 4), 1, "channels_last"), {}),
    (Case((3, 5, 3, 4), 3, "channels_last"), {}),
    (Case((3, 5, 3, 4), 3), {"batch_stats": False}),
    (Case((3, 4, 5)), {"affine": False, "biases": False}),
    (Case((3, 4, 2, 3, 2)), {"batch_stats": False, "fc1_batch_stats": True}),
    (Case((3, 4, 3, 2)), {"fc1_batch_stats": False, "biases": False}),
)


@pytest.mark.parametrize(("case", "options"), FUNCTION_CASES, ids=str)
def test_the_function_equals_modules_in_a_row_with_every_gradient(
    case: Case, options: dict[str, Any], way: str
) -> None:
    xs = [x.detach().requires_grad_() for x in wide(case.branches())]
    arguments = beside_branches(case.M, case.shape[1], **options)
    leaves = [*xs, *trained(arguments)]
    dout = case.tensor(seed=99).double()
    got = functional.sk_fuse_select(xs, **arguments)
    expected = plain_fuse_select(xs, **arguments)
    assert [x is None for x in got] == [x is None for x in expected]
    assert got.out.stride() == xs[0].stride()
    assert not any(x.requires_grad for x in got[1:] if x is not None)
    tensors, exact = (
        [*filter(torch.is_tensor, each), *torch.autograd.grad(each.out, leaves, dout)]
        for each in (got, expected)
    )
    assert_close(tensors, exact)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@in_both_modes
def test_the_mlp_of_half_precision_is_float32(
    training: bool, parameters: torch.dtype, way: str
) -> None:
    xs = Case((3, 4, 3, 4), 2, dtype=torch.bfloat16).branches()
    xs = [x.requires_grad_() for x in xs]
    arguments = beside_branches(2, 4, batch_stats=training, dtype=parameters)
    leaves = [*xs, *trained(arguments)]
    with torch.autocast(DEVICE.type, torch.bfloat16):  # which changes nothing
        got = functional.sk_fuse_select(xs, **arguments)
    assert {x.dtype for x in got[1:] if x is not None} == ({torch.float32} if training else set())
    assert got.out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(got.out, leaves, torch.ones_like(got.out))
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
    assert torch.equal(got.out, functional.sk_fuse_select(xs, **arguments).out)


def test_the_statistics_of_pytorchs_operators_are_batch_norms_to_the_bit() -> None:
    xs = [torch.randn(3, 4, 3, 4) for _ in range(2)]
    with use_backend("reference"):
        result = functional.sk_fuse_select(xs, **beside_branches(2, 4, dtype=torch.float32))
    for i, x in enumerate(xs):
        bn = nn.BatchNorm2d(4, momentum=1.0)
        bn(x)
        for kept, running in ((result.mean, bn.running_mean), (result.var, bn.running_var)):
            assert torch.equal(cast(Tensor, kept)[i], cast(Tensor, running))


class Subclass(Tensor):
    """A tensor that may have rules of its own."""


def test_launchers_run_on_plain_tensors_and_operators_in_graphs() -> None:
    xs = [x.double() for x in Case((2, 3, 4, 4)).branches()]
    arguments = beside_branches(2, 3, batch_stats=False)
    recorded: list[list[str]] = []
    for branches in (xs, [x.as_subclass(Subclass) for x in xs]):
        with use_backend("triton"), torch.no_grad(), Recorded() as mode:
            functional.sk_fuse_select(branches, **arguments)
        recorded.append(sorted(mode.calls))
    assert recorded == [["sk_hidden", "sk_logits", "sk_out"]] * 2
    assert not fused._watched([*xs, None, arguments["fc1_weight"]])
    assert fused._watched([xs[0].as_subclass(Subclass)])


@in_both_modes
def test_flops_are_those_of_the_modules(training: bool) -> None:
    sk, x = SKConv(4, 6, G=2, d=5, device=DEVICE).train(training), torch.randn(3, 4, 5, 5)
    counted = []
    for backend in BACKENDS:
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            torch.autograd.backward(sk(x.to(DEVICE)).sum())
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


def operands(case: Case, training: bool) -> dict[str, Any]:
    C, dtype = case.shape[1], torch.float32
    arguments = beside_branches(case.M, C, d=4, batch_stats=training, dtype=dtype)
    trained(arguments)
    return arguments | {"branches": [x.detach().requires_grad_() for x in case.branches()]}


def one_pass(case: Case) -> int:
    return torch.Size(case.shape).numel() * 2


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("case", [TRAFFIC[0], TRAFFIC[-1]], ids=str)
def test_traffic(case: Case) -> None:
    training, inference = (operands(case, mode) for mode in (True, False))
    with use_backend("triton"), counted_bytes() as count:
        out = functional.sk_fuse_select(**training).out
        torch.autograd.backward(out, case.tensor(seed=99))
    assert 6 * case.M + 3 <= count.passes(one_pass(case)) <= TRAINING_PASSES[case.M]
    with use_backend("triton"), counted_bytes() as count, torch.no_grad():
        functional.sk_fuse_select(**inference)
    assert 2 * case.M + 1 <= count.passes(one_pass(case)) <= INFERENCE_PASSES[case.M]


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sk = SKConv(4, 4, M=M, G=2, device=DEVICE, dtype=dtype)
    x = Case((2, 4, 5, 5), 1, layout, dtype).tensor()
    foreach = mock.Mock()
    for name in ("_foreach_add_", "_foreach_mul_", "_foreach_lerp_"):
        foreach.attach_mock(mock.Mock(side_effect=getattr(torch, name)), name)
        monkeypatch.setattr(torch, name, getattr(foreach, name))
    with use_backend("triton"):
        for again in range(2):  # what is remembered launches the same
            foreach.reset_mock()
            with counted_launches() as forward:
                out = sk.train()(x)
            with counted_launches() as backward:
                torch.autograd.backward(out.sum())
            assert [call[0] for call in foreach.mock_calls] == operators, again
            assert (forward.total(), backward.total()) == (6, 4), again
            with counted_launches() as inference, torch.no_grad():
                sk.eval()(x)
            assert inference.total() == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TRAFFIC, ids=str)
def test_saved_for_the_backward(
    case: Case, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is kept is no matter of values: no kernel runs.
    monkeypatch.setattr(launching, "_PLANS", {})
    monkeypatch.setattr(launching, "_compiled", lambda first: lambda *pointers: None)
    arguments = operands(case, training=True)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with use_backend(backend), hooks:
        functional.sk_fuse_select(**arguments)
    # PyTorch's own operators keep the u_i beside the branches.
    kept = 1 if backend == "triton" else 2
    assert case.M * kept <= sum(saved.values()) / one_pass(case) <= SAVED_TENSORS[case.M] * kept


# --- wrong arguments ----------------------------------------------------------------------------


NORM, OTHER, FROZEN = (
    BatchNormArgs(None, None),
    BatchNormArgs(None, None, eps=0.1),
    BatchNormArgs(None, None, batch_stats=False),
)
# What is other than in a right call, and the message.
BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"norms": [NORM]}, "norms: expected one a branch, 2, got 1"),
    (
        {"norms": [NORM, OTHER]},
        "norms[1]: expected eps, batch_stats and process_group of norms[0], "
        "(1e-05, True, None), got (0.1, True, None)",
    ),
    (
        {"norms": [FROZEN, FROZEN]},
        "norms: running_mean and running_var are needed where batch_stats is False, got None",
    ),
    ({"fc1_weight": torch.zeros(5, 4)}, "fc1_weight: expected shape [d, C] with C = 3, got (5, 4)"),
    (
        {"fc2_weight": torch.zeros(3, 5)},
        "fc2_weight: expected shape [M * C, d] = (6, 5), got (3, 5)",
    ),
    (
        {"branches": [torch.zeros(1, 3, 4, 4)] * 2},
        "branches: fc1's batch statistics need a batch of at least 2, got 1",
    ),
    (
        {"branches": [torch.zeros(1, 3, 1, 1)] * 2},
        "branches: batch statistics need more than one value a channel, got shape (1, 3, 1, 1)",
    ),
)


@pytest.mark.parametrize(("other", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_arguments_are_named(other: dict[str, Any], message: str) -> None:
    weights = {"fc1_weight": torch.zeros(5, 3), "fc2_weight": torch.zeros(6, 5)}
    right = {"branches": [torch.zeros(2, 3, 4, 4)] * 2, "norms": [NORM] * 2, "fc1_norm": NORM}
    call = partial(functional.sk_fuse_select, **{**right, **weights, **other})
    assert message_of(ValueError, call) == message
