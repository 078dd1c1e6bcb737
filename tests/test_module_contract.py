"""What PyTorch users do to modules, done to SKConv: copies, hooks, parametrizations, frozen parts.

SKConv computes in several ways: it calls its modules one by one, or hands their tensors on, to the
kernels, to formulas that torch.compile fuses, or to PyTorch's operators. All are asked.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from sknet_triton import SKConv, SKNet, SKUnit, StageSpec, fused, use_backend
from sknet_triton.backend import Backend
from sknet_triton.layers import parts
from tests.helpers import DEVICE, EXACT, assert_same, outcome
from tests.plain_sknet import distance, largest_error, scramble

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """How an SKConv is made to compute."""

    backend: Backend
    compiled: bool = False
    by_modules: bool = False

    @contextmanager
    def of(self, module: nn.Module) -> Iterator[Run]:
        never = mock.patch.object(parts, "fusible", return_value=None)
        with use_backend(self.backend), never if self.by_modules else nullcontext():
            if not self.compiled:
                yield module
                return
            torch._dynamo.reset()
            yield torch.compile(module, fullgraph=True, backend="aot_eager")
            torch._dynamo.reset()


# The first way is the yardstick of the others.
MODULES = Way("reference", by_modules=True)
TOGETHER = {
    "triton": Way("triton"),
    "compile": Way("reference", compiled=True),
    "eager": Way("reference"),
}
WAYS = {"modules": MODULES, **TOGETHER}


def set_norms_off_their_defaults(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps, norm.momentum = 0.03, 0.3


def build(**options: Any) -> SKConv:
    torch.manual_seed(3)
    module = SKConv(4, 4, **{"G": 2, "d": 3, **options}).double()
    set_norms_off_their_defaults(module)
    return scramble(module).to(DEVICE)


def batch(images: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 4, 5, 4, dtype=torch.float64, generator=generator).to(DEVICE)


def assert_every_way_equals(module: nn.Module, way: Way) -> None:
    expected_module = copy.deepcopy(module)
    with MODULES.of(expected_module) as run:
        expected = outcome(run, expected_module, batch())
    with way.of(module) as run:
        assert_same(outcome(run, module, batch()), expected)


class TogetherError(Exception):
    """Stands for what `sk_fuse_select` would have computed."""


@pytest.fixture
def tripwire(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `sk_fuse_select` raise, so that a test sees whether it is called."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise TogetherError

    monkeypatch.setattr(fused, "fuse_select", refuse)


@pytest.mark.usefixtures("tripwire")
def test_the_ways_are_what_this_file_takes_them_for() -> None:
    module, x = build(), batch()
    with MODULES.of(module) as run:
        run(x)
    with TOGETHER["triton"].of(module) as run, pytest.raises(TogetherError):
        run(x)
    with use_backend("reference"), pytest.raises(TogetherError):
        torch.compile(module, backend="eager")(x)
    torch._dynamo.reset()


# Copies


def by_pickle(module: nn.Module) -> nn.Module:
    return cast(nn.Module, pickle.loads(pickle.dumps(module)))


def by_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return cast(nn.Module, torch.load(file, weights_only=False))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
    "torch.save": by_torch_save,
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "SKConv": build,
    "SKConv-layer": lambda: build(fc_norm="layer"),
    "SKConv-sum": lambda: build(aggregate="sum"),
    "SKUnit": lambda: scramble(SKUnit(4, 4, G=2).double()).to(DEVICE),
    "SKNet": lambda: scramble(SKNet((StageSpec(32, 1, 1),), in_chans=4).double()).to(DEVICE),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "name", "way"),
    [
        *((layer, "deepcopy", "modules") for layer in LAYERS),
        ("SKConv", "deepcopy", "triton"),
        ("SKConv", "pickle", "triton"),
        ("SKUnit", "torch.save", "modules"),
    ],
)
def test_a_copy_computes_the_same_and_shares_nothing(layer: str, name: str, way: str) -> None:
    module = LAYERS[layer]()
    x = torch.randn(
        4, 4, *((16, 16) if layer == "SKNet" else (5, 4)), dtype=torch.float64, device=DEVICE
    )
    with WAYS[way].of(module):
        module(x)  # a copy of a module in use, not of a fresh one
        twin = COPIES[name](module)
        state = copy.deepcopy(module.state_dict())
        seen = outcome(twin, twin, x)
        # Training the copy has left the original alone.
        assert all(torch.equal(t, state[key]) for key, t in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
        expected = outcome(module, module, x)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[key], t) for key, t in expected.items())


def state_file(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return file


@pytest.mark.parametrize("layer", LAYERS)
def test_a_state_dict_goes_through_a_file_that_holds_no_code(layer: str) -> None:
    source, target = LAYERS[layer]().eval(), LAYERS[layer]().eval()
    with torch.no_grad():
        for p in target.parameters():
            p.fill_(float("nan"))
    target.load_state_dict(torch.load(state_file(source), weights_only=True), strict=True)
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64, device=DEVICE)
    assert torch.equal(source(x), target(x))


# Devices, dtypes, memory formats


@pytest.mark.parametrize("way", ["modules", "triton"])
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
def test_a_module_made_without_memory_is_filled_by_a_state_dict(assign: bool, way: str) -> None:
    source = build().eval()
    with torch.device("meta"):
        module = SKConv(4, 4, G=2, d=3).double().eval()
    set_norms_off_their_defaults(module)
    assert module(batch().to("meta")).shape == (4, 4, 5, 4)
    if not assign:
        module.to_empty(device=DEVICE)
    module.load_state_dict(source.state_dict(), assign=assign)
    with WAYS[way].of(module):
        assert torch.equal(module(batch()), source(batch()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["modules", "triton"])
def test_every_dtype_goes_in_and_comes_out(way: str, dtype: torch.dtype) -> None:
    exact = build().eval()
    module = copy.deepcopy(exact).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = batch().to(dtype).contiguous(memory_format=torch.channels_last)
    with WAYS[way].of(module):
        seen = outcome(module, module, x)
    assert seen["out"].is_contiguous(memory_format=torch.channels_last)
    assert seen["dx"].is_contiguous(memory_format=torch.channels_last)
    for name, t in seen.items():
        assert t.dtype == (torch.int64 if "tracked" in name else dtype), name
    # Rounded parameters, input, convolution, norm, selection and the logits' path: 8 half-eps, a
    # bfloat16 store of the interpreter being a whole one.
    assert distance(seen["out"], exact(batch())) < 5 * torch.finfo(dtype).eps


def norms_in_float32(module: nn.Module) -> nn.Module:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("way", ["modules", "triton"])
def test_norms_may_stay_in_float32_in_a_low_dtype_module(way: str, dtype: torch.dtype) -> None:
    exact = build()
    module = norms_in_float32(copy.deepcopy(exact).to(dtype))
    with WAYS[way].of(module):
        seen = outcome(module, module, batch().to(dtype))
    expected = outcome(exact, exact, batch())
    for name, t in seen.items():
        if ".bn." in name and "tracked" not in name:
            assert t.dtype == torch.float32, name
    assert seen["out"].dtype == dtype
    # A statistic is a mean over rounded values of size 1, moved by a tenth.
    for name in ("branches.0.bn.running_mean", "branches.1.bn.running_var"):
        assert (seen[name] - expected[name]).abs().max() < torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("way", WAYS)
def test_float32_input_is_refused_by_a_low_dtype_module_as_by_conv2d(
    way: str, dtype: torch.dtype
) -> None:
    module, conv = (
        build().to(dtype),
        nn.Conv2d(4, 4, 3, groups=2, bias=False, device=DEVICE, dtype=dtype),
    )
    with pytest.raises(RuntimeError) as theirs:
        conv(batch().float())
    with WAYS[way].of(module) as run, pytest.raises(RuntimeError) as ours:
        run(batch().float())
    said = str(ours.value)
    assert str(theirs.value) in said or (WAYS[way].compiled and "dtype" in said)


# Training and eval


@pytest.mark.slow
@pytest.mark.parametrize("way", TOGETHER)
def test_training_and_eval_switch_back_and_forth(way: str) -> None:
    module = build()
    twin = copy.deepcopy(module)
    with TOGETHER[way].of(module) as run:
        for training in (True, False, True):
            module.train(training)
            twin.train(training)
            expected = outcome(twin, twin, batch())
            assert_same(outcome(run, module, batch()), expected)


# Hooks

HOOKED = ("", "branches.0", "branches.1.conv", "branches.0.act", "fc1", "fc1.conv", "fc1.act")


def forward_hook(module: nn.Module, seen: list[Tensor]) -> Any:
    # Cloned, because the ReLUs write in place.
    return module.register_forward_hook(lambda _m, _args, out: seen.append(out.detach().clone()))


def forward_pre_hook(module: nn.Module, seen: list[Tensor]) -> Any:
    return module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))


def replacing_hook(module: nn.Module, seen: list[Tensor]) -> Any:
    def halve(_m: nn.Module, _args: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().clone())
        return out / 2

    return module.register_forward_hook(halve)


def replaced_forward(module: nn.Module, seen: list[Tensor]) -> Any:
    # What wrappers do that keep the type of the module they wrap.
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        out: Tensor = original(x)
        seen.append(out.detach().clone())
        return out * 3

    module.forward = forward


HOOKS: dict[str, Callable[[nn.Module, list[Tensor]], Any]] = {
    "forward": forward_hook,
    "forward-pre": forward_pre_hook,
    "replacing": replacing_hook,
    "replaced-forward": replaced_forward,
}


def hooked(way: Way, where: str, hook: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    module, seen = build(), list[Tensor]()
    HOOKS[hook](module.get_submodule(where), seen)
    with way.of(module) as run:
        return outcome(run, module, batch()), seen


def assert_hook_serves(way: Way, where: str, hook: str) -> None:
    results, seen = hooked(way, where, hook)
    expected_results, expected_seen = hooked(MODULES, where, hook)
    assert_same(results, expected_results)
    assert len(expected_seen) == 1
    assert len(seen) == 1
    assert largest_error(seen[0], expected_seen[0]) < EXACT


@pytest.mark.parametrize(
    ("where", "hook"),
    [
        *((where, "forward") for where in HOOKED),
        ("", "replaced-forward"),
        ("fc1.conv", "replaced-forward"),
        *((where, hook) for where in ("branches.1.bn", "fc2") for hook in HOOKS),
    ],
)
def test_a_hook_on_any_module_sees_its_tensor_on_triton(where: str, hook: str) -> None:
    assert_hook_serves(TOGETHER["triton"], where, hook)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "hook"),
    [
        ("", "forward"),
        ("branches.1.bn", "replacing"),
        ("fc1.bn", "forward-pre"),
        ("fc2", "replaced-forward"),
    ],
)
def test_a_hook_on_any_module_sees_its_tensor_under_compile(where: str, hook: str) -> None:
    assert_hook_serves(TOGETHER["compile"], where, hook)


@pytest.mark.parametrize("where", ["", "branches.0.conv", "fc2"])
def test_a_backward_hook_sees_the_gradients_on_triton(where: str) -> None:
    grads: dict[str, list[Tensor]] = {}
    for name in ("modules", "triton"):
        module, seen = build(), grads.setdefault(name, [])

        def hook(_m: nn.Module, dins: Any, douts: Any, seen: list[Tensor] = seen) -> None:
            seen.extend([*dins, *douts])

        module.get_submodule(where).register_full_backward_hook(hook)
        with WAYS[name].of(module):
            outcome(module, module, batch())
    assert len(grads["triton"]) == len(grads["modules"]) == 2
    for actual, expected in zip(grads["triton"], grads["modules"], strict=True):
        assert largest_error(actual, expected) < EXACT


def test_a_backward_hook_at_an_in_place_relu_works_after_it_is_set_apart() -> None:
    # As in any network with in-place ReLUs: torch refuses the hook until they copy.
    module = build()
    bn, seen = module.branches[0].get_submodule("bn"), list[Tensor]()
    bn.register_full_backward_hook(lambda _m, _dins, douts: seen.extend(douts))
    with use_backend("triton"), pytest.raises(RuntimeError, match="modified inplace"):
        module(batch())
    cast(Any, module.branches[0]).act.inplace = False
    with use_backend("triton"):
        outcome(module, module, batch())
    assert seen[0].shape == (4, 4, 5, 4)


def test_a_hook_on_every_module_there_is_fires_on_triton() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, _args, _out: seen.append(type(m).__name__)
    )
    try:
        with use_backend("triton"):
            build()(batch())
    finally:
        handle.remove()
    # Three blocks of conv, bn and act, fc2, and SKConv itself.
    assert sorted(seen) == sorted(
        [*["Sequential", "Conv2d", "BatchNorm2d", "ReLU"] * 3, "Conv2d", "SKConv"]
    )


@pytest.mark.usefixtures("tripwire")
def test_a_removed_hook_gives_the_fast_way_back() -> None:
    module = build()
    handle = module.fc2.register_forward_hook(lambda *_: None)
    with use_backend("triton"):
        module(batch())
        handle.remove()
        with pytest.raises(TogetherError):
            module(batch())


# Parametrizations and what else stands between a parameter and its use


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


def mixed(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Mixed())


def pruned(module: nn.Module) -> None:
    cast(Any, prune).l1_unstructured(module, "weight", amount=0.5)


def pruned_for_good(module: nn.Module) -> None:
    pruned(module)
    cast(Any, prune).remove(module, "weight")


def new_parameter(module: nn.Module) -> None:
    old = cast(Tensor, module.weight).detach()
    module.register_parameter("weight", nn.Parameter(old / 3))


BETWEEN: dict[str, Callable[[nn.Module], None]] = {
    "parametrization": mixed,
    "weight_norm": weight_norm,
    "old-weight_norm": old_weight_norm,
    "prune": pruned,
    "pruned-for-good": pruned_for_good,
    "new-parameter": new_parameter,
}


def assert_change_counts(where: str, change: str, way: Way) -> None:
    module, expected_module, untouched = build(), build(), build()
    for m in (module, expected_module):
        BETWEEN[change](m.get_submodule(where))
    with MODULES.of(expected_module) as run:
        expected = outcome(run, expected_module, batch())
    with way.of(module) as run:
        # Along the weight's own direction the gradient is a sum that cancels.
        assert_same(outcome(run, module, batch()), expected, bound=10 * EXACT)
        # In eval, because in training a norm undoes a factor of the weight before it.
        out = module.eval()(batch()).detach()
    assert largest_error(out, untouched.eval()(batch()).detach()) > 1e-3


# A norm's weight has one axis, whose weight norm is a sign.
@pytest.mark.parametrize(
    ("where", "change"),
    [
        *(("fc2", change) for change in BETWEEN),
        ("fc1.conv", "parametrization"),
        ("branches.1.conv", "old-weight_norm"),
        ("branches.0.bn", "prune"),
        ("branches.0.bn", "new-parameter"),
        ("fc1.bn", "parametrization"),
    ],
)
def test_a_changed_parameter_is_the_one_used_on_triton(where: str, change: str) -> None:
    assert_change_counts(where, change, TOGETHER["triton"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "change"),
    [("fc2", "parametrization"), ("branches.0.bn", "parametrization"), ("fc1.conv", "weight_norm")],
)
def test_a_changed_parameter_is_the_one_used_under_compile(where: str, change: str) -> None:
    assert_change_counts(where, change, TOGETHER["compile"])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_functional_call_takes_the_tensors_it_is_given(way: str) -> None:
    module, other = build(), build(fc_norm="batch")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1).add_(0.05)
    own = copy.deepcopy(module.state_dict())
    tensors = {name: t.detach().clone() for name, t in other.state_dict().items()}
    leaves = {name: tensors[name].requires_grad_() for name, _ in module.named_parameters()}

    def called(x: Tensor) -> Tensor:
        return cast(Tensor, torch.func.functional_call(module, tensors, (x,)))

    expected = outcome(other, other, batch())
    with WAYS[way].of(module):
        run = torch.compile(called, backend="aot_eager") if WAYS[way].compiled else called
        out = run(batch())
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        torch.autograd.backward((out * weight).sum())
    assert largest_error(out.detach(), expected["out"]) < EXACT
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert largest_error(leaf.grad, expected[f"grad {name}"]) < EXACT, name
    for name, t in tensors.items():  # the statistics that were handed in are those that moved
        if name not in leaves:
            assert largest_error(t, expected[name].double()) < EXACT, name
    assert all(torch.equal(t, own[name]) for name, t in module.state_dict().items())


# Averages

MULTI_AVERAGES = {"ema": cast(Any, get_ema_multi_avg_fn)(0.75), "swa": None}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["modules", "triton"])
@pytest.mark.parametrize("average", MULTI_AVERAGES)
def test_an_average_of_models_gets_its_own_statistics(average: str, way: str) -> None:
    module = build()
    averaged = AveragedModel(module, multi_avg_fn=MULTI_AVERAGES[average])
    with WAYS[way].of(module):
        averaged.update_parameters(module)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1.0)
        averaged.update_parameters(module)
        loader = [batch(3, seed) for seed in (5, 6, 7)]
        update_bn(loader, averaged)
        state = averaged.module.state_dict()
        seen = averaged.eval()(batch()).detach()
    # ema: 0.75 old + 0.25 new; swa: the mean.
    share = 0.25 if average == "ema" else 0.5
    expected = build()
    with torch.no_grad():
        for p in expected.parameters():
            p.add_(share)
    # With momentum None torch keeps the plain mean over the batches of each batch's statistics.
    conv = cast(Any, expected.branches[1]).conv
    maps = [conv(x).detach().transpose(0, 1).flatten(1) for x in loader]
    mean = torch.stack([m.mean(1) for m in maps]).mean(0)
    var = torch.stack([m.var(1) for m in maps]).mean(0)
    assert largest_error(state["branches.1.bn.running_mean"], mean) < EXACT
    assert largest_error(state["branches.1.bn.running_var"], var) < EXACT
    assert state["branches.1.bn.num_batches_tracked"] == 3
    expected.load_state_dict(
        {n: t for n, t in state.items() if "running" in n or "tracked" in n}, strict=False
    )
    with MODULES.of(expected):
        assert largest_error(seen, expected.eval()(batch()).detach()) < EXACT


# Parts that stand still, and parts that stand in two places


def without_gradient(*names: str) -> Callable[[SKConv], None]:
    def change(module: SKConv) -> None:
        for name in names:
            module.get_submodule(name).requires_grad_(False)

    return change


def frozen_norms(module: SKConv) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval().requires_grad_(False)


STILL: dict[str, Callable[[SKConv], None]] = {
    "all-norms": frozen_norms,
    "convolutions": without_gradient("branches.0.conv", "branches.1.conv"),
    "one-branch": without_gradient("branches.1"),
    "fc1": without_gradient("fc1"),
    "fc2": without_gradient("fc2"),
    "everything": without_gradient(""),
    "all-but-fc2": without_gradient("branches", "fc1"),
    "one-bias": lambda m: cast(None, cast(Any, m.branches[0]).bn.bias.requires_grad_(False)),
}


def assert_the_rest_learns_as_before(change: str, way: Way) -> None:
    module = build()
    STILL[change](module)
    still = {name for name, p in module.named_parameters() if not p.requires_grad}
    free = build().train(True)
    for m, twin in zip(module.modules(), free.modules(), strict=True):
        twin.train(m.training) if isinstance(m, nn.BatchNorm2d) else None
    expected = outcome(free, free, batch())
    with way.of(module) as run:
        seen = outcome(run, module, batch())
    assert still
    assert_same(seen, {k: v for k, v in expected.items() if k.removeprefix("grad ") not in still})


@pytest.mark.slow
@pytest.mark.parametrize("change", STILL)
@pytest.mark.parametrize("way", ["modules", "triton"])
def test_what_is_not_frozen_gets_the_gradient_it_always_got(change: str, way: str) -> None:
    assert_the_rest_learns_as_before(change, WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("change", ["all-norms", "one-branch"])
def test_what_is_not_frozen_gets_its_gradient_under_compile(change: str) -> None:
    assert_the_rest_learns_as_before(change, TOGETHER["compile"])


class Twice(nn.Module):
    """One SKConv in two places."""

    def __init__(self, sk: SKConv) -> None:
        super().__init__()
        self.first = self.second = sk

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x) + x)
        return out


@pytest.mark.slow
@pytest.mark.parametrize("way", TOGETHER)
def test_one_module_in_two_places(way: str) -> None:
    module = Twice(build())
    assert_every_way_equals(module, TOGETHER[way])
    assert cast(Any, module.first.branches[0]).bn.num_batches_tracked == 2


def one_norm_for_both(module: SKConv) -> None:
    module.branches[1].add_module("bn", module.branches[0].get_submodule("bn"))


def one_weight_for_both(module: SKConv) -> None:
    cast(Any, module.branches[1]).conv.weight = cast(Any, module.branches[0]).conv.weight


@pytest.mark.slow
@pytest.mark.parametrize("share", [one_norm_for_both, one_weight_for_both])
@pytest.mark.parametrize("way", TOGETHER)
def test_branches_that_share_a_part(way: str, share: Callable[[SKConv], None]) -> None:
    module = build()
    share(module)
    assert_every_way_equals(module, TOGETHER[way])
