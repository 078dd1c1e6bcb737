"""What PyTorch users do to modules, done to SKConv: copies, dtypes, hooks, foreign tensors.

SKConv computes in several ways: it calls its modules one by one, or hands their tensors on, to the
kernels, to formulas that torch.compile fuses, or to PyTorch's operators. All are asked, and of
other norms, parametrizations and frozen parts in test_sk_fuse_select.py.
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

from sknet_triton import SKConv, SKUnit, fused, use_backend
from sknet_triton.backend import Backend
from sknet_triton.layers import parts
from tests.helpers import (
    DEVICE,
    Seen,
    assert_close,
    assert_same,
    images,
    outcome,
    ramp,
    small_conv,
    small_network,
)
from tests.plain_sknet import distance, for_norms, scramble

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

    def seen(self, module: nn.Module, x: Tensor | None = None) -> Seen:
        """Returns the outcome of one step, on `images` where nothing else is given."""
        with self.of(module) as run:
            return outcome(run, module, images() if x is None else x)


# The first way is the yardstick of the others.
WAYS = {
    "modules": Way("reference", by_modules=True),
    "triton": Way("triton"),
    "compile": Way("reference", compiled=True),
    "eager": Way("reference"),
}
MODULES = WAYS["modules"]
TOGETHER = tuple(WAYS)[1:]
on_triton_too = pytest.mark.parametrize("way", ["modules", "triton"])


set_norms_off_their_defaults = for_norms(lambda bn: vars(bn).update(eps=0.03, momentum=0.3))


def build(**options: Any) -> SKConv:
    module = small_conv(**options)
    set_norms_off_their_defaults(module)
    return module


class TogetherError(Exception):
    """Stands for what `sk_fuse_select` would have computed."""


@pytest.fixture
def tripwire(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `sk_fuse_select` raise, so that a test sees whether it is called."""
    monkeypatch.setattr(fused, "fuse_select", mock.Mock(side_effect=TogetherError))


@pytest.mark.usefixtures("tripwire", "fresh_dynamo")
def test_the_ways_are_what_this_file_takes_them_for() -> None:
    module, x = build(), images()
    with MODULES.of(module) as run:
        run(x)
    with WAYS["triton"].of(module) as run, pytest.raises(TogetherError):
        run(x)
    with use_backend("reference"), pytest.raises(TogetherError):
        torch.compile(module, backend="eager")(x)


# Copies


def by_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return cast(nn.Module, torch.load(file, weights_only=False))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": by_torch_save,
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "SKConv": build,
    "SKConv-layer": lambda: build(fc_norm="layer"),
    "SKConv-sum": lambda: build(aggregate="sum"),
    "SKUnit": lambda: scramble(SKUnit(4, 4, G=2).double()).to(DEVICE),
    "SKNet": small_network,
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
    module, x = LAYERS[layer](), images(size=(16, 16) if layer == "SKNet" else (5, 4))
    with WAYS[way].of(module):
        module(x)  # a copy of a module in use, not of a fresh one
        twin = COPIES[name](module)
        state = copy.deepcopy(module.state_dict())
        seen = outcome(twin, twin, x)
        # Training the copy has left the original alone.
        assert_same(dict(module.state_dict()), state, bound=0)
        assert all(p.grad is None for p in module.parameters())
        assert_same(seen, outcome(module, module, x), bound=0)


# Devices, dtypes, memory formats


@on_triton_too
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
def test_a_module_made_without_memory_is_filled_by_a_state_dict(assign: bool, way: str) -> None:
    source = build().eval()
    with torch.device("meta"):
        module = SKConv(4, 4, G=2, d=3).double().eval()
    set_norms_off_their_defaults(module)
    assert module(images().to("meta")).shape == (4, 4, 5, 4)
    if not assign:
        module.to_empty(device=DEVICE)
    module.load_state_dict(source.state_dict(), assign=assign)
    with WAYS[way].of(module):
        assert torch.equal(module(images()), source(images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@on_triton_too
def test_every_dtype_goes_in_and_comes_out(way: str, dtype: torch.dtype) -> None:
    exact = build().eval()
    module = copy.deepcopy(exact).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = images().to(dtype).contiguous(memory_format=torch.channels_last)
    seen = WAYS[way].seen(module, x)
    assert seen["out"].is_contiguous(memory_format=torch.channels_last)
    assert seen["dx"].is_contiguous(memory_format=torch.channels_last)
    for name, t in seen.items():
        assert t.dtype == (torch.int64 if "tracked" in name else dtype), name
    # Rounded parameters, input, convolution, norm, selection and the logits' path: 8 half-eps, a
    # bfloat16 store of the interpreter being a whole one.
    assert distance(seen["out"], exact(images())) < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@on_triton_too
def test_norms_may_stay_in_float32_in_a_low_dtype_module(way: str, dtype: torch.dtype) -> None:
    exact = build()
    module = copy.deepcopy(exact).to(dtype)
    for_norms(lambda bn: bn.float())(module)
    seen, expected = WAYS[way].seen(module, images().to(dtype)), outcome(exact, exact, images())
    for name, t in seen.items():
        if ".bn." in name and "tracked" not in name:
            assert t.dtype == torch.float32, name
    assert seen["out"].dtype == dtype
    # A statistic is a mean over rounded values of size 1, moved by a tenth.
    for name in ("branches.0.bn.running_mean", "branches.1.bn.running_var"):
        assert (seen[name] - expected[name]).abs().max() < torch.finfo(dtype).eps, name


# Hooks

HOOKED = ("", "branches.0", "branches.1.conv", "branches.0.act", "fc1", "fc1.conv", "fc1.act")


def noted(x: Tensor, seen: list[Tensor]) -> None:
    seen.append(x.detach().clone())  # because the ReLUs write in place


def replaced_forward(module: nn.Module, seen: list[Tensor]) -> Any:
    # What wrappers do that keep the type of the module they wrap.
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        out: Tensor = original(x)
        noted(out, seen)
        return out * 3

    module.forward = forward


def noting(m: nn.Module, seen: list[Tensor]) -> Any:
    return m.register_forward_hook(lambda _m, _args, out: noted(out, seen))


HOOKS: dict[str, Callable[[nn.Module, list[Tensor]], Any]] = {
    "forward": noting,
    "forward-pre": lambda m, seen: m.register_forward_pre_hook(lambda _m, x: noted(x[0], seen)),
    "replacing": lambda m, seen: (
        noting(m, seen),
        m.register_forward_hook(lambda _m, _args, out: out / 2),
    ),
    "replaced-forward": replaced_forward,
}


@pytest.mark.parametrize(
    ("where", "hook", "way"),
    [
        *((where, "forward", "triton") for where in HOOKED),
        ("", "replaced-forward", "triton"),
        ("fc1.conv", "replaced-forward", "triton"),
        *((where, hook, "triton") for where in ("branches.1.bn", "fc2") for hook in HOOKS),
        *(
            pytest.param(where, hook, "compile", marks=pytest.mark.slow)
            for where, hook in (
                ("", "forward"),
                ("branches.1.bn", "replacing"),
                ("fc1.bn", "forward-pre"),
                ("fc2", "replaced-forward"),
            )
        ),
    ],
)
def test_a_hook_on_any_module_sees_its_tensor(where: str, hook: str, way: str) -> None:
    def hooked(way: Way) -> Seen:
        module, seen = build(), list[Tensor]()
        HOOKS[hook](module.get_submodule(where), seen)
        result = way.seen(module)
        (tensor,) = seen
        return result | {"seen": tensor}

    assert_same(hooked(WAYS[way]), hooked(MODULES))


@pytest.mark.parametrize("where", ["", "branches.0.conv", "fc2"])
def test_a_backward_hook_sees_the_gradients_on_triton(where: str) -> None:
    grads: dict[str, list[Tensor]] = {"triton": [], "modules": []}
    for way, seen in grads.items():
        module = build()

        def hook(_m: nn.Module, dins: Any, douts: Any, seen: list[Tensor] = seen) -> None:
            seen.extend([*dins, *douts])

        module.get_submodule(where).register_full_backward_hook(hook)
        WAYS[way].seen(module)
    assert len(grads["triton"]) == 2
    assert_close(grads["triton"], grads["modules"])


def test_a_hook_on_every_module_there_is_fires_on_triton() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, _args, _out: seen.append(type(m).__name__)
    )
    try:
        with use_backend("triton"):
            build()(images())
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
        module(images())
        handle.remove()
        with pytest.raises(TogetherError):
            module(images())


# Tensors from elsewhere


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

    expected = outcome(other, other, images())
    with WAYS[way].of(module):
        run = torch.compile(called, backend="aot_eager") if WAYS[way].compiled else called
        out = run(images())
        torch.autograd.backward(out, ramp(out))
    # The statistics that were handed in are those that moved.
    seen = {"out": out.detach(), "dx": expected["dx"]}
    seen |= {f"grad {name}": cast(Tensor, leaf.grad) for name, leaf in leaves.items()}
    seen |= {name: t for name, t in tensors.items() if name not in leaves}
    assert_same(seen, expected)
    assert_same(dict(module.state_dict()), own, bound=0)


# One module in two places


class Twice(nn.Module):
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
    expected = MODULES.seen(copy.deepcopy(module))
    assert_same(WAYS[way].seen(module), expected)
    assert module.get_buffer("first.branches.0.bn.num_batches_tracked") == 2
