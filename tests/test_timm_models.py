"""SKNets in timm's registry and what its scripts ask of them; accelerate on timm's own modules."""

import copy
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sknet_triton as skt
from sknet_triton import Backend, SKNet, SKNetFeatures, use_backend
from sknet_triton.models import SKNET26
from tests.helpers import BACKENDS, EXACT_NETWORK, assert_same, outcome
from tests.plain_sknet import largest_error, scramble

WIDTHS, REDUCTIONS = [64, 256, 512, 1024, 2048], [2, 4, 8, 16, 32]


@pytest.fixture(scope="module")
def timm() -> Any:
    """timm, with the registry filled."""
    try:
        module = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision raises either where it does not fit
        pytest.skip(f"timm cannot be imported: {error}")
    importlib.import_module("sknet_triton.timm")
    return module


# Allows float64 an average over space in another order.
assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def twins(timm: Any, name: str = "sknet26.triton", **kwargs: Any) -> tuple[Any, SKNet]:
    """A model of timm's and the package's own with the same random weights, in float64."""
    theirs = timm.create_model(name, **{"num_classes": 5, **kwargs})
    ours = skt.sknet26(num_classes=theirs.num_classes, in_chans=theirs.in_chans)
    ours.load_state_dict(scramble(theirs).state_dict(), strict=True)
    return theirs.double().eval(), ours.double().eval()


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 64, 48, dtype=torch.float64)


# Names and arguments


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sknet26", 16_746_408),
        ("sknet50", 27_479_784),
        ("sknet101", 48_736_040),
        ("sknet101_caffe", 48_686_760),
    ],
)
def test_every_network_is_found_by_its_name_with_and_without_the_tag(
    name: str, parameters: int, timm: Any
) -> None:
    assert name in timm.list_models("sknet*")
    assert timm.list_models("sknet*", pretrained=True) == []
    for asked in (name, f"{name}.triton"):
        model = timm.create_model(asked, device="meta")
        assert model.pretrained_cfg["tag"] == "triton"
        assert model.pretrained_cfg["architecture"] == name
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert isinstance(model, SKNet)


def test_the_network_is_the_packages_own(timm: Any) -> None:
    theirs, ours = twins(timm, num_classes=7, in_chans=4)
    x = images(4)
    assert theirs(x).shape == (2, 7)
    assert_equal(theirs(x), ours(x))
    assert (theirs.num_classes, theirs.in_chans, theirs.num_features) == (7, 4, 2048)


def test_the_units_arguments_arrive_and_an_unknown_one_is_named(timm: Any) -> None:
    model = timm.create_model("sknet26.triton", M=3, r=8, G=16, device="meta")
    unit = model.stages[3][0].sk
    assert (len(unit.branches), unit.fc1.conv.out_channels) == (3, 1024 // 8)
    assert unit.branches[0].conv.groups == 16
    with pytest.raises(TypeError, match="drop_path_rate"):
        timm.create_model("sknet26.triton", drop_path_rate=0.1)


# Head and pooling


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "fastmax", ""])
def test_the_pooling_is_timms(pool: str, timm: Any) -> None:
    num_classes = 5 if pool else 0
    theirs, _ = twins(timm, global_pool=pool, num_classes=num_classes)
    x = images()
    maps = theirs.forward_features(x)
    mean, largest = maps.mean((2, 3)), maps.amax((2, 3))
    expected = {
        "avg": mean,
        "max": largest,
        "avgmax": (mean + largest) / 2,
        "fastmax": largest,
        "": maps,
    }[pool]
    assert_equal(theirs.forward_head(maps, pre_logits=True), expected)
    assert_equal(theirs(x), theirs.get_classifier()(expected))


def test_a_pooling_that_does_not_fit_is_refused(timm: Any) -> None:
    with pytest.raises(ValueError, match="global_pool: '' needs num_classes=0, got num_classes=9"):
        timm.create_model("sknet26.triton", global_pool="", num_classes=9)
    with pytest.raises(ValueError, match=r"global_pool: expected a pooling .* got 'catavgmax'"):
        timm.create_model("sknet26.triton", global_pool="catavgmax")


def test_the_classifier_is_named_replaced_and_removed(timm: Any) -> None:
    model = timm.create_model("sknet26.triton")
    assert model.get_classifier(name_only=True) == model.pretrained_cfg["classifier"] == "head"
    assert model.get_classifier() is model.head
    assert model.head_hidden_size == model.head.in_features
    model.reset_classifier(4)
    assert (model.num_classes, model.head.out_features) == (4, 4)
    assert model.global_pool.pool_type == "avg"
    model.reset_classifier(3, "max")
    assert (model.head.out_features, model.global_pool.pool_type) == (3, "max")
    model.reset_classifier(2)
    assert (model.head.out_features, model.global_pool.pool_type) == (2, "max")
    with pytest.raises(ValueError, match="global_pool: ''"):
        model.reset_classifier(3, "")
    model.reset_classifier(0, "")
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 2048, 2, 2)


def test_dropout_acts_before_the_head_and_in_training_only(timm: Any) -> None:
    theirs, ours = twins(timm, drop_rate=0.5)
    x = images()
    maps = theirs.forward_features(x)
    assert_equal(theirs(x), ours(x))
    theirs.train()
    pooled, kept = maps.mean((2, 3)), theirs.forward_head(maps, pre_logits=True)
    dropped = kept[pooled != 0] == 0
    # Half of n features are dropped, give or take 5 standard deviations of sqrt(n) / 2.
    assert abs(dropped.sum() - len(dropped) / 2) < 2.5 * len(dropped) ** 0.5
    assert_equal(kept[kept != 0], 2 * pooled[kept != 0])


# Features


def test_features_are_those_of_the_packages_backbone(timm: Any) -> None:
    net = timm.create_model("sknet26.triton", features_only=True)
    ours = SKNetFeatures(SKNET26)
    ours.load_state_dict(scramble(net.model).state_dict(), strict=True)
    x = images()
    maps = net.double().eval()(x)
    assert net.feature_info.channels() == [m.shape[1] for m in maps] == WIDTHS
    assert net.feature_info.reduction() == [x.shape[2] // m.shape[2] for m in maps] == REDUCTIONS
    for actual, expected in zip(maps, ours.double().eval()(x), strict=True):
        assert torch.equal(actual, expected)
    assert net.default_cfg["architecture"] == "sknet26"


@pytest.mark.parametrize("indices", [(1, 3), (-4, -2), (3, 1), 2, (0,), (4,)], ids=str)
def test_out_indices_choose_maps_and_nothing_idle_is_kept(indices: Any, timm: Any) -> None:
    net = timm.create_model("sknet26.triton", features_only=True, out_indices=indices)
    chosen = range(3, 5) if isinstance(indices, int) else [index % 5 for index in indices]
    maps = net(torch.randn(2, 3, 64, 64))
    widths = [WIDTHS[index] for index in chosen]
    assert net.feature_info.channels() == [m.shape[1] for m in maps] == widths
    reductions = [REDUCTIONS[index] for index in chosen]
    assert net.feature_info.reduction() == [64 // m.shape[2] for m in maps] == reductions
    # DistributedDataParallel waits for every parameter's gradient.
    torch.autograd.backward([m.sum() for m in maps])
    assert all(p.grad is not None for p in net.parameters())
    assert len(net.model.stages) == max(chosen)


@pytest.mark.parametrize(
    ("feature_cls", "indices"),
    [("hook", (0, 2)), ("fx", (0, 2)), ("fx", (1, 3, 4)), ("fx", (4,))],
    ids=str,
)
def test_features_by_hooks_and_by_torch_fx_are_the_same(
    feature_cls: str, indices: tuple[int, ...], timm: Any
) -> None:
    options = {"features_only": True, "out_indices": indices}
    other = timm.create_model("sknet26.triton", feature_cls=feature_cls, **options).eval()
    getter = timm.create_model("sknet26.triton", **options).eval()
    shared = {k.split(".", 1)[1]: v for k, v in other.state_dict().items()}
    assert not getter.model.load_state_dict(shared, strict=False).missing_keys
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(getter(x), other(x), strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("indices", [(5,), (0, -6), (), 0, 6], ids=str)
def test_indices_out_of_range_are_refused(indices: Any, timm: Any) -> None:
    with pytest.raises(ValueError, match="indices: expected"):
        timm.create_model("sknet26.triton", features_only=True, out_indices=indices)


def test_forward_intermediates_gives_last_maps_and_those_asked_for(timm: Any) -> None:
    model, _ = twins(timm)
    x = images()
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(maps[-1], last)
    assert [m.shape[1] for m in maps] == WIDTHS
    (third,) = model.forward_intermediates(x, indices=[2], intermediates_only=True)
    assert torch.equal(third, maps[2])
    stopped, (stem, second) = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert torch.equal(stopped, maps[1])
    assert torch.equal(stem, maps[0])
    assert torch.equal(second, maps[1])
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_pruning_keeps_a_head_only_where_all_stages_stay(timm: Any) -> None:
    model = timm.create_model("sknet26.triton", num_classes=5)
    assert model.prune_intermediate_layers([1, -1], prune_head=False) == [1, 4]
    assert (model.num_classes, model.num_features) == (5, 2048)
    assert model.prune_intermediate_layers([0, 2], prune_head=False) == [0, 2]
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (0, 512, 512)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 512, 8, 8)


# Weights


def test_a_file_in_another_layout_loads_for_other_channels_and_classes(
    timm: Any, tmp_path: Path
) -> None:
    source = scramble(timm.create_model("skresnext50_32x4d")).eval()
    torch.save(source.state_dict(), tmp_path / "skresnext50.pth")
    overlay = {"file": str(tmp_path / "skresnext50.pth")}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = timm.create_model("sknet50.triton", **options)
    x = images()
    # As in test_models.py: some dozens of layers, computed in another order.
    assert largest_error(copy.deepcopy(model).double().eval()(x), source.double()(x)) < 1e-9
    grey = timm.create_model("sknet50.triton", in_chans=1, num_classes=7, **options)
    assert grey.head.out_features == 7
    coloured = dict(model.state_dict())
    filters = coloured.pop("stem.conv.weight").sum(1, keepdim=True)
    # timm adds the filters of three colours in float32, perhaps in another order.
    torch.testing.assert_close(grey.stem.conv.weight.detach(), filters, rtol=1e-6, atol=1e-6)
    for name, tensor in coloured.items():
        assert name.startswith("head.") or torch.equal(grey.state_dict()[name], tensor), name


# What timm's scripts ask


def test_the_data_config_is_imagenets(timm: Any) -> None:
    model = timm.create_model("sknet26.triton", device="meta")
    assert model.default_cfg == model.pretrained_cfg
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN


@pytest.mark.parametrize(("coarse", "groups"), [(False, 1 + 8 + 1), (True, 1 + 4 + 1)])
def test_parameter_groups_run_from_the_stem_to_the_head(
    coarse: bool, groups: int, timm: Any
) -> None:
    model = timm.create_model("sknet26.triton", device="meta")
    by_group = timm.models.group_parameters(model, model.group_matcher(coarse))
    assert list(by_group) == list(range(groups))
    assert all(name.startswith("stem.") for name in by_group[0])
    assert by_group[groups - 1] == ["head.weight", "head.bias"]
    assert [name for group in by_group.values() for name in group] == [
        name for name, _ in model.named_parameters()
    ]


# accelerate on timm's own models and layers


# The family, the name in a unit, and how many units each stage has.
NETWORKS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "skresnext50_32x4d": ("timm SelectiveKernel", "conv2", (3, 4, 6, 3)),
    "skresnet18": ("timm SelectiveKernel", "conv1", (2, 2, 2, 2)),
    "resnest26d": ("ResNeSt split attention", "conv2", (2, 2, 2, 2)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_device")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_accelerated_network_has_the_same_numbers_and_names(
    name: str, training: bool, timm: Any
) -> None:
    own = scramble(timm.create_model(name, num_classes=10)).double().train(training)
    model = copy.deepcopy(own)
    kind, sk, units = NETWORKS[name]
    expected = [
        (f"layer{stage}.{unit}.{sk}", kind, "accelerated")
        for stage, count in enumerate(units, start=1)
        for unit in range(count)
    ]
    assert [(row.path, row.kind, row.status) for row in skt.accelerate(model)] == expected
    assert list(model.state_dict()) == list(own.state_dict())
    # With few images fc_reduce's batch norm divides by almost nothing, and magnifies roundings.
    x = torch.randn(8, 3, 48, 48, dtype=torch.float64)
    assert_same(outcome(model, model, x), outcome(own, own, x), EXACT_NETWORK, least=1.0)
    assert len(skt.restore(model)) == len(expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in own.modules()]


# Of timm.layers; each takes 8 channels, or 9.
LAYERS: dict[str, Callable[[Any], nn.Module]] = {
    "SelectiveKernel": lambda layers: layers.SelectiveKernel(8, 8, groups=2),
    "SelectiveKernel M3": lambda layers: layers.SelectiveKernel(
        9, 8, kernel_size=[3, 5, 7], stride=2, split_input=True
    ),
    "SplitAttn": lambda layers: layers.SplitAttn(8, 8, groups=2, norm_layer=nn.BatchNorm2d),
    "SplitAttn radix 1": lambda layers: layers.SplitAttn(8, 8, radix=1, norm_layer=nn.BatchNorm2d),
}


@pytest.mark.usefixtures("on_the_device")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_accelerated_layer_has_the_same_numbers_on_both_backends(
    name: str, backend: Backend, training: bool, timm: Any
) -> None:
    own = scramble(LAYERS[name](timm.layers)).double().train(training)
    module = copy.deepcopy(own)
    assert [row.status for row in skt.accelerate(module)] == ["accelerated"]
    x = torch.randn(3, 9 if "M3" in name else 8, 6, 5, dtype=torch.float64)
    with use_backend(backend):
        actual = outcome(module, module, x)
    assert_same(actual, outcome(own, own, x), least=1.0)
