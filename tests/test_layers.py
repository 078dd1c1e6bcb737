"""SKConv and SKUnit against the paper's equations, written out in `tests.plain_sknet`."""

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from sknet_triton import BranchSpec, SKConv, SKUnit
from tests.helpers import assert_same, message_of, outcome
from tests.plain_sknet import (
    Branches,
    PlainConfig,
    distance,
    leaves,
    plain_sk_conv,
    plain_sk_unit,
    scramble,
)


@dataclass(frozen=True)
class Case:
    """One configuration of SKConv, or of SKUnit, and the same for the equations."""

    options: dict[str, Any]
    branches: Branches = ((3, 1, 4), (3, 2, 4))
    in_channels: int = 8
    out_channels: int = 8  # an SKUnit's width
    stride: int = 1
    size: tuple[int, int] = (7, 6)
    training: bool = True
    unit: bool = False

    def module(self) -> nn.Module:
        layer: Any = SKUnit if self.unit else SKConv
        module = layer(self.in_channels, self.out_channels, stride=self.stride, **self.options)
        return cast(nn.Module, scramble(module).double().train(self.training))

    def equations(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        aggregate = self.options.get("aggregate", "sk")
        config = PlainConfig(self.branches, self.stride, self.training, aggregate)
        return (plain_sk_unit if self.unit else plain_sk_conv)(x, p, config)

    def input(self) -> Tensor:
        # A batch of 4: with 2, fc1's batch norm sees two values and passes almost no gradient.
        return torch.randn(4, self.in_channels, *self.size, dtype=torch.float64)


def listed(*branches: tuple[int, int, int], **options: Any) -> Case:
    """Returns a case whose branches SKConv is given one by one."""
    return Case({"branches": branches}, branches, **options)


def unit(in_channels: int = 16, **options: Any) -> Case:
    """Returns a case of SKUnit, with options of its own."""
    return Case({"G": 4, **options}, in_channels=in_channels, unit=True)


THREE = ((3, 1, 4), (3, 2, 4), (3, 3, 4))
# Widths above the groups, so that a wrong group count would show; in and out differ once; sizes
# that are not square, and odd where the stride is 2.
CASES = {
    "M1": Case({"M": 1, "G": 4}, THREE[:1]),
    "M2": Case({"G": 4}),
    "M3": Case({"M": 3, "G": 4}, THREE),
    "M2-stride2": Case({"G": 4}, stride=2, size=(9, 6)),
    "M3-stride2-widening": Case(
        {"M": 3, "G": 2}, ((3, 1, 2), (3, 2, 2), (3, 3, 2)), 6, 10, stride=2
    ),
    "G1": Case({"G": 1}, ((3, 1, 1), (3, 2, 1))),
    "depthwise": Case({"G": 8}, ((3, 1, 8), (3, 2, 8))),
    "d-from-r": Case({"G": 4, "r": 2, "L": 1}),
    "d-given": Case({"G": 4, "d": 3}),
    "eval": Case({"G": 4}, training=False),
    "fc-norm-layer": Case({"G": 4, "fc_norm": "layer"}),
    "fc-norm-none": Case({"G": 4, "fc_norm": "none"}),
    "sum": Case({"G": 4, "aggregate": "sum"}),
    # table 6 of the paper: the second branch as 3x3 D3, as 5x5 and as 7x7 with more groups
    "table6-3x3-D3": listed((3, 1, 4), (3, 3, 4)),
    "table6-5x5": Case(
        {"branches": [BranchSpec(3, 1, 4), BranchSpec(5, 1, 8)]}, ((3, 1, 4), (5, 1, 8))
    ),
    "table6-7x7": listed((3, 1, 4), (7, 1, 8), stride=2),
    # table 7: K5 and K7 without K3, and the plain sum of three
    "table7-K5-K7": listed((3, 2, 4), (3, 3, 4)),
    "table7-sum-of-3": Case({"M": 3, "G": 4, "aggregate": "sum"}, THREE),
    "1x1-branch": listed((1, 1, 2), (3, 1, 2)),
    "unit-identity": unit(),
    "unit-projection": unit(6),
    "unit-stride2": replace(unit(), stride=2),
    "unit-M3-eval": replace(unit(M=3), branches=THREE, training=False),
    "unit-out_channels": unit(6, out_channels=6),
    "unit-sum": replace(
        unit(branches=[(3, 1, 4), (5, 1, 8)], aggregate="sum"), branches=((3, 1, 4), (5, 1, 8))
    ),
    "unit-d-given-layer-norm": unit(d=5, fc_norm="layer"),
}


def assert_equal_to_equations(case: Case, x: Tensor) -> None:
    module = case.module()
    p, wide = leaves(module), x.clone().requires_grad_()
    expected = case.equations(wide, p)
    dout = torch.randn_like(expected)
    torch.autograd.backward(expected, dout)
    # Statistics are those of other tests; every parameter has its gradient in both.
    exact = {"out": expected.detach(), "dx": cast(Tensor, wide.grad)}
    exact |= {f"grad {name}": cast(Tensor, p[name].grad) for name, _ in module.named_parameters()}
    buffers = {name for name, _ in module.named_buffers()}
    seen = outcome(module, module, x, dout)
    assert_same({name: t for name, t in seen.items() if name not in buffers}, exact)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_layer_equals_the_equations_forward_and_backward(case: Case) -> None:
    assert_equal_to_equations(case, case.input())


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

LAYERS = ("M1", "M2", "M3-stride2-widening", "sum", "unit-identity", "unit-stride2")


@pytest.mark.parametrize("loss", ["weighted", "sum"])
@pytest.mark.parametrize("converted", [True, False], ids=["module-converted", "module-as-built"])
@pytest.mark.parametrize("name", LAYERS)
def test_channels_last_goes_in_and_comes_out_and_changes_no_value(
    name: str, converted: bool, loss: str
) -> None:
    module, x = CASES[name].module(), CASES[name].input()
    twin = copy.deepcopy(module)
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
    module, x = CASES[name].module(), CASES[name].input()
    twin = copy.deepcopy(module)
    permuted = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)  # W outermost
    assert not permuted.is_contiguous()
    assert not permuted.is_contiguous(memory_format=torch.channels_last)
    assert_same(outcome(module, module, permuted), outcome(twin, twin, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["M2", "M3-stride2-widening", "unit-identity"])
def test_training_under_autocast_is_as_close_as_the_equations(
    name: str, dtype: torch.dtype
) -> None:
    case = CASES[name]
    module, x = case.module().float(), case.input().float()
    sides = []
    for wide in (torch.float64, torch.float32):
        p = {
            k: t.detach().to(wide).requires_grad_(t.requires_grad)
            for k, t in leaves(module).items()
        }
        sides.append((x.to(wide, copy=True).requires_grad_(), p))
    (exact_x, exact_p), (plain_x, plain_p) = sides
    exact, our_x = case.equations(exact_x, exact_p), x.clone().requires_grad_()
    dout = torch.randn_like(exact)
    with torch.autocast("cpu", dtype=dtype):
        ours, plain = module(our_x), case.equations(plain_x, plain_p)
    torch.autograd.backward([exact, ours.double(), plain.double()], [dout] * 3)
    named = {"x": our_x, **dict(module.named_parameters())}
    # Both lose much where a rounding turns a ReLU over and in the differences that batch norms
    # take. That error varies with the draw, hence all tensors together and a factor of 4.
    error = plain_error = 0.0
    for key, t in named.items():
        expected = {"x": exact_x, **exact_p}[key].grad
        assert t.grad is not None
        assert t.grad.dtype == torch.float32
        error += distance(t.grad, expected)
        plain_error += distance({"x": plain_x, **plain_p}[key].grad, expected)
    assert error < 4 * plain_error


# State, batch norm and arguments


@pytest.mark.parametrize("layer", [SKConv, SKUnit])
def test_batch_1_in_training_is_refused_with_the_way_out(layer: type[nn.Module]) -> None:
    module = layer(16, 16, G=4)
    x = torch.randn(1, 16, 8, 6)
    with pytest.raises(ValueError, match=r"batch of at least 2.*got 1.*fc_norm='layer'.*eval"):
        module(x)
    assert torch.isfinite(module.eval()(x)).all()


def test_batch_1_in_training_is_accepted_while_fc1_is_frozen_in_eval() -> None:
    module = SKConv(16, 16, G=4)
    module.fc1.eval()
    assert torch.isfinite(module(torch.randn(1, 16, 8, 6))).all()


@pytest.mark.parametrize("name", ["fc-norm-layer", "fc-norm-none", "sum"])
def test_batch_1_trains_without_a_batch_norm_in_fc1(name: str) -> None:
    assert_equal_to_equations(CASES[name], CASES[name].input()[:1])


@pytest.mark.parametrize("layer", [SKConv, SKUnit])
def test_device_and_dtype_reach_every_tensor(layer: type[nn.Module]) -> None:
    for options in ({}, {"fc_norm": "layer"}, {"fc_norm": "none"}):
        module = layer(16, 32, G=4, **options, device="meta", dtype=torch.float64)
        for name, tensor in module.state_dict().items():
            assert tensor.device.type == "meta", name
            assert tensor.dtype == torch.float64 or name.endswith("num_batches_tracked"), name


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    *(
        ({name: 0}, f"{name}: expected a positive number, got 0")
        for name in ("in_channels", "out_channels", "stride", "r", "L", "d")
    ),
    ({"out_channels": -4}, "out_channels: expected a positive number, got -4"),
    ({"M": 0}, "M: expected at least one branch, got 0"),
    ({"G": 0}, "groups: expected a positive number, got 0"),
    (
        {"in_channels": 6, "G": 4},
        "in_channels: expected a multiple of the groups of branch 0, 4, got 6",
    ),
    (
        {"out_channels": 6, "branches": [(3, 1, 2), (3, 1, 4)]},
        "out_channels: expected a multiple of the groups of branch 1, 4, got 6",
    ),
    ({"branches": []}, "branches: expected at least one, got none"),
    ({"branches": [(4, 1, 1)]}, "kernel: expected an odd positive number, got 4"),
    ({"branches": [(-1, 1, 1)]}, "kernel: expected an odd positive number, got -1"),
    ({"branches": [(3, 0, 1)]}, "dilation: expected a positive number, got 0"),
    ({"aggregate": "mean"}, "aggregate: expected 'sk' or 'sum', got 'mean'"),
    *(
        (
            {"fc_norm": "group", "aggregate": aggregate},
            "fc_norm: expected 'batch', 'layer' or 'none', got 'group'",
        )
        for aggregate in ("sk", "sum")
    ),
)


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_bad_arguments_are_named_with_their_rule_and_value(
    options: dict[str, Any], message: str
) -> None:
    right = {"in_channels": 8, "out_channels": 8, "G": 4}
    assert message_of(ValueError, lambda: SKConv(**{**right, **options})) == message
