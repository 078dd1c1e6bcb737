"""fuse and select with batch norm and ReLU inside, against the composition of modules."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from perf.static.bytes import counted_bytes
from sknet_kernels.config import LaunchConfig
from sknet_kernels.sk_fuse_select import (
    sk_fuse_select_dx,
    sk_fuse_select_sums,
)
from sknet_kernels.sk_moments import sk_moments
from sknet_triton import SKConv, functional, ops, use_backend
from sknet_triton.backend import Backend, current_backend
from sknet_triton.layers import section
from sknet_triton.reference import stages
from tests.helpers import (
    BACKENDS,
    EXACT,
    Case,
    assert_matches,
    assert_same,
    is_plain,
    outcome,
    wide,
)

# --- the passes one by one, Triton against the formulas in float64 ------------------------------

PASS_CASES = (
    Case((2, 24, 7, 7), why="unaligned rows"),
    Case((2, 24, 7, 7), M=3, layout="channels_last", dtype=torch.bfloat16),
    Case((2, 5, 14, 14), M=3, dtype=torch.bfloat16, why="rows aligned to 4"),
    Case((1, 2, 56, 56), dtype=torch.float16, why="several tiles a row"),
    Case((1, 16, 56, 56), layout="channels_last"),
    Case((3, 63, 5), M=1, why="one axis of space"),
    Case((2, 3, 2, 3, 5), M=8, layout="channels_last", why="three axes, as many branches as go"),
    Case((2, 8, 6, 6), layout="sliced"),
    Case((2, 8, 6, 6), layout="cropped"),
    Case((2, 8, 6, 6), layout="unaligned", dtype=torch.bfloat16),
    Case((2, 1, 1, 1), why="sizes that Triton makes constants"),
    Case((2, 3, 4, 4), dtype=torch.float64),
)


def norm_of(case: Case, device: torch.device) -> Tensor:
    """Random rows mean, rstd, scale, beta [M, 4, C]; gammas of both signs and a zero."""
    C, dtype = case.shape[1], torch.float64 if case.dtype == torch.float64 else torch.float32
    gamma = torch.randn(case.M, C, device=device, dtype=dtype)
    gamma[:, 0] = 0.0
    mean, beta = torch.randn_like(gamma), torch.randn_like(gamma)
    rstd = torch.rand_like(gamma) + 0.5
    return torch.stack([mean, rstd, gamma * rstd, beta], 1)


@pytest.mark.parametrize("case", PASS_CASES, ids=str)
def test_moments(case: Case, device: torch.device) -> None:
    xs = case.branches(device)
    mean, var = sk_moments(xs)
    exact_mean, exact_var = stages.moments(wide(xs))
    scale = torch.stack([x.double().abs().amax() for x in xs])[:, None]
    eps = torch.finfo(mean.dtype).eps
    assert ((mean - exact_mean).abs() <= 64 * eps * scale).all()
    assert ((var - exact_var).abs() <= 64 * eps * scale.square()).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_moments_of_a_large_mean_keep_their_digits(
    splits: int, layout: str, device: torch.device
) -> None:
    xs = [x + 1e4 for x in Case((4, 6, 5, 7), layout=layout).branches(device)]
    config = LaunchConfig(block_c=4, block_s=8, splits=splits, num_warps=1)
    mean, var = sk_moments(xs, config)
    exact_mean, exact_var = stages.moments(wide(xs))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    # A mean near 1e4 has an ulp of 1e-3, and parts lie up to half a deviation apart. For scale:
    # E[x^2] - E[x]^2 in float32 would be off by 1e8 * 6e-8, more than the variance itself.
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-3, atol=0)


@pytest.mark.parametrize("case", PASS_CASES, ids=str)
def test_sums(case: Case, device: torch.device) -> None:
    xs, dout, norm = case.branches(device), case.tensor(device, 99), norm_of(case, device)
    got = sk_fuse_select_sums(dout, xs, norm)
    exact = stages.sums(dout.double(), wide(xs), norm.double())
    magnitude = stages.sums(dout.double().abs(), wide(xs), norm.double())
    xhat = stages.sums(torch.ones_like(dout.double()), wide(xs), norm.double())[1]
    assert got.shape == exact.shape
    # |dout k xhat| <= |dout| * 8: samples of a normal distribution, centred and scaled.
    bound = 256 * torch.finfo(got.dtype).eps * (8 * magnitude[0] + 8 * xhat + 1)
    bad = ~((got - exact).abs() <= bound)
    assert not bad.any(), [int(row.sum()) for row in bad]


@pytest.mark.parametrize("splits", [2, 3])
def test_sums_split_over_programs(splits: int, device: torch.device) -> None:
    case = Case((2, 5, 6, 4), M=3, dtype=torch.float64)
    xs, dout, norm = case.branches(device), case.tensor(device, 99), norm_of(case, device)
    config = LaunchConfig(block_c=4, block_s=8, splits=splits, num_warps=1)
    got = sk_fuse_select_sums(dout, xs, norm, config)
    torch.testing.assert_close(got, stages.sums(dout, xs, norm), rtol=EXACT, atol=EXACT)
    assert torch.equal(got, sk_fuse_select_sums(dout, xs, norm, config))


@pytest.mark.parametrize("drifts", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", PASS_CASES, ids=str)
def test_gradients(case: Case, drifts: bool, device: torch.device) -> None:
    xs, dout, norm = case.branches(device), case.tensor(device, 99), norm_of(case, device)
    attn = torch.softmax(case.logits(device).to(norm.dtype), 1)
    share = torch.randn(case.shape[:2], device=device).to(norm.dtype)
    drift = torch.randn(case.M, 2, case.shape[1], device=device).to(norm.dtype)
    got = sk_fuse_select_dx(dout, xs, norm, attn, share, drift if drifts else None)

    inputs = (dout.double(), wide(xs), norm.double(), attn.double(), share.double())
    exact = stages.gradients(*inputs, drift.double() if drifts else None)
    # |xhat| stays under 16, so this bounds every term.
    spatial = (1,) * (dout.dim() - 2)
    terms = inputs[0].abs() + inputs[4].abs().view(*share.shape, *spatial)
    if drifts:
        terms = terms + 17 * drift.double().abs().amax()
    for i, dx in enumerate(got):
        assert dx.dtype == case.dtype
        magnitude = terms * norm[i, 2].double().abs().view(1, -1, *spatial)
        assert_matches(dx, exact[i], magnitude, terms=16, name=f"dx{i}")


@pytest.mark.parametrize("drifts", [True, False], ids=["training", "eval"])
def test_an_input_at_exactly_zero_passes_no_gradient(drifts: bool, device: torch.device) -> None:
    case = Case((2, 4, 3, 4), dtype=torch.float64)
    xs, dout, norm = case.branches(device), case.tensor(device, 99), norm_of(case, device)
    norm[:, 3] = 0.0
    for x, mean in zip(xs, norm[:, 0], strict=True):
        x[:, :, 1] = mean[:, None]  # y = (x - mean) * scale + 0 is 0 there
    attn = torch.softmax(case.logits(device), 1)
    share = torch.randn(2, 4, dtype=torch.float64, device=device)
    drift = torch.randn(2, 2, 4, dtype=torch.float64, device=device) if drifts else None
    got = sk_fuse_select_dx(dout, xs, norm, attn, share, drift)
    exact = stages.gradients(dout, xs, norm, attn, share, drift)
    for dx, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(dx, expected, rtol=EXACT, atol=EXACT)
    if not drifts:
        assert all((dx[:, :, 1] == 0).all() for dx in got)


# --- SKConv against its own modules, called one after the other ---------------------------------


def scrambled(sk: SKConv) -> SKConv:
    """Gives every norm weights of both signs, biases and running statistics that matter."""
    for module in sk.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
            if module.running_mean is not None and module.running_var is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return sk


def composed(sk: SKConv) -> SKConv:
    """Returns a copy that a do-nothing hook keeps from using `sk_fuse_select`."""
    twin = copy.deepcopy(sk)
    cast(Any, twin.branches[0]).bn.register_forward_hook(lambda *_: None)
    assert not is_plain(twin)
    return twin


@pytest.fixture
def section_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes `sk_fuse_select` where eager PyTorch would rather call the modules."""
    monkeypatch.setattr(section, "pays", lambda module, x: True)


def test_eager_pytorch_calls_the_modules_and_the_others_do_not(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sk, x = SKConv(3, 4, G=1, d=5, device=device), torch.randn(2, 3, 4, 4, device=device)
    run, calls = section.run, []

    def recorded(plain: section.Section, maps: list[Tensor]) -> Tensor:
        calls.append(current_backend())
        return run(plain, maps)

    monkeypatch.setattr(section, "run", recorded)
    for backend in BACKENDS:
        with use_backend(backend):
            sk(x)
    assert calls == ["triton"]


def for_norms(change: Callable[[nn.BatchNorm2d], Any]) -> Callable[[SKConv], None]:
    def apply(sk: SKConv) -> None:
        for module in sk.modules():
            if isinstance(module, nn.BatchNorm2d):
                change(module)

    return apply


def set_momentum_none(bn: nn.BatchNorm2d) -> None:
    bn.momentum = None


def zero_weight(bn: nn.BatchNorm2d) -> None:
    nn.init.zeros_(bn.weight)


def zero_weight_and_bias(bn: nn.BatchNorm2d) -> None:
    nn.init.zeros_(bn.weight)
    nn.init.zeros_(bn.bias)


def negative_weight(bn: nn.BatchNorm2d) -> None:
    bn.weight.data = -bn.weight.data.abs()


def without_affine(bn: nn.BatchNorm2d) -> None:
    bn.affine = False
    bn.register_parameter("weight", None)
    bn.register_parameter("bias", None)


def without_tracking(bn: nn.BatchNorm2d) -> None:
    bn.track_running_stats = False
    bn.register_buffer("running_mean", None)
    bn.register_buffer("running_var", None)
    bn.register_buffer("num_batches_tracked", None)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_skconv_equals_its_modules(
    name: str, backend: Backend, device: torch.device, section_in_eager: None
) -> None:
    change, plain = VARIANTS[name]
    sk = scrambled(SKConv(3, 4, M=2, G=1, d=5, dtype=torch.float64, device=device))
    change(sk)
    sk.double()
    assert is_plain(sk) == plain
    twin = composed(sk) if plain else copy.deepcopy(sk)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, device=device)
    dout = torch.randn(3, 4, 4, 4, dtype=torch.float64, device=device)
    for _ in range(2):  # the second step starts from the first's running statistics
        with use_backend(backend):
            actual = outcome(sk, sk, x, dout)
        with use_backend("reference"):
            expected = outcome(twin, twin, x, dout)
        assert_same(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_skconv_in_low_precision_is_as_close_as_its_modules(
    layout: str,
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device,
    section_in_eager: None,
) -> None:
    exact = scrambled(SKConv(4, 8, M=2, G=2, d=5, dtype=torch.float64, device=device))
    sk = copy.deepcopy(exact).to(dtype)
    twin = composed(sk)
    x, dout = Case((4, 4, 6, 6), 1, layout, dtype).tensor(device, 1), torch.randn(4, 8, 6, 6)
    dout = dout.to(device, dtype)
    oracle = outcome(exact, exact, x.double(), dout.double())
    with use_backend(backend):
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.usefixtures("section_in_eager")
def test_what_is_not_finite_is_as_in_the_modules(
    value: float, backend: Backend, device: torch.device
) -> None:
    sk = scrambled(SKConv(3, 4, G=1, d=5, device=device)).eval()
    x = torch.randn(2, 3, 7, 7, device=device)
    x[1, 0, 3, 3] = value
    with use_backend("reference"):
        expected = composed(sk)(x)
    with use_backend(backend):
        out = sk(x)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert out[0].isfinite().all()
    assert not out[1].isfinite().all()


def recorder(seen: list[torch.Size]) -> Callable[..., None]:
    return lambda module, inputs, output: seen.append(output.shape)


def test_hooks_on_what_lies_between_see_their_tensors(device: torch.device) -> None:
    for path in ("branches.1", "branches.1.bn", "branches.0.act", "fc1", "fc1.bn", "fc2"):
        sk = SKConv(3, 4, G=1, d=5, device=device)
        seen: list[torch.Size] = []
        sk.get_submodule(path).register_forward_hook(recorder(seen))
        assert not is_plain(sk), path
        sk(torch.randn(2, 3, 4, 4, device=device))
        assert len(seen) == 1, path
    sk = SKConv(3, 4, G=1, d=5, device=device)
    at_conv: list[torch.Size] = []
    sk.get_submodule("branches.0.conv").register_forward_hook(recorder(at_conv))
    assert is_plain(sk)
    sk(torch.randn(2, 3, 4, 4, device=device))
    assert len(at_conv) == 1


def test_weight_norm_and_parametrization_are_respected(device: torch.device) -> None:
    sk = scrambled(SKConv(3, 4, G=1, d=5, device=device)).eval()
    x = torch.randn(2, 3, 4, 4, device=device)
    before = sk(x)

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(cast(Any, sk.fc2), "weight", Doubled())
    assert not torch.allclose(sk(x), before)


# --- the operator ------------------------------------------------------------------------------


def arguments(
    case: Case, device: torch.device, training: bool, bias: bool = True
) -> tuple[list[Tensor], list[Tensor | None], tuple[float, float, bool, bool, str]]:
    C, M, d = case.shape[1], case.M, 3
    dtype = torch.float64

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    def variance(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=dtype, device=device) + 0.5

    xs = [x.detach().requires_grad_() for x in case.branches(device)]
    statistics = [leaf(M, C).detach(), variance(M, C), leaf(d).detach(), variance(d)]
    parameters: list[Tensor | None] = [
        leaf(M, C),
        leaf(M, C),
        *statistics[:2],
        leaf(d, C),
        leaf(d) if bias else None,
        leaf(d),
        leaf(d),
        *statistics[2:],
        leaf(M * C, d),
        leaf(M * C) if bias else None,
    ]
    return xs, parameters, (1e-5, 1e-3, training, training, "")


def run_op(
    xs: list[Tensor], parameters: list[Tensor | None], settings: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    return cast(tuple[Tensor, ...], ops.sk_fuse_select(xs, *parameters, *settings))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, training: bool, device: torch.device) -> None:
    case = Case((2, 3, 3, 4), 2, layout, torch.float64)
    xs, parameters, settings = arguments(case, device, training, bias=layout == "contiguous")
    torch.library.opcheck(ops.sk_fuse_select, (xs, *parameters, *settings))
    out, *small = (t.detach() for t in run_op(xs, parameters, settings))
    detached = [None if p is None else p.detach() for p in parameters]
    torch.library.opcheck(
        ops.sk_fuse_select_bwd,
        (torch.randn_like(out), [x.detach() for x in xs], detached, small, *settings),
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradients_pass_gradcheck_through_the_reference(training: bool) -> None:
    case = Case((3, 2, 2, 2), 2, dtype=torch.float64)
    xs, parameters, settings = arguments(case, torch.device("cpu"), training)
    norms = [
        functional.BatchNormArgs(gamma, beta, mean, var, eps=settings[0], batch_stats=training)
        for gamma, beta, mean, var in zip(*(cast(Tensor, p) for p in parameters[:4]), strict=True)
    ]

    def out(*leaves: Tensor) -> Tensor:
        with use_backend("reference"):
            return functional.sk_fuse_select(
                leaves[:2],
                norms,
                leaves[2],
                functional.BatchNormArgs(
                    leaves[3], leaves[4], rm1, rv1, eps=settings[1], batch_stats=training
                ),
                leaves[5],
                fc1_bias=leaves[6],
                fc2_bias=leaves[7],
            ).out

    w1, b1, g1, be1, rm1, rv1, w2, b2 = (cast(Tensor, p) for p in parameters[4:])
    assert torch.autograd.gradcheck(out, (*xs, w1, g1, be1, w2, b1, b2))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("M", [1, 3])
def test_triton_equals_the_reference_with_every_gradient(
    M: int, training: bool, device: torch.device
) -> None:
    case = Case((3, 5, 3, 4), M, "channels_last", torch.float64)
    xs, parameters, settings = arguments(case, device, training)
    leaves = [*xs, *(p for p in parameters if p is not None and p.requires_grad)]
    dout = case.tensor(device, 99)
    results = []
    for implementation in (stages.REFERENCE, None):
        if implementation is None:
            out = run_op(xs, parameters, settings)[0]
        else:
            from sknet_triton.reference import SKFuseSelect

            out = cast(Any, SKFuseSelect).apply(*settings, *parameters, *xs)[0]
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=EXACT, atol=EXACT)


# --- what it costs ------------------------------------------------------------------------------

TRAFFIC = [
    Case((4, 16, 56, 56), M, layout, torch.bfloat16)
    for M in (2, 3)
    for layout in ("contiguous", "channels_last")
]
TRAINING_PASSES = {2: 15.3, 3: 21.4}
INFERENCE_PASSES = {2: 5.1, 3: 7.1}
SAVED_TENSORS = {2: 2.02, 3: 3.03}


def section_of(case: Case, device: torch.device) -> Callable[[bool], Tensor]:
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
        with use_backend("triton"):
            return functional.sk_fuse_select(xs, norms, fc1, norm(None, None, d), fc2).out

    return run


def one_pass(case: Case) -> int:
    return torch.Size(case.shape).numel() * 2


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("case", TRAFFIC, ids=str)
def test_traffic(case: Case, device: torch.device) -> None:
    run = section_of(case, device)
    with counted_bytes() as training:
        torch.autograd.backward(run(True), case.tensor(device, 99))
    assert 6 * case.M + 3 <= training.passes(one_pass(case)) <= TRAINING_PASSES[case.M]
    with counted_bytes() as inference, torch.no_grad():
        run(False)
    assert 2 * case.M + 1 <= inference.passes(one_pass(case)) <= INFERENCE_PASSES[case.M]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TRAFFIC, ids=str)
def test_saved_for_the_backward(case: Case, backend: Backend, device: torch.device) -> None:
    run = section_of(case, device)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(True)
    assert case.M <= sum(saved.values()) / one_pass(case) <= SAVED_TENSORS[case.M]


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
        r"norms\[1\]: expected eps, batch_stats and group of norms\[0\]",
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
