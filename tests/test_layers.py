"""SKConv and SKUnit against the paper's equations, written out in `tests.plain_sknet`."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from sknet_triton import BranchSpec, SKConv, SKUnit
from tests.helpers import EXACT, assert_same, outcome
from tests.plain_sknet import (
    Branches,
    PlainConfig,
    distance,
    largest_error,
    leaves,
    plain_conv,
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


def assert_equal_to_equations(module: nn.Module, plain: Plain, x: Tensor, bound: float) -> None:
    p = leaves(module)
    wide = x.detach().double().requires_grad_()
    expected = plain(wide, p)
    dout = torch.randn_like(expected)
    torch.autograd.backward(expected, dout)
    seen = outcome(module, module, x, dout.to(x.dtype))
    assert seen["out"].dtype == seen["dx"].dtype == x.dtype
    # Statistics are those of other tests; every parameter has its gradient in both.
    exact = {"out": expected.detach(), "dx": cast(Tensor, wide.grad)}
    exact |= {f"grad {name}": cast(Tensor, p[name].grad) for name, _ in module.named_parameters()}
    buffers = {name for name, _ in module.named_buffers()}
    assert_same({name: t for name, t in seen.items() if name not in buffers}, exact, bound)


@pytest.mark.parametrize("name", CASES)
def test_sk_conv_equals_the_equations_forward_and_backward(name: str) -> None:
    case = CASES[name]
    assert_equal_to_equations(
        build(case), lambda x, p: plain_sk_conv(x, p, case.plain()), case.input(), EXACT
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


# Structure


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
    twin = copy.deepcopy(module)
    x = torch.randn(4, in_channels_of(module), 8, 6, dtype=torch.float64)
    # The backward of a sum is handed a gradient of stride 0.
    ones = torch.ones((), dtype=x.dtype)
    dout = ones.expand_as(copy.deepcopy(module)(x)) if loss == "sum" else None
    expected = outcome(twin, twin, x, dout)
    assert expected["out"].is_contiguous()
    if converted:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen = outcome(module, module, x.contiguous(memory_format=torch.channels_last), dout)
    for tensor in (seen["out"], seen["dx"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    assert_same(seen, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_any_other_strides_are_right(name: str) -> None:
    module = scramble(LAYERS[name]()).double()
    twin = copy.deepcopy(module)
    x = torch.randn(4, in_channels_of(module), 8, 6, dtype=torch.float64)
    permuted = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)  # W outermost
    assert not permuted.is_contiguous()
    assert not permuted.is_contiguous(memory_format=torch.channels_last)
    assert_same(outcome(module, module, permuted), outcome(twin, twin, x))


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
    assert distance(out, exact) < 8 * torch.finfo(dtype).eps

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
    our_error = distance(our_x.grad, exact_x.grad)
    plain_error = distance(plain_x.grad, exact_x.grad)
    for key, parameter in named.items():
        our_error += distance(parameter.grad, p[key].grad)
        plain_error += distance(q[key].grad, p[key].grad)
    assert our_error < 4 * plain_error


# State, batch norm and arguments


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
