"""SKNet: counts of the paper, the network against its equations, and the backbone's interface."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sknet_triton import SKNet, SKNetFeatures, StageSpec, sknet26, sknet50, sknet101
from sknet_triton.models import SKNET26, SKNET50
from tests.helpers import EXACT_NETWORK, assert_same, message_of, outcome
from tests.plain_sknet import largest_error, leaves, plain_sknet, scramble

# Two stages, the second with a stride and a second unit whose shortcut is the identity: every
# kind of unit of the published networks, small enough to be computed by hand-written equations.
SMALL = (StageSpec(32, 1, 1), StageSpec(64, 2, 2))


def small(**kwargs: Any) -> SKNet:
    return SKNet(SMALL, **{"num_classes": 5, **kwargs})


@pytest.mark.parametrize(
    ("build", "options", "expected"),
    [
        (sknet26, {}, "16.746408"),
        (sknet50, {}, "27.479784"),
        (sknet101, {}, "48.736040"),
        (sknet101, {"variant": "caffe"}, "48.686760"),
        # table 6: the second branch as 3x3 D3 G32, 3x3 D1 G32, 5x5 D1 G64, 7x7 D1 G128
        (sknet50, {"branches": [(3, 1, 32), (3, 3, 32)]}, "27.48"),
        (sknet50, {"branches": [(3, 1, 32), (3, 1, 32)]}, "27.48"),
        (sknet50, {"branches": [(3, 1, 32), (5, 1, 64)]}, "28.03"),
        (sknet50, {"branches": [(3, 1, 32), (7, 1, 128)]}, "27.99"),
        # table 7: one branch summed is a ResNeXt-50; two summed; three selected
        (sknet50, {"M": 1, "aggregate": "sum"}, "25.03"),
        (sknet50, {"M": 2, "aggregate": "sum"}, "26.46"),
        (sknet50, {"M": 3}, "29.25"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_parameter_counts(
    build: Callable[..., SKNet], options: dict[str, Any], expected: str
) -> None:
    parameters = build(device="meta", **options).parameters()
    digits = len(expected.partition(".")[2])
    assert f"{sum(p.numel() for p in parameters) / 1e6:.{digits}f}" == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "expected"),
    [(sknet50, "4.4627"), (partial(sknet101, "caffe"), "8.4487")],
    ids=["sknet50", "sknet101-caffe"],
)
def test_multiply_accumulates_at_224(build: Callable[..., SKNet], expected: str) -> None:
    model = build(device="meta").eval()
    for B in (1, 4):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(B, 3, 224, 224, device="meta"))
        # The counter counts a multiplication and an addition as two.
        assert f"{counter.get_total_flops() / 2e9 / B:.4f}" == expected


@pytest.mark.parametrize("variant", ["paper", "caffe"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40)], ids=["32x32", "33x47", "64x40"])
def test_the_network_equals_the_equations_forward_and_backward(
    size: tuple[int, int], training: bool, variant: str
) -> None:
    model = scramble(small(variant=variant)).double().train(training)
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    p, wide = leaves(model), x.clone().requires_grad_()
    *maps, logits = plain_sknet(wide, p, (1, 2), training, 1 if variant == "paper" else 0)
    dout = torch.randn_like(logits)
    torch.autograd.backward(logits, dout)
    expected = {"out": logits.detach(), "dx": cast(Tensor, wide.grad)}
    expected |= {f"grad {name}": cast(Tensor, p[name].grad) for name, _ in model.named_parameters()}
    seen = outcome(model, model, x, dout)
    assert_same({name: seen[name] for name in expected}, expected, EXACT_NETWORK)
    # A second forward pass in training sees the same batch, so the same statistics.
    with torch.no_grad():
        for ours_map, theirs_map in zip(model.forward_intermediates(x), maps, strict=True):
            assert largest_error(ours_map, theirs_map.detach()) < EXACT_NETWORK
        assert torch.equal(model.forward_features(x), model.forward_intermediates(x)[-1])


# Interface


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_channels_last_goes_through_every_module(training: bool) -> None:
    model: nn.Module = sknet26(num_classes=10).train(training)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen: dict[nn.Module, bool] = {}

    def look(module: nn.Module, _args: Any, out: Any) -> None:
        # fc1 and fc2 see one position, the head no map.
        if out.dim() == 4 and out.shape[2] * out.shape[3] > 1:
            seen[module] = out.is_contiguous(memory_format=torch.channels_last)

    for module in model.modules():
        module.register_forward_hook(look)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = model(x)
    assert len(seen) > 8 * 18
    assert all(seen.values())
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_num_classes_0_returns_the_pooled_features() -> None:
    model = scramble(small(num_classes=0)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        pooled = model(x)
        assert largest_error(pooled, model.forward_features(x).mean((2, 3))) < EXACT_NETWORK
    assert pooled.shape == (2, model.num_features) == (2, 128)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert not any(name.startswith("head") for name in model.state_dict())


def test_reset_classifier_replaces_only_the_head() -> None:
    model = small().double()
    body = {name: t.clone() for name, t in model.state_dict().items() if "head" not in name}
    for classes in (9, 0, 3):
        model.reset_classifier(classes)
        assert model.num_classes == classes
        out = model.eval()(torch.randn(2, 3, 32, 32, dtype=torch.float64))
        assert out.shape == (2, classes or model.num_features)
    head = model.get_classifier()
    assert isinstance(head, nn.Linear)
    assert head.weight.dtype == torch.float64
    assert head.bias.abs().max() == 0
    after = {name: t for name, t in model.state_dict().items() if "head" not in name}
    assert body.keys() == after.keys()
    assert all(torch.equal(body[name], after[name]) for name in body)


@pytest.mark.parametrize(
    ("out_indices", "wanted"),
    [(None, [0, 1, 2]), ((1, 2), [1, 2]), ((-1,), [2]), ((2, 0), [2, 0])],
    ids=str,
)
def test_features_only_returns_the_maps_asked_for(
    out_indices: tuple[int, ...] | None, wanted: list[int]
) -> None:
    whole = scramble(small()).double().eval()
    backbone = SKNetFeatures(SMALL, out_indices).double().eval()
    weights = {name: t for name, t in whole.state_dict().items() if "head" not in name}
    backbone.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 47, 33, dtype=torch.float64)
    hooked: dict[str, Tensor] = {}
    for info in backbone.feature_info:
        backbone.get_submodule(info["module"]).register_forward_hook(
            lambda _module, _args, out, name=info["module"]: hooked.update({name: out})
        )
    with torch.no_grad():
        maps, everything = backbone(x), whole.forward_intermediates(x)
    assert [i["num_chs"] for i in backbone.feature_info] == [m.shape[1] for m in maps]
    assert len(maps) == len(wanted)
    for info, feature, index in zip(backbone.feature_info, maps, wanted, strict=True):
        assert torch.equal(feature, everything[index])
        assert info == whole.feature_info[index]
        assert feature.shape[2:] == tuple(math.ceil(n / info["reduction"]) for n in (47, 33))
        # The module that the info names is the one whose output the map is.
        assert hooked[info["module"]] is feature


def test_the_entry_points_build_a_backbone_with_features_only() -> None:
    backbone = sknet26(features_only=True, out_indices=(2, 3, 4), device="meta")
    assert isinstance(backbone, SKNetFeatures)
    shapes = [m.shape for m in backbone(torch.empty(2, 3, 64, 96, device="meta"))]
    assert shapes == [(2, 512, 8, 12), (2, 1024, 4, 6), (2, 2048, 2, 3)]


@pytest.mark.parametrize("build", [sknet26, sknet50, sknet101])
def test_help_of_the_entry_points_names_every_argument(build: Callable[..., SKNet]) -> None:
    parameters = inspect.signature(build).parameters
    assert {p.kind for p in parameters.values()} <= {
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    }
    for name in parameters:
        assert f"        {name}: " in (build.__doc__ or "")


def test_the_entry_points_hand_every_argument_on() -> None:
    given: dict[str, Any] = {"in_chans": 4, "device": "meta", "dtype": torch.float64}
    model = sknet50(num_classes=7, variant="caffe", M=3, r=4, L=8, G=16, fc_norm="layer", **given)
    same = SKNet(
        SKNET50,
        num_classes=7,
        variant="caffe",
        unit_options={"M": 3, "r": 4, "L": 8, "G": 16, "fc_norm": "layer"},
        **given,
    )
    assert str(model) == str(same)
    branches = [(5, 1, 32), (3, 2, 64)]
    model = sknet26(branches=branches, aggregate="sum", device="meta")
    options = {"branches": branches, "aggregate": "sum"}
    assert str(model) == str(SKNet(SKNET26, unit_options=options, device="meta"))


def test_checkpointing_keeps_less() -> None:
    model = small()
    sizes = {True: 0, False: 0}
    for enable in sizes:
        model.set_grad_checkpointing(enable)

        def pack(t: Tensor, enable: bool = enable) -> Tensor:
            sizes[enable] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(4, 3, 32, 32))
    # What the units save is most of it, and checkpointing saves only what goes in.
    assert sizes[True] < sizes[False] / 2
    assert not model.grad_checkpointing


BAD: tuple[tuple[type[Exception], Callable[[], object], str], ...] = (
    (ValueError, lambda: SKNet([]), "stages: expected at least one StageSpec, got none"),
    (ValueError, lambda: small(num_classes=-1), "num_classes: expected at least 0, got -1"),
    (ValueError, lambda: small().reset_classifier(-1), "num_classes: expected at least 0, got -1"),
    (ValueError, lambda: small(in_chans=0), "in_chans: expected at least 1, got 0"),
    *(
        (
            ValueError,
            partial(cast(Any, build), variant="pytorch"),
            "variant: expected 'paper' or 'caffe', got 'pytorch'",
        )
        for build in (small, sknet101)
    ),
    (
        TypeError,
        lambda: small(unit_options={"M": 2, "d": 16}),
        "unit_options: expected M, r, L, G, branches, aggregate, fc_norm, got 'd'",
    ),
    (ValueError, lambda: sknet50(M=0), "M: expected at least one branch, got 0"),
    (
        ValueError,
        lambda: sknet26(out_indices=(1,)),
        "out_indices: expected features_only=True beside it, got (1,)",
    ),
    *(
        (
            ValueError,
            partial(sknet26, features_only=True, out_indices=(index,), device="meta"),
            f"out_indices: expected indices of 5 feature maps, got {index}",
        )
        for index in (5, -6)
    ),
)


@pytest.mark.parametrize(
    ("error", "build", "message"), BAD, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_arguments_are_named_with_their_rule_and_value(
    error: type[Exception], build: Callable[[], object], message: str
) -> None:
    assert message_of(error, build) == message


# Initialisation


def test_initialisation_is_that_of_the_published_prototxt() -> None:
    model = sknet26()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            continue
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        weight = module.weight
        gaussian = name == "head" or name.endswith(("fc1.conv", "fc2"))
        wanted = 0.01 if gaussian else math.sqrt(2 / weight[0].numel())
        # The standard deviation of n normal numbers has a relative error of 1 / sqrt(2 n); one of
        # 70 weights is 6 of these off once in 10^7 draws. A uniform draw of the same variance
        # would pass: its kurtosis, 1.8 instead of 3, does not.
        n = weight.numel()
        assert abs(weight.std().item() / wanted - 1) < 6 / math.sqrt(2 * n), name
        kurtosis = ((weight / weight.std()) ** 4).mean().item()
        assert abs(kurtosis - 3) < 6 * math.sqrt(24 / n), name
    assert isinstance(model.head, nn.Linear)
    assert (model.head.bias == 0).all()
