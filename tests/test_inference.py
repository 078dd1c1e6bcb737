"""fuse_bn: equal results, what it folds and what it leaves alone."""

import copy
import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sknet_triton import SKConv, SKNet, SKNetFeatures, SKUnit, StageSpec, fuse_bn, use_backend
from tests.helpers import DEVICE, EXACT, is_plain, laid_out, unchanged
from tests.plain_sknet import largest_error, scramble

pytestmark = pytest.mark.usefixtures("on_the_device")

TABLE = (StageSpec(32, 2, 1), StageSpec(64, 1))


def among_others() -> nn.Module:
    """A model of somebody else's with two units in it, and names that look like ours."""
    own = nn.Sequential()
    own.add_module("conv", nn.Conv2d(3, 8, 3))
    own.add_module("bn", nn.BatchNorm2d(8))
    unit = SKUnit(16, 8, stride=2, G=2)
    return nn.Sequential(own, nn.SiLU(), SKUnit(8, 8, G=2), nn.Dropout(), unit, nn.BatchNorm2d(16))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SKNet": lambda: SKNet(TABLE, num_classes=5),
    "caffe": lambda: SKNet(TABLE, num_classes=5, variant="caffe"),
    "features": lambda: SKNetFeatures(TABLE),
    "M3": lambda: SKNet(TABLE, num_classes=5, unit_options={"M": 3}),
    "sum": lambda: SKNet(TABLE, num_classes=5, unit_options={"aggregate": "sum"}),
    "fc1 layer norm": lambda: SKNet(TABLE, num_classes=5, unit_options={"fc_norm": "layer"}),
    "fc1 no norm": lambda: SKNet(TABLE, num_classes=5, unit_options={"fc_norm": "none"}),
    "SKUnit": lambda: SKUnit(8, 8, stride=2, G=2),
    "SKConv": lambda: SKConv(8, 8, G=2),
    "SKConv sum": lambda: SKConv(8, 8, G=2, aggregate="sum"),
    "among others": among_others,
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Returns a model in eval mode whose norms have an eps of their own."""
    model = scramble(MODELS[name]()).eval().to(dtype)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eps = 0.03
    return model


def image(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    weight = next(iter(model.parameters()))
    channels = 3 if weight.shape[2:] == (7, 7) or isinstance(model, nn.Sequential) else 8
    return torch.randn(2, channels, 32, 38, dtype=dtype)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, list) else [out]


def assert_folding_changes_nothing(model: nn.Module, x: Tensor) -> None:
    before = outputs(model, x)
    assert fuse_bn(model) is model
    for actual, expected in zip(outputs(model, x), before, strict=True):
        assert actual.stride() == expected.stride()
        assert largest_error(actual, expected) < EXACT


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


def formats(model: nn.Module) -> list[bool]:
    """Tells of every convolution's weight whether it is channels-last."""
    weights = (p for p in model.parameters() if p.dim() == 4)
    return [w.is_contiguous(memory_format=torch.channels_last) for w in weights]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_gives_the_same(name: str, layout: str) -> None:
    model = build(name)
    x = laid_out(image(model), layout)
    if layout == "channels_last":
        cast(Any, model).to(memory_format=torch.channels_last)
    before_formats = formats(model)
    assert_folding_changes_nothing(model, x)
    assert formats(model) == before_formats


@pytest.mark.parametrize("name", MODELS)
def test_what_is_folded(name: str) -> None:
    model = build(name)
    names = [n for n, _ in model.named_modules()]
    sks = [m for m in model.modules() if isinstance(m, SKConv) and m.aggregate == "sk"]
    on_the_fly = {is_plain(sk) for sk in sks}
    stay = {"0.bn", "5"} if name == "among others" else set()
    if name not in ("sum", "fc1 layer norm", "fc1 no norm", "SKConv sum"):
        stay |= {n for n in norms(model) if re.search(r"\b(branches|fc1)\b", n)}
        assert on_the_fly == {True}
    fuse_bn(model)
    assert set(norms(model)) == stay
    assert [n for n, _ in model.named_modules()] == names
    assert {is_plain(sk) for sk in sks} == on_the_fly


def test_the_state_dict_has_biases_for_norms_and_can_be_loaded() -> None:
    model, twin = build("SKUnit"), build("SKUnit")
    before = model.state_dict()
    after = fuse_bn(model).state_dict()
    blocks = ("reduce", "increase", "shortcut")
    assert after.keys() - before.keys() == {f"{block}.conv.bias" for block in blocks}
    gone = before.keys() - after.keys()
    assert {key.rpartition(".")[0] for key in gone} == {f"{block}.bn" for block in blocks}
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    fuse_bn(twin).load_state_dict(after)
    x = image(model)
    assert torch.equal(twin(x), model(x))


def test_a_second_call_changes_nothing() -> None:
    model = fuse_bn(build("SKNet"))
    with unchanged(model):
        fuse_bn(model)


@pytest.mark.parametrize("trained", [False, True])
def test_convolutions_that_someone_else_holds_are_not_written_to(trained: bool) -> None:
    unit = cast(SKUnit, build("SKUnit").requires_grad_(trained))
    conv = unit.reduce.get_submodule("conv")
    weight = cast(Tensor, conv.weight).clone()
    fuse_bn(unit)
    assert conv.bias is None
    assert torch.equal(cast(Tensor, conv.weight), weight)
    assert {p.requires_grad for p in unit.parameters()} == {trained}


# --- rounding -----------------------------------------------------------------------------------


# bfloat16 is folded in float32 and rounded once; float32's own fold rounds a few times.
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.bfloat16, 0.51), (torch.float32, 2.0)])
def test_weights_and_biases_are_those_of_float64_rounded(
    dtype: torch.dtype, roundings: float
) -> None:
    unit = build("SKUnit", dtype)
    exact = fuse_bn(copy.deepcopy(unit).double()).state_dict()
    # A bias is a sum of terms around 1, kept in float32.
    summed = 4 * torch.finfo(torch.float32).eps
    for key, value in fuse_bn(unit).state_dict().items():
        if key.startswith(("reduce", "increase", "shortcut")):
            bound = roundings * torch.finfo(dtype).eps * exact[key].abs()
            assert ((value - exact[key]).abs() <= bound + summed * key.endswith("bias")).all(), key


# --- what is left alone -------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Conv2d's name
        return 2 * super().forward(input)


def other_conv(unit: Any) -> None:
    new = Doubled(8, 8, 1, bias=False).double().eval()
    new.load_state_dict(unit.reduce.conv.state_dict())
    unit.reduce.conv = new


def puts(name: str, value: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    """Returns what puts a child of that name into a unit, in float64 and in eval mode."""
    parent, _, child = name.rpartition(".")
    return lambda unit: unit.get_submodule(parent).add_module(child, value(unit).double().eval())


LEAVE: dict[str, Callable[[Any], Any]] = {
    "hook on the convolution": lambda u: u.reduce.conv.register_forward_hook(lambda *_: None),
    "hook on the norm": lambda u: u.reduce.bn.register_forward_hook(lambda *_: None),
    "parametrization": lambda u: nn.utils.parametrizations.weight_norm(u.reduce.conv),
    "shared convolution": puts("other", lambda u: nn.Sequential(u.reduce.conv)),
    "shared norm": puts("other", lambda u: u.reduce.bn),
    "norm used twice in a row": puts("reduce.again", lambda u: u.reduce.bn),
    "no running statistics": puts(
        "reduce.bn", lambda u: nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "other convolution": other_conv,
    "other norm": puts("reduce.bn", lambda u: nn.GroupNorm(2, 8)),
    "something in between": puts(
        "reduce",
        lambda u: nn.Sequential(u.reduce.conv, nn.ReLU(), u.reduce.bn, u.reduce.act),
    ),
}


@pytest.mark.parametrize("name", LEAVE)
def test_a_pair_is_left_alone(name: str) -> None:
    unit = cast(Any, build("SKUnit"))
    LEAVE[name](unit)
    modules = [*unit.reduce]
    assert_folding_changes_nothing(unit, image(unit))
    assert all(a is b for a, b in zip(unit.reduce, modules, strict=True))
    assert isinstance(unit.increase.bn, nn.Identity)


def around(unit: Any) -> None:
    unit.reduce.register_forward_hook(lambda _module, _args, out: 2 * out)


def biased(unit: Any) -> None:
    unit.reduce.conv.bias = nn.Parameter(torch.randn(8, dtype=torch.float64))


FOLDED: dict[str, Callable[[Any], Any]] = {
    "a hook around the pair": around,
    "no affine": puts("reduce.bn", lambda u: nn.BatchNorm2d(8, affine=False)),
    "bias": biased,
    "sync": cast(Any, nn.SyncBatchNorm).convert_sync_batchnorm,
    "used twice": lambda u: None,
}


@pytest.mark.parametrize("name", FOLDED)
def test_norms_of_other_kinds_and_their_surroundings(name: str) -> None:
    unit = scramble(SKUnit(16, 8, G=2)).double().eval()
    unit = cast(Any, FOLDED[name](unit) or unit)
    model = nn.Sequential(unit, unit) if name == "used twice" else unit
    assert_folding_changes_nothing(model.eval(), torch.randn(2, 16, 6, 5, dtype=torch.float64))
    assert isinstance(unit.reduce.bn, nn.Identity)


# --- training mode ------------------------------------------------------------------------------

TRAINING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "the model": (lambda m: m.train(), r"model in training mode"),
    "a norm": (lambda m: m[4].increase.bn.train(), r"model\.4\.increase\.bn in training mode"),
    "a norm that stays": (lambda m: m[2].sk.fc1.bn.train(), r"model\.2\.sk\.fc1\.bn in training"),
    "a norm of others": (lambda m: m[5].train(), r"model\.5 in training mode"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_mode_is_refused_and_nothing_changes(name: str) -> None:
    change, message = TRAINING[name]
    model = build("among others")
    change(model)
    refused = pytest.raises(ValueError, match=f"model: expected eval mode, .* got {message}")
    with unchanged(model), refused:
        fuse_bn(model)


def test_dropout_in_training_is_none_of_its_business() -> None:
    model = cast(Any, build("among others"))
    model[3].train()
    assert norms(fuse_bn(model))


# --- together with the rest ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SKUnit", "M3", "sum"])
def test_a_model_can_be_folded_before_and_after_it_is_compiled(
    name: str, fresh_dynamo: None
) -> None:
    model = build(name)
    x = image(model)
    compiled = cast(nn.Module, torch.compile(model, fullgraph=True, backend="aot_eager"))
    with torch.no_grad():
        before = compiled(x)
        fuse_bn(compiled)
        assert largest_error(compiled(x), before) < EXACT
    assert norms(model) != norms(build(name))


def test_the_kernels_take_a_folded_model() -> None:
    model = build("SKUnit").to(DEVICE)
    x = image(model)[..., :6, :5].to(DEVICE)
    with use_backend("reference"):
        (before,) = outputs(model, x)
    with use_backend("triton"):
        (after,) = outputs(fuse_bn(model), x)
    assert largest_error(after, before) < EXACT
