"""SKConv and SKUnit against the paper's equations, written out in `tests.plain_sknet`."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sknet_triton import BranchSpec, SKConv, SKUnit
from tests.helpers import EXACT
from tests.plain_sknet import (
    Branches,
    PlainConfig,
    largest_error,
    leaves,
    plain_conv,
    plain_maps,
    plain_sk_conv,
    plain_sk_unit,
    scramble,
)

# Relative to the largest value of a tensor, in float64. Rounding of the longest sums here (some
# 10^3 terms, through a handful of operators) stays below 10^4 eps = 2e-12; the smallest of the
# deliberate faults this file was tried against moves a result by more than 1e-3.


@dataclass(frozen=True)
class Case:
    """One configuration of SKConv, and the same for the equations."""

    branches: Branches = ((3, 1, 4), (3, 2, 4))
    in_channels: int = 8
    out_channels: int = 8
    stride: int = 1
    size: tuple[int, int] = (7, 6)
    aggregate: str = "sk"
    training: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> PlainConfig:
        return PlainConfig(self.branches, self.stride, self.training, self.aggregate)

    def input(self) -> Tensor:
        # A batch of 4: with 2, fc1's batch norm sees two values and passes almost no gradient.
        return torch.randn(4, self.in_channels, *self.size, dtype=torch.float64)


# Widths above the groups, so that a wrong group count would show; in and out differ once; sizes
# that are not square, and odd where the stride is 2.
CASES = {
    "M1": Case(((3, 1, 4),), options={"M": 1, "G": 4}),
    "M2": Case(options={"G": 4}),
    "M3": Case(((3, 1, 4), (3, 2, 4), (3, 3, 4)), options={"M": 3, "G": 4}),
    "M2-stride2": Case(stride=2, size=(9, 6), options={"G": 4}),
    "M3-stride2-widening": Case(
        ((3, 1, 2), (3, 2, 2), (3, 3, 2)), 6, 10, stride=2, options={"M": 3, "G": 2}
    ),
    "G1": Case(((3, 1, 1), (3, 2, 1)), options={"G": 1}),
    "depthwise": Case(((3, 1, 8), (3, 2, 8)), options={"G": 8}),
    "d-from-r": Case(options={"G": 4, "r": 2, "L": 1}),
    "d-given": Case(options={"G": 4, "d": 3}),
    "eval": Case(training=False, options={"G": 4}),
    "fc-norm-layer": Case(options={"G": 4, "fc_norm": "layer"}),
    "fc-norm-none": Case(options={"G": 4, "fc_norm": "none"}),
    "sum": Case(aggregate="sum", options={"G": 4, "aggregate": "sum"}),
    # table 6 of the paper: the second branch as 3x3 D3, as 5x5 and as 7x7 with more groups
    "table6-3x3-D3": Case(((3, 1, 4), (3, 3, 4)), options={"branches": [(3, 1, 4), (3, 3, 4)]}),
    "table6-5x5": Case(
        ((3, 1, 4), (5, 1, 8)), options={"branches": [BranchSpec(3, 1, 4), BranchSpec(5, 1, 8)]}
    ),
    "table6-7x7": Case(
        ((3, 1, 4), (7, 1, 8)), stride=2, options={"branches": [(3, 1, 4), (7, 1, 8)]}
    ),
    # table 7: K5 and K7 without K3, and the plain sum of three
    "table7-K5-K7": Case(((3, 2, 4), (3, 3, 4)), options={"branches": ((3, 2, 4), (3, 3, 4))}),
    "table7-sum-of-3": Case(
        ((3, 1, 4), (3, 2, 4), (3, 3, 4)),
        aggregate="sum",
        options={"M": 3, "G": 4, "aggregate": "sum"},
    ),
    "1x1-branch": Case(((1, 1, 2), (3, 1, 2)), options={"branches": [(1, 1, 2), (3, 1, 2)]}),
}

Plain = Callable[[Tensor, dict[str, Tensor]], Tensor]


def build(case: Case) -> SKConv:
    module = SKConv(case.in_channels, case.out_channels, case.stride, **case.options)
    scramble(module).double().train(case.training)
    return module


def results(
    module: nn.Module, x: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns the output, dx and every parameter's gradient for the loss sum(out * weight)."""
    x = x.detach().requires_grad_()
    out = module(x)
    torch.autograd.backward(out.sum() if weight is None else (out * weight).sum())
    assert x.grad is not None
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return out.detach(), x.grad, grads


def assert_equal_to_equations(module: nn.Module, plain: Plain, x: Tensor, bound: float) -> None:
    p = leaves(module)
    wide = x.detach().double().requires_grad_()
    expected = plain(wide, p)
    weight = torch.randn_like(expected)
    torch.autograd.backward((expected * weight).sum())
    out, dx, grads = results(module, x, weight.to(x.dtype))
    assert out.shape == expected.shape
    assert out.dtype == dx.dtype == x.dtype
    assert largest_error(out, expected.detach()) < bound
    assert wide.grad is not None
    assert largest_error(dx, wide.grad) < bound, "dx"
    named = {name for name, _ in module.named_parameters()}
    assert set(grads) == named, "a parameter got no gradient"
    for name in named:
        reference = p[name].grad
        assert reference is not None, f"the equations do not use {name}"
        assert largest_error(grads[name], reference) < bound, name


@pytest.mark.parametrize("name", CASES)
def test_sk_conv_equals_the_equations_forward_and_backward(name: str) -> None:
    case = CASES[name]
    assert_equal_to_equations(
        build(case), lambda x, p: plain_sk_conv(x, p, case.plain()), case.input(), EXACT
    )


@pytest.mark.parametrize("name", ["M1", "M3", "M2-stride2", "eval", "table6-5x5"])
def test_a_hook_inside_changes_no_number_and_sees_what_it_hooks(name: str) -> None:
    # With a hook on a norm the stages run apart, as they do where a module was replaced.
    case = CASES[name]
    module, x = build(case), case.input()
    seen: list[Tensor] = []
    norm = module.branches[0].get_submodule("bn")
    norm.register_forward_hook(lambda _module, _args, out: seen.append(out.clone()))
    assert_equal_to_equations(module, lambda x, p: plain_sk_conv(x, p, case.plain()), x, EXACT)
    (out,) = seen
    first = plain_maps(x, leaves(module), case.plain())[0]
    assert largest_error(out.detach().clamp(min=0), first.detach()) < EXACT


def norms_of(module: SKConv) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def set_momentum(value: float | None) -> Callable[[SKConv], None]:
    def change(module: SKConv) -> None:
        for norm in norms_of(module):
            norm.momentum = value  # None means a cumulative average

    return change


def freeze(prefix: str) -> Callable[[SKConv], None]:
    def change(module: SKConv) -> None:
        module.get_submodule(prefix).eval()

    return change


def without_statistics(module: SKConv) -> None:
    for name in ("branches.0", "branches.1", "fc1"):
        block = module.get_submodule(name)
        old = block.get_submodule("bn")
        assert isinstance(old, nn.BatchNorm2d)
        new = nn.BatchNorm2d(old.num_features, track_running_stats=False).double()
        block.add_module("bn", new)


def without_weights(module: SKConv) -> None:
    norm = nn.BatchNorm2d(module.out_channels, affine=False).double()
    module.branches[1].add_module("bn", norm)


def frozen_weights(module: SKConv) -> None:
    for norm in norms_of(module):
        norm.requires_grad_(False)


# What people do to batch norms, and what keeps the stages apart or together inside SKConv.
CHANGES: dict[str, Callable[[SKConv], None]] = {
    "as-built": lambda module: None,
    "momentum-0.3": set_momentum(0.3),
    "momentum-0": set_momentum(0.0),
    "cumulative": set_momentum(None),
    "branches-frozen": freeze("branches"),
    "one-branch-frozen": freeze("branches.1"),
    "fc1-frozen": freeze("fc1"),
    "eval": freeze(""),
    "no-running-statistics": without_statistics,
    "a-norm-without-weights": without_weights,
    "weights-frozen": frozen_weights,
}


@pytest.mark.parametrize("name", CHANGES)
def test_norms_keep_the_statistics_and_gradients_that_torch_keeps(name: str) -> None:
    ours = build(CASES["M2-stride2"])
    CHANGES[name](ours)
    # A hook on every norm keeps the stages apart, and nn.BatchNorm2d itself does its work.
    theirs = copy.deepcopy(ours)
    for norm in norms_of(theirs):
        norm.register_forward_hook(lambda _module, _args, _out: None)
    for _ in range(2):  # the second step sees the statistics of the first
        x = CASES["M2-stride2"].input()
        weight = torch.randn(4, 8, 5, 3, dtype=torch.float64)
        out, dx, grads = results(ours, x, weight)
        expected_out, expected_dx, expected_grads = results(theirs, x, weight)
        assert largest_error(out, expected_out) < EXACT
        assert largest_error(dx, expected_dx) < EXACT
        assert grads.keys() == expected_grads.keys()
        for key, grad in grads.items():
            assert largest_error(grad, expected_grads[key]) < EXACT, key
    expected_state = theirs.state_dict()
    assert ours.state_dict().keys() == expected_state.keys()
    for key, value in ours.state_dict().items():
        assert largest_error(value, expected_state[key].double()) < EXACT, key


def test_running_statistics_move_by_the_formula() -> None:
    module = build(CASES["M2"])
    x = CASES["M2"].input()
    before = {key: t.clone() for key, t in module.state_dict().items()}
    module(x)
    conv, norm = (module.branches[1].get_submodule(name) for name in ("conv", "bn"))
    u = conv(x).detach().transpose(0, 1).flatten(1)
    # Momentum 0.1; the variance is divided by n - 1, unlike the one that normalises.
    mean = 0.9 * before["branches.1.bn.running_mean"] + 0.1 * u.mean(1)
    var = 0.9 * before["branches.1.bn.running_var"] + 0.1 * u.var(1, correction=1)
    assert largest_error(norm.get_buffer("running_mean"), mean) < EXACT
    assert largest_error(norm.get_buffer("running_var"), var) < EXACT
    assert norm.get_buffer("num_batches_tracked") == 1


@pytest.mark.parametrize("name", ["M1", "M2", "M3", "M2-stride2", "table6-7x7"])
def test_sk_conv_in_float32_is_as_near_to_the_equations_as_they_are_themselves(name: str) -> None:
    case = CASES[name]
    module = build(case).float()
    x = case.input().float()
    p = leaves(module)
    with torch.no_grad():
        exact = plain_sk_conv(x.double(), p, case.plain())
        single = plain_sk_conv(x, {key: t.float() for key, t in p.items()}, case.plain())
    # The yardstick is the same mathematics in float32, in another order of summation; a factor
    # of 4 for luck, and 4 eps for outputs where the yardstick happens to be exact.
    bound = 4 * largest_error(single, exact) + 4 * torch.finfo(torch.float32).eps
    assert largest_error(module(x).detach(), exact) < bound
    # Gradients pass through three more operators backwards, each of the same kind: 10^3 eps.
    assert_equal_to_equations(
        module, lambda x, p: plain_sk_conv(x, p, case.plain()), x, max(bound, 1.2e-4)
    )


UNITS: dict[str, tuple[tuple[int, int], dict[str, Any], PlainConfig]] = {
    "identity": ((16, 8), {"G": 4}, PlainConfig(((3, 1, 4), (3, 2, 4)))),
    "projection": ((6, 8), {"G": 4}, PlainConfig(((3, 1, 4), (3, 2, 4)))),
    "stride2": ((16, 8), {"G": 4, "stride": 2}, PlainConfig(((3, 1, 4), (3, 2, 4)), 2)),
    "M3-eval": (
        (16, 8),
        {"G": 4, "M": 3},
        PlainConfig(((3, 1, 4), (3, 2, 4), (3, 3, 4)), training=False),
    ),
    "out_channels": ((6, 8), {"G": 4, "out_channels": 6}, PlainConfig(((3, 1, 4), (3, 2, 4)))),
    "sum": (
        (16, 8),
        {"branches": [(3, 1, 4), (5, 1, 8)], "aggregate": "sum"},
        PlainConfig(((3, 1, 4), (5, 1, 8)), aggregate="sum"),
    ),
    "d-given-layer-norm": (
        (16, 8),
        {"G": 4, "d": 5, "fc_norm": "layer"},
        PlainConfig(((3, 1, 4), (3, 2, 4))),
    ),
}


@pytest.mark.parametrize("name", UNITS)
def test_sk_unit_equals_the_equations_forward_and_backward(name: str) -> None:
    (in_channels, width), options, config = UNITS[name]
    unit = SKUnit(in_channels, width, **options)
    scramble(unit).double().train(config.training)
    x = torch.randn(4, in_channels, 7, 6, dtype=torch.float64)
    assert_equal_to_equations(unit, lambda x, p: plain_sk_unit(x, p, config), x, EXACT)


def test_sk_unit_carries_the_stride_in_the_selective_kernel_convolution() -> None:
    unit = SKUnit(16, 8, stride=2, G=4)
    strides = {name: m.stride for name, m in unit.named_modules() if isinstance(m, nn.Conv2d)}
    assert strides == {
        "reduce.conv": (1, 1),
        "sk.branches.0.conv": (2, 2),
        "sk.branches.1.conv": (2, 2),
        "sk.fc1.conv": (1, 1),
        "sk.fc2": (1, 1),
        "increase.conv": (1, 1),
        "shortcut.conv": (2, 2),
    }


def test_sk_unit_keeps_the_identity_only_where_shapes_agree() -> None:
    assert isinstance(SKUnit(16, 8, G=4).shortcut, nn.Identity)
    assert isinstance(SKUnit(16, 8, stride=2, G=4).shortcut, nn.Sequential)
    assert isinstance(SKUnit(8, 8, G=4).shortcut, nn.Sequential)


# Structure


def test_branch_i_is_a_grouped_3x3_with_dilation_and_padding_1_plus_i() -> None:
    module = SKConv(64, 96, 2, M=4)
    for i, branch in enumerate(module.branches):
        assert [name for name, _ in branch.named_children()] == ["conv", "bn", "act"]
        conv, bn, act = branch.children()
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, nn.BatchNorm2d)
        assert isinstance(act, nn.ReLU)
        assert conv.kernel_size == (3, 3)
        assert conv.dilation == conv.padding == (1 + i, 1 + i)
        assert conv.stride == (2, 2)
        assert conv.groups == 32
        assert conv.bias is None
        assert (conv.in_channels, conv.out_channels) == (64, 96)
        assert bn.num_features == 96


@pytest.mark.parametrize(
    ("in_channels", "options", "d"),
    [
        (64, {}, 32),
        (128, {}, 32),
        (512, {}, 32),
        (544, {}, 34),
        (1024, {}, 64),
        (128, {"r": 2}, 64),
        (128, {"L": 48}, 48),
        (128, {"r": 32, "L": 1}, 4),
        (128, {"d": 7}, 7),
    ],
    ids=str,
)
def test_fc1_has_width_d(in_channels: int, options: dict[str, Any], d: int) -> None:
    # On the input's channels, not the output's: 64 outputs would give 32 in every row but two.
    module = SKConv(in_channels, 64, **options, device="meta")
    assert module.fc1.get_parameter("conv.weight").shape == (d, 64, 1, 1)
    assert module.fc1.get_parameter("bn.weight").shape == (d,)
    assert module.fc2.weight.shape == (2 * 64, d, 1, 1)
    assert module.fc2.bias is None


def test_the_names_in_the_state_dict_are_those_of_released_checkpoints() -> None:
    def norm(name: str) -> list[str]:
        values = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
        return [f"{name}.{value}" for value in values]

    assert list(SKConv(32, 32).state_dict()) == [
        "branches.0.conv.weight",
        *norm("branches.0.bn"),
        "branches.1.conv.weight",
        *norm("branches.1.bn"),
        "fc1.conv.weight",
        *norm("fc1.bn"),
        "fc2.weight",
    ]


def test_positional_arguments_keep_their_order() -> None:
    parameters = list(inspect.signature(SKConv).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["in_channels", "out_channels", "stride", "M", "r", "L", "G"]
    assert [p.default for p in parameters[2:7]] == [1, 2, 16, 32, 32]
    module = SKConv(64, 32, 2, 3, 4, 8, 16, device="meta")
    conv = module.branches[2].get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    assert (conv.stride, conv.groups, module.M) == ((2, 2), 16, 3)
    assert module.fc2.in_channels == 16


def test_sum_has_no_fc_layers() -> None:
    names = [name for name, _ in SKConv(32, 32, aggregate="sum").named_children()]
    assert names == ["branches"]


# The selection, on values that name the branch


def select_only(module: SKConv, branch: int) -> None:
    """Makes fc2 answer +50 for one branch and -50 for the others, whatever the image."""
    with torch.no_grad():
        # The norm of fc1 gives 1 at every channel.
        module.fc1.get_parameter("bn.weight").zero_()
        module.fc1.get_parameter("bn.bias").fill_(1.0)
        rows = torch.full((module.M, module.out_channels), -50.0)
        rows[branch] = 50.0
        width = module.fc2.in_channels
        module.fc2.weight.copy_(
            (rows.flatten() / width)[:, None, None, None].expand(-1, width, 1, 1)
        )


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_the_first_logits_belong_to_the_first_branch(branch: int) -> None:
    module = SKConv(8, 8, M=3, G=4).double()
    select_only(module, branch)
    x = torch.randn(4, 8, 7, 6, dtype=torch.float64)
    config = PlainConfig(((3, 1, 4), (3, 2, 4), (3, 3, 4)))
    maps = plain_maps(x, leaves(module), config).detach()
    # exp(-100) of the other branches is 4e-44: nothing in float64 beside 1.
    assert largest_error(module(x).detach(), maps[branch]) < EXACT


def test_equal_logits_give_the_mean_of_the_branches() -> None:
    module = SKConv(8, 8, M=3, G=4).double()
    nn.init.zeros_(module.fc2.weight)
    x = torch.randn(4, 8, 7, 6, dtype=torch.float64)
    config = PlainConfig(((3, 1, 4), (3, 2, 4), (3, 3, 4)))
    maps = plain_maps(x, leaves(module), config).detach()
    assert largest_error(module(x).detach(), maps.mean(0)) < EXACT


def test_a_doubled_image_area_leaves_the_logits_alone() -> None:
    # The pooled vector is a mean, not a sum: an image tiled twice has the same logits. Without
    # padding effects, because the branches are 1x1.
    module = SKConv(8, 8, branches=[(1, 1, 4), (1, 1, 4)])
    scramble(module).double().eval()
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    once = module(x).detach()
    twice = module(torch.cat([x, x], dim=2)).detach()
    assert largest_error(twice[:, :, :5], once) < EXACT
    assert largest_error(twice[:, :, 5:], once) < EXACT


# Memory formats

Maker = Callable[[], nn.Module]
LAYERS: dict[str, Maker] = {
    "SKConv-M1": lambda: SKConv(16, 16, M=1, G=4),
    "SKConv-M2": lambda: SKConv(16, 16, G=4),
    "SKConv-M3-stride2": lambda: SKConv(16, 16, 2, 3, G=4),
    "SKConv-sum": lambda: SKConv(16, 16, G=4, aggregate="sum"),
    "SKUnit-identity": lambda: SKUnit(32, 16, G=4),
    "SKUnit-stride2": lambda: SKUnit(32, 16, stride=2, G=4),
}


def in_channels_of(module: nn.Module) -> int:
    channels: int = next(module.parameters()).shape[1]
    return 32 if isinstance(module, SKUnit) else channels * 4


@pytest.mark.parametrize("loss", ["weighted", "sum"])
@pytest.mark.parametrize("converted", [True, False], ids=["module-converted", "module-as-built"])
@pytest.mark.parametrize("name", LAYERS)
def test_channels_last_goes_in_and_comes_out_and_changes_no_value(
    name: str, converted: bool, loss: str
) -> None:
    module = scramble(LAYERS[name]()).double()
    x = torch.randn(4, in_channels_of(module), 8, 6, dtype=torch.float64)
    # "sum" hands the backward a gradient of stride 0.
    weight = torch.randn_like(module(x)) if loss == "weighted" else None
    expected = results(module, x, weight)
    assert expected[0].is_contiguous()
    module.zero_grad()
    if converted:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = x.contiguous(memory_format=torch.channels_last)
    out, dx, grads = results(module, last, weight)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()
    assert not dx.is_contiguous()
    assert largest_error(out, expected[0]) < EXACT
    assert largest_error(dx, expected[1]) < EXACT
    for key, grad in grads.items():
        assert largest_error(grad, expected[2][key]) < EXACT, key


@pytest.mark.parametrize("name", LAYERS)
def test_any_other_strides_are_right(name: str) -> None:
    module = scramble(LAYERS[name]()).double()
    x = torch.randn(4, in_channels_of(module), 8, 6, dtype=torch.float64)
    expected, expected_dx, _ = results(module, x)
    permuted = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)  # W outermost
    assert not permuted.is_contiguous()
    assert not permuted.is_contiguous(memory_format=torch.channels_last)
    out, dx, _ = results(module, permuted)
    assert largest_error(out, expected) < EXACT
    assert largest_error(dx, expected_dx) < EXACT


# Autocast


AUTOCAST: dict[str, tuple[Callable[[Tensor, dict[str, Tensor], PlainConfig], Tensor], PlainConfig]]
AUTOCAST = {
    "SKConv-M2": (plain_sk_conv, PlainConfig(((3, 1, 4), (3, 2, 4)))),
    "SKConv-M3-stride2": (plain_sk_conv, PlainConfig(((3, 1, 4), (3, 2, 4), (3, 3, 4)), 2)),
    "SKUnit-identity": (plain_sk_unit, PlainConfig(((3, 1, 4), (3, 2, 4)))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_computes_in_the_low_dtype_and_stays_close(name: str, dtype: torch.dtype) -> None:
    equations, config = AUTOCAST[name]
    module = scramble(LAYERS[name]())
    x = torch.randn(4, in_channels_of(module), 8, 6)
    # Roundings between the input and the output: input, weights, convolution, norm and selection
    # for SKConv, two more convolutions and norms for SKUnit, and the logits' path, which the
    # softmax damps: 16 half-eps, as if all agreed in sign. In eval, because in training fc1's batch
    # norm divides by the spread of 4 numbers and so enlarges a rounding at will.
    module.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        out = module(x)
    # The unit adds its float32 input to what came out of the convolutions.
    assert out.dtype == (torch.float32 if name == "SKUnit-identity" else dtype)
    exact = equations(x.double(), leaves(module), replace(config, training=False)).detach()
    assert relative_norm(out, exact) < 8 * torch.finfo(dtype).eps

    # In training the yardstick is the equations under the same autocast: both lose much where
    # a rounding turns a ReLU over and in the differences that batch norms take. That error varies
    # with the draw, hence all tensors together and a factor of 4.
    module.train()
    p = leaves(module)
    exact_x = x.double().requires_grad_()
    exact = equations(exact_x, p, config)
    weight = torch.randn_like(exact)
    torch.autograd.backward((exact * weight).sum())
    our_x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    q = {key: t.detach().float().requires_grad_(t.requires_grad) for key, t in p.items()}
    with torch.autocast("cpu", dtype=dtype):
        ours, plain = module(our_x), equations(plain_x, q, config)
    torch.autograd.backward(((ours.float() + plain.float()) * weight.float()).sum())
    named = dict(module.named_parameters())
    for t in (our_x, *named.values()):
        assert t.grad is not None
        assert t.grad.dtype == torch.float32
    our_error = relative_norm(our_x.grad, exact_x.grad)
    plain_error = relative_norm(plain_x.grad, exact_x.grad)
    for key, parameter in named.items():
        our_error += relative_norm(parameter.grad, p[key].grad)
        plain_error += relative_norm(q[key].grad, p[key].grad)
    assert our_error < 4 * plain_error


def relative_norm(actual: Tensor | None, expected: Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    error = torch.linalg.vector_norm(actual.double() - expected)
    return float(error / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_module_in_a_low_dtype_stays_in_it(dtype: torch.dtype) -> None:
    module = scramble(SKConv(16, 16, G=4)).to(dtype).eval()
    x = torch.randn(4, 16, 8, 6, dtype=dtype)
    config = PlainConfig(((3, 1, 4), (3, 2, 4)), training=False)
    expected = plain_sk_conv(x.double(), leaves(module), config).detach()
    out = module(x).detach()
    assert out.dtype == dtype
    # Roundings of convolution, norm, selection and the logits' path: 8 half-eps.
    assert relative_norm(out, expected) < 4 * torch.finfo(dtype).eps


# State, batch norm and arguments


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_round_trip_is_strict_and_bitwise(name: str) -> None:
    source, target = scramble(LAYERS[name]()).eval(), LAYERS[name]().eval()
    target.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, in_channels_of(source), 8, 6)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("layer", ["SKConv", "SKUnit"])
def test_batch_1_in_training_is_refused_with_the_way_out(layer: str) -> None:
    module = SKConv(16, 16, G=4) if layer == "SKConv" else SKUnit(16, 16, G=4)
    x = torch.randn(1, 16, 8, 6)
    with pytest.raises(ValueError, match=r"batch of at least 2.*got 1.*fc_norm='layer'.*eval"):
        module(x)
    assert torch.isfinite(module.eval()(x)).all()


def test_batch_1_in_training_is_accepted_while_fc1_is_frozen_in_eval() -> None:
    module = SKConv(16, 16, G=4)
    module.fc1.eval()
    assert torch.isfinite(module(torch.randn(1, 16, 8, 6))).all()


@pytest.mark.parametrize(
    "options",
    [{"fc_norm": "layer"}, {"fc_norm": "none"}, {"aggregate": "sum"}],
    ids=["layer", "none", "sum"],
)
def test_batch_1_trains_without_a_batch_norm_in_fc1(options: dict[str, Any]) -> None:
    module = scramble(SKConv(16, 16, G=4, **options)).double()
    config = PlainConfig(((3, 1, 4), (3, 2, 4)), aggregate=options.get("aggregate", "sk"))
    x = torch.randn(1, 16, 8, 6, dtype=torch.float64)
    assert_equal_to_equations(module, lambda x, p: plain_sk_conv(x, p, config), x, EXACT)


def test_synchronised_batch_norm_reaches_every_norm() -> None:
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    converted = convert(SKUnit(16, 16, G=4))  # type: ignore[no-untyped-call]
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # reduce, two branches, fc1, increase, projection
    assert len(norms) == 6
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)


@pytest.mark.parametrize("layer", [SKConv, SKUnit])
def test_device_and_dtype_reach_every_tensor(layer: type[nn.Module]) -> None:
    for options in ({}, {"fc_norm": "layer"}, {"fc_norm": "none"}):
        module = layer(16, 32, G=4, **options, device="meta", dtype=torch.float64)
        for name, tensor in module.state_dict().items():
            assert tensor.device.type == "meta", name
            assert tensor.dtype == torch.float64 or name.endswith("num_batches_tracked"), name


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "in_channels": ({"in_channels": 0}, "in_channels: expected a positive number, got 0"),
    "out_channels": ({"out_channels": -4}, "out_channels: expected a positive number, got -4"),
    "stride": ({"stride": 0}, "stride: expected a positive number, got 0"),
    "M": ({"M": 0}, "M: expected at least one branch, got 0"),
    "r": ({"r": 0}, "r: expected a positive number, got 0"),
    "L": ({"L": 0}, "L: expected a positive number, got 0"),
    "d": ({"d": 0}, "d: expected a positive number, got 0"),
    "G": ({"G": 0}, "groups: expected a positive number, got 0"),
    "in_channels-groups": (
        {"in_channels": 6, "G": 4},
        "in_channels: expected a multiple of the groups of branch 0, 4, got 6",
    ),
    "out_channels-groups": (
        {"out_channels": 6, "branches": [(3, 1, 2), (3, 1, 4)]},
        "out_channels: expected a multiple of the groups of branch 1, 4, got 6",
    ),
    "branches-empty": ({"branches": []}, "branches: expected at least one, got none"),
    "kernel-even": (
        {"branches": [(4, 1, 1)]},
        "kernel: expected an odd positive number, got 4",
    ),
    "kernel-negative": (
        {"branches": [(-1, 1, 1)]},
        "kernel: expected an odd positive number, got -1",
    ),
    "dilation": ({"branches": [(3, 0, 1)]}, "dilation: expected a positive number, got 0"),
    "aggregate": ({"aggregate": "mean"}, "aggregate: expected 'sk' or 'sum', got 'mean'"),
    "fc_norm": (
        {"fc_norm": "group"},
        "fc_norm: expected 'batch', 'layer' or 'none', got 'group'",
    ),
    "fc_norm-with-sum": (
        {"fc_norm": "group", "aggregate": "sum"},
        "fc_norm: expected 'batch', 'layer' or 'none', got 'group'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_with_their_rule_and_value(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        SKConv(**{"in_channels": 8, "out_channels": 8, "G": 4, **options})
    assert str(caught.value) == message


def test_the_oracle_itself_agrees_with_dilated_and_grouped_convolution() -> None:
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    weight = torch.randn(12, 2, 3, 3, dtype=torch.float64)
    dilated = nn.functional.conv2d(x, weight, stride=2, padding=3, dilation=3, groups=4)
    assert largest_error(plain_conv(x, weight, 2, 3, 4), dilated) < EXACT
