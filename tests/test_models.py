"""SKNet: counts of the paper, the network against its equations, and the backbone's interface."""

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sknet_triton import SKConv, SKNet, SKNetFeatures, StageSpec, sknet26, sknet50, sknet101
from sknet_triton.models import SKNET26, SKNET50
from tests.helpers import EXACT_NETWORK
from tests.plain_sknet import largest_error, leaves, plain_sknet, scramble

# As in test_layers.py, but through a dozen layers: 10^5 eps would be 2e-11.

# Two stages, the second with a stride and a second unit whose shortcut is the identity: every
# kind of unit of the published networks, small enough to be computed by hand-written equations.
SMALL = (StageSpec(32, 1, 1), StageSpec(64, 2, 2))


def small(**kwargs: Any) -> SKNet:
    return SKNet(SMALL, **{"num_classes": 5, **kwargs})


def caffe101(**kwargs: Any) -> SKNet:
    return sknet101(variant="caffe", **kwargs)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Counts


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (sknet26, 16_746_408),
        (sknet50, 27_479_784),
        (sknet101, 48_736_040),
        (caffe101, 48_686_760),
    ],
    ids=["sknet26", "sknet50", "sknet101", "sknet101-caffe"],
)
def test_parameter_counts(build: Callable[..., SKNet], parameters: int) -> None:
    assert count(build(device="meta")) == parameters


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        # table 6: the second branch as 3x3 D3 G32, 3x3 D1 G32, 5x5 D1 G64, 7x7 D1 G128
        ({"branches": [(3, 1, 32), (3, 3, 32)]}, "27.48"),
        ({"branches": [(3, 1, 32), (3, 1, 32)]}, "27.48"),
        ({"branches": [(3, 1, 32), (5, 1, 64)]}, "28.03"),
        ({"branches": [(3, 1, 32), (7, 1, 128)]}, "27.99"),
        # table 7: one branch summed is a ResNeXt-50; two summed; three selected
        ({"M": 1, "aggregate": "sum"}, "25.03"),
        ({"M": 2, "aggregate": "sum"}, "26.46"),
        ({"M": 3}, "29.25"),
    ],
    ids=["K3-D3", "K3-D1", "K5-G64", "K7-G128", "one", "sum", "M3"],
)
def test_parameter_counts_of_the_ablations(options: dict[str, Any], millions: str) -> None:
    assert f"{count(sknet50(device='meta', **options)) / 1e6:.2f}" == millions


def gmac(model: nn.Module, *shape: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(*shape, device="meta"))
    # The counter counts a multiplication and an addition as two.
    return float(counter.get_total_flops()) / 2e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "expected"),
    [(sknet50, "4.4627"), (caffe101, "8.4487")],
    ids=["sknet50", "sknet101-caffe"],
)
def test_multiply_accumulates_at_224(build: Callable[..., SKNet], expected: str) -> None:
    model = build(device="meta").eval()
    assert f"{gmac(model, 1, 3, 224, 224):.4f}" == expected
    assert f"{gmac(model, 4, 3, 224, 224) / 4:.4f}" == expected


# Structure


# Values


@pytest.mark.parametrize("variant", ["paper", "caffe"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40)], ids=["32x32", "33x47", "64x40"])
def test_the_network_equals_the_equations_forward_and_backward(
    size: tuple[int, int], training: bool, variant: str
) -> None:
    model = scramble(small(variant=variant)).double().train(training)
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    p = leaves(model)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    padding = 1 if variant == "paper" else 0
    *maps, logits = plain_sknet(theirs, p, (1, 2), training, padding)
    out = model(ours)
    assert largest_error(out.detach(), logits.detach()) < EXACT_NETWORK
    weight = torch.randn_like(logits)
    torch.autograd.backward((logits * weight).sum())
    torch.autograd.backward((out * weight).sum())
    assert ours.grad is not None
    assert theirs.grad is not None
    assert largest_error(ours.grad, theirs.grad) < EXACT_NETWORK
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        reference = p[name].grad
        assert reference is not None, name
        assert largest_error(parameter.grad, reference) < EXACT_NETWORK, name
    # A second forward pass in training sees the same batch, so the same statistics.
    with torch.no_grad():
        for ours_map, theirs_map in zip(model.forward_intermediates(x), maps, strict=True):
            assert largest_error(ours_map, theirs_map.detach()) < EXACT_NETWORK
        assert torch.equal(model.forward_features(x), model.forward_intermediates(x)[-1])


# Sizes and batches


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (33, 33), (47, 47), (224, 224), (200, 250)], ids=str
)
def test_any_size_down_to_32_gives_maps_of_the_reductions(height: int, width: int) -> None:
    model = sknet26(num_classes=7).eval()
    x = torch.randn(1, 3, height, width)
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        logits = model(x)
    for info, feature in zip(model.feature_info, maps, strict=True):
        rows, columns = (math.ceil(n / info["reduction"]) for n in (height, width))
        assert feature.shape == (1, info["num_chs"], rows, columns)
        assert torch.isfinite(feature).all()
        assert feature.std() > 0
    assert logits.shape == (1, 7)
    assert torch.isfinite(logits).all()


# Interface


def test_num_classes_0_returns_the_pooled_features() -> None:
    model = scramble(small(num_classes=0)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        pooled = model(x)
        assert largest_error(pooled, model.forward_features(x).mean((2, 3))) < EXACT_NETWORK
    assert pooled.shape == (2, model.num_features) == (2, 128)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert not any(name.startswith("head") for name in model.state_dict())


@pytest.mark.parametrize("channels", [1, 4])
def test_in_chans(channels: int) -> None:
    model = small(in_chans=channels).eval()
    assert model.stem.get_parameter("conv.weight").shape == (64, channels, 7, 7)
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 5)


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
    with pytest.raises(ValueError, match="num_classes: expected at least 0, got -1"):
        model.reset_classifier(-1)
    assert model.num_classes == 3


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


def test_out_indices_belong_to_a_backbone() -> None:
    with pytest.raises(
        ValueError, match=r"out_indices: expected features_only=True .*, got \(1,\)"
    ):
        sknet26(out_indices=(1,), device="meta")


@pytest.mark.parametrize("index", [5, -6])
def test_out_indices_beyond_the_maps_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"out_indices: expected indices of 5 .*, got {index}"):
        sknet26(features_only=True, out_indices=(index,), device="meta")


def test_checkpointing_gives_the_same_gradients_and_keeps_less() -> None:
    model = scramble(small()).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    kept: list[dict[str, Tensor]] = []
    sizes: list[int] = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        saved = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal saved
            saved += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(x)
        torch.autograd.backward(out.square().sum())
        kept.append({n: cast(Tensor, p.grad).clone() for n, p in model.named_parameters()})
        sizes.append(saved)
    assert kept[0].keys() == kept[1].keys()
    for name, grad in kept[0].items():
        assert largest_error(kept[1][name], grad) < EXACT_NETWORK, name
    # What the units save is most of it, and checkpointing saves only what goes in.
    assert sizes[1] < sizes[0] / 2
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "stages": (lambda: SKNet([]), ValueError, "stages: expected at least one StageSpec, got none"),
    "num_classes": (
        lambda: small(num_classes=-1),
        ValueError,
        "num_classes: expected at least 0, got -1",
    ),
    "in_chans": (lambda: small(in_chans=0), ValueError, "in_chans: expected at least 1, got 0"),
    "variant": (
        lambda: small(variant="pytorch"),
        ValueError,
        "variant: expected 'paper' or 'caffe', got 'pytorch'",
    ),
    "variant-101": (
        lambda: sknet101(variant="pytorch"),  # type: ignore[arg-type]
        ValueError,
        "variant: expected 'paper' or 'caffe', got 'pytorch'",
    ),
    "unit_options": (
        lambda: small(unit_options={"M": 2, "d": 16}),
        TypeError,
        "unit_options: expected M, r, L, G, branches, aggregate, fc_norm, got 'd'",
    ),
    "M": (
        lambda: sknet50(M=0, device="meta"),
        ValueError,
        "M: expected at least one branch, got 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_with_their_rule_and_value(name: str) -> None:
    build, error, message = BAD[name]
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == message


# Initialisation


def test_initialisation_is_that_of_the_published_prototxt() -> None:
    model = sknet26()
    gaussian = {
        id(weight)
        for m in model.modules()
        if isinstance(m, SKConv)
        for weight in (m.fc1.get_parameter("conv.weight"), m.fc2.weight)
    }
    assert len(gaussian) == 2 * 8
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            continue
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        weight = module.weight
        fan_in = weight[0].numel()
        classifier = isinstance(module, nn.Linear)
        wanted = 0.01 if classifier or id(weight) in gaussian else math.sqrt(2 / fan_in)
        # The standard deviation of n normal numbers has a relative error of 1 / sqrt(2 n); one of
        # 70 weights is 6 of these off once in 10^7 draws. A uniform draw of the same variance
        # would pass: its kurtosis, 1.8 instead of 3, does not.
        n = weight.numel()
        assert abs(weight.std().item() / wanted - 1) < 6 / math.sqrt(2 * n), name
        kurtosis = ((weight / weight.std()) ** 4).mean().item()
        assert abs(kurtosis - 3) < 6 * math.sqrt(24 / n), name
    assert isinstance(model.head, nn.Linear)
    assert (model.head.bias == 0).all()


# Memory format


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_channels_last_goes_through_every_module_of_sknet50(training: bool) -> None:
    model = sknet50(num_classes=10).train(training)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen: dict[str, bool] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(_module: nn.Module, _args: Any, out: Any) -> None:
            # fc1 and fc2 see one position, the head no map.
            if out.dim() == 4 and out.shape[1] > 1 and out.shape[2] * out.shape[3] > 1:
                seen[name] = out.is_contiguous(memory_format=torch.channels_last)

        return check

    for name, module in model.named_modules():
        module.register_forward_hook(hook(name))
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    with torch.set_grad_enabled(training):
        out = model(x)
    assert [name for name, ok in seen.items() if not ok] == []
    # The stem (4), the pool, 4 stages, 16 units of 18 modules: the unit, reduce (4), SKConv,
    # two branches of 4, increase (3), the last ReLU; and 4 shortcuts of 3, 12 identities of 1.
    assert len(seen) == 4 + 1 + 4 + 16 * 18 + 4 * 3 + 12
    if training:
        torch.autograd.backward(out.sum())
        assert x.grad is not None
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
