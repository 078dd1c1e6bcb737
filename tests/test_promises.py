"""accelerate changes the speed and nothing else: what it compares, what it leaves alone."""

import copy
import gc
import inspect
import logging
import pickle
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import sknet_triton as skt
from perf.peers import rebuilt
from sknet_triton.acceleration import family, unregister_family
from sknet_triton.acceleration.swap import Accelerated
from sknet_triton.backend import Backend, current_backend
from sknet_triton.layers import parts
from tests.helpers import BACKENDS, EXACT
from tests.plain_sknet import scramble
from tests.processes import needs_gloo
from tests.test_acceleration import Blend, SKAttention, SKConvWithSigmoid, TwoOutputs, blend_family

Body = Callable[[Any, Tensor, Callable[[Tensor], Tensor]], Any]


class Port(rebuilt.SKConv):
    """A port whose forward is ``body``, which gets the published one as its last argument."""

    def __init__(self, body: Body) -> None:
        super().__init__(8, 4)
        self.seen: list[Any] = []
        object.__setattr__(self, "body", body)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(self, x, super().forward)  # type: ignore[operator]  # set past nn.Module
        return out


def port() -> nn.Module:
    return rebuilt.SKConv(8, 4)


def timm_kernel() -> nn.Module:
    return rebuilt.SelectiveKernel(8, 4, groups=2)


def images() -> Tensor:
    return torch.randn(3, 8, 6, 5, dtype=torch.float64)


def row_of(module: nn.Module) -> skt.acceleration.Row:
    (row,) = skt.accelerate(module)
    return row


# What a forward does besides returning, or other than the family.


KEPT: list[Any] = []
CACHE: dict[str, Any] = {}
COUNT = 0
QUIET = logging.getLogger("quiet")


def keeps_the_map(self: Any, x: Tensor, forward: Any) -> Any:
    self.last = forward(x)
    return self.last


def appends_to_itself(self: Any, x: Tensor, forward: Any) -> Any:
    self.seen.append(x.shape)
    return forward(x)


def appends_to_a_global(self: Any, x: Tensor, forward: Any) -> Any:
    KEPT.append(x.mean())
    return forward(x)


def writes_to_a_global(self: Any, x: Tensor, forward: Any) -> Any:
    CACHE["last"] = x.mean()
    return forward(x)


def counts(self: Any, x: Tensor, forward: Any) -> Any:
    global COUNT
    COUNT += 1
    return forward(x)


def prints_sometimes(self: Any, x: Tensor, forward: Any) -> Any:
    if x.shape[0] > 100:
        print(x.shape)
    return forward(x)


def logs(self: Any, x: Tensor, forward: Any) -> Any:
    QUIET.debug("called")
    return forward(x)


def warns(self: Any, x: Tensor, forward: Any) -> Any:
    warnings.warn("called", stacklevel=1)
    return forward(x)


def inside(context: Callable[[], Any]) -> Body:
    def inside(self: Any, x: Tensor, forward: Any) -> Any:
        with context():
            return forward(x)

    return inside


def returning(change: Callable[[Tensor], Any]) -> Body:
    return lambda self, x, forward: change(forward(x))


def detached(self: Any, x: Tensor, forward: Any) -> Any:
    return forward(x.detach())


def detached_attention(self: Any, x: Tensor, forward: Any) -> Any:
    maps = [branch(x) for branch in self.conv]
    pooled = sum(m.detach() for m in maps).mean((2, 3), keepdim=True)
    weights = self.fc2(self.fc1(pooled)).reshape(x.shape[0], len(maps), -1, 1, 1).softmax(1)
    return (torch.stack(maps, 1) * weights).sum(1)


def detached_in_training(self: Any, x: Tensor, forward: Any) -> Any:
    return detached_attention(self, x, forward) if self.training else forward(x)


def writes_to_its_input(self: Any, x: Tensor, forward: Any) -> Any:
    out = forward(x)
    x.add_(1)
    return out


def moves_a_buffer(self: Any, x: Tensor, forward: Any) -> Any:
    out = forward(x)
    next(self.buffers()).add_(1)
    return out


OTHER: dict[Body, str] = {
    keeps_the_map: "more than return: keeps_the_map writes the attribute last",
    appends_to_itself: "more than return: it keeps seen",
    appends_to_a_global: "more than return: changes KEPT",
    writes_to_a_global: "more than return: changes CACHE",
    counts: "more than return: counts writes the global COUNT",
    prints_sometimes: "more than return: prints_sometimes calls print",
    logs: "more than return: logs calls logging.debug",
    warns: "more than return: warns calls _warnings.warn",
    inside(partial(torch.autograd.profiler.record_function, "sk")): "calls torch.autograd.profiler",
    inside(partial(torch.autocast, "cpu", enabled=False)): "calls torch.amp",
    returning(lambda out: out + 0 * torch.rand(())): "its next random number differs",
    returning(lambda out: out + 0 * random.random()): "calls random.random",
    detached: "it has no gradient of input 0, not a",
    returning(lambda out: out.detach()): "requires_grad of its output is False",
    detached_attention: "its gradient of input 0 differs",
    detached_in_training: "its gradient of input 0 differs",
    returning(lambda out: out * (1 if torch.is_grad_enabled() else 2)): "its output differs",
    writes_to_its_input: "its input 0 afterwards differs",
    moves_a_buffer: "running_mean differs",
}


@pytest.mark.filterwarnings("ignore:called:UserWarning")
@pytest.mark.parametrize("body", OTHER, ids=OTHER.get)
def test_what_does_more_or_other_than_the_family_is_left(body: Body) -> None:
    module = Port(body)
    row = row_of(module)
    assert (row.status, type(module)) == ("left", Port)
    assert OTHER[body] in row.reason


def keeps_a_list_of_its_own(self: Any, x: Tensor, forward: Any) -> Any:
    outs = []
    outs.append(forward(x))
    return outs[0]


def asks_the_mode(self: Any, x: Tensor, forward: Any) -> Any:
    assert x.dim() == 4 and not torch.compiler.is_compiling()  # noqa: PT018 - as ports write it
    return forward(x.clone())


def reads_a_global(self: Any, x: Tensor, forward: Any) -> Any:
    return forward(x) if CACHE.get("factor", 1) == 1 else 2 * forward(x)


@pytest.mark.parametrize("body", [keeps_a_list_of_its_own, asks_the_mode, reads_a_global])
def test_what_only_computes_is_swapped(body: Body) -> None:
    assert row_of(Port(body)).status == "accelerated"


# Threads and random states.


def test_four_threads_leave_backend_and_random_states() -> None:
    models = [nn.Sequential(rebuilt.SKConv(8, 4), rebuilt.SKFF(8)) for _ in range(4)]
    state = torch.get_rng_state()
    seen = set()
    threads = [threading.Thread(target=skt.accelerate, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(current_backend())
    assert seen | {current_backend()} == {"auto"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(isinstance(module, Accelerated) for model in models for module in model)


@pytest.mark.parametrize("build", [port, lambda: rebuilt.CycleMLP(8)])
def test_no_generator_is_moved_and_no_device_reseeded(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build()
    for owner in (torch, torch.random, torch.cuda):
        monkeypatch.setattr(owner, "manual_seed", None)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    before = torch.get_rng_state(), random.getstate()
    assert row_of(module).status == "accelerated"
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


# A child replaced afterwards.


class OtherAttention(nn.Module):
    def forward(self, stacked: Tensor) -> Tensor:
        return torch.full(stacked.shape[:3], 0.25, dtype=stacked.dtype)


class Configured(rebuilt.SKConv):
    def __init__(self) -> None:
        super().__init__(8, 4)
        self.config, self.shift = {"scale": 1.0}, [0.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.config["scale"] * super().forward(x) + self.shift[-1]


def even(self: rebuilt.SKConv, wide: Tensor) -> Tensor:
    return torch.full((wide.shape[0], self.M, self.out_channels), 0.5, dtype=wide.dtype)


def sets(path: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Returns what sets the attribute at ``path`` of a module to what ``value`` makes of it."""
    parent, _, name = path.rpartition(".")
    return lambda module: setattr(module.get_submodule(parent), name, value(module))


# What builds a module, what changes it, and whether the family still fits.
REPLACED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None], bool]] = {
    "another attn": (timm_kernel, sets("attn", lambda _: OtherAttention()), False),
    "none": (port, sets("global_pool", lambda _: nn.AdaptiveMaxPool2d(1)), False),
    "another axis": (port, sets("softmax.dim", lambda _: 2), False),
    "an attribute": (lambda: rebuilt.SplitAttn(8, 4), sets("rsoftmax.radix", lambda _: 1), False),
    "a norm inside": (port, sets("conv.0.1", lambda _: nn.Identity()), True),
    "another MLP": (port, sets("fc1", lambda port: nn.Sequential(port.fc1[0], nn.Tanh())), True),
    "a value in a dict": (Configured, lambda module: module.config.update(scale=2.0), False),
    "a value in a list": (Configured, lambda module: module.shift.append(1.0), False),
    "a method": (port, sets("attention", lambda module: MethodType(even, module)), False),
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REPLACED)
def test_a_child_replaced_afterwards_is_looked_at(
    name: str, compiled: bool, fresh_dynamo: None
) -> None:
    build, replace, fits = REPLACED[name]
    module, x = scramble(build()).double().eval(), images()
    assert row_of(module).status == "accelerated"
    call: Any = torch.compile(module, backend="eager") if compiled else module
    call(x)
    replace(module)
    module.double()
    own = copy.deepcopy(module)
    skt.restore(own)
    torch.testing.assert_close(call(x), own(x), rtol=EXACT, atol=EXACT)
    module(x)
    assert (cast(Accelerated, module)._skt_checked.reason is None) == fits


PATCHED: dict[str, tuple[Callable[[], nn.Module], type, str, Any]] = {
    "forward": (port, rebuilt.SKConv, "forward", lambda self, x: x),
    "method": (port, rebuilt.SKConv, "attention", even),
    "child": (timm_kernel, rebuilt.SelectiveKernelAttn, "forward", OtherAttention.forward),
}


@pytest.mark.parametrize("name", PATCHED)
def test_what_is_patched_on_a_class_afterwards_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, cls, method, patch = PATCHED[name]
    module, x = scramble(build()).double().eval(), images()
    own = copy.deepcopy(module)
    assert row_of(module).status == "accelerated"
    before = module(x)
    monkeypatch.setattr(cls, method, patch)
    assert torch.equal(module(x), own(x))
    assert not torch.equal(module(x), before)


# Maps of several dtypes.

HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "dtypes", [(HALF, SINGLE, HALF), (SINGLE, HALF, HALF), (HALF, SINGLE, SINGLE)]
)
@pytest.mark.parametrize("build", [lambda: rebuilt.SKFF(8), lambda: rebuilt.SKFF(8, leaky=True)])
def test_maps_of_several_dtypes_are_promoted(
    build: Callable[[], nn.Module], dtypes: tuple[torch.dtype, ...]
) -> None:
    module = scramble(build()).eval()
    maps = [torch.randn(2, 8, 5, 4).to(dtype) for dtype in dtypes]
    with torch.autocast("cpu", HALF):
        expected = module(maps)
        skt.accelerate(module)
        actual = module(maps)
    assert actual.dtype == expected.dtype
    # Both weigh with attentions rounded to bfloat16, of which 8 bits are left.
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)


# What does not fit or cannot be compared.


class Conv1dPort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(2))
        self.fc, self.fcs = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


class Decorated(rebuilt.SKConv):
    forward = torch.no_grad()(rebuilt.SKConv.forward)


class PicklesItself(rebuilt.SKConv):
    def __reduce__(self) -> Any:
        return PicklesItself, (8, 4), self.__dict__


def changed(
    change: Callable[[Any], Any], made: Callable[[], nn.Module] = port
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = made()
        change(module)
        return module

    return build


NO_COPY, REPLACED_FC1 = "no copy of it can be made", "the forward of fc1 was replaced on the"
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sigmoid first": (lambda: SKConvWithSigmoid(8, 4), "computes something else"),
    "unknown": (SKAttention, "no known family has its structure"),
    "two outputs": (lambda: TwoOutputs(8, 4), "returns a tuple"),
    "ours": (lambda: skt.SKConv(8, 4, G=2), "computes with the stages already"),
    "1-D": (Conv1dPort, "holds no Conv2d"),
    "pruned": (
        changed(lambda module: cast(Any, prune).l1_unstructured(module.fc2, "weight", 0.5)),
        NO_COPY,
    ),
    "lock": (changed(sets("lock", lambda _: threading.Lock())), NO_COPY),
    "lazy": (
        changed(sets("conv.0.0", lambda _: nn.LazyConv2d(4, 3))),
        "its parameters are UninitializedParameters",
    ),
    "no attn": (changed(sets("attn", lambda _: None), timm_kernel), "its structure cannot be read"),
    "own forward": (
        changed(sets("forward", lambda _: lambda x: x)),
        "its forward was replaced on the instance",
    ),
    # A copy of it would still run the original.
    "partial": (
        changed(sets("fc1.forward", lambda module: partial(module.fc1.forward))),
        REPLACED_FC1,
    ),
    "compiled": (
        changed(sets("fc1", lambda module: torch.compile(module.fc1, backend="eager"))),
        REPLACED_FC1,
    ),
    "decorated": (lambda: Decorated(8, 4), "its forward is decorated"),
    "pickle": (lambda: PicklesItself(8, 4), "it is copied and pickled in a way of its own"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_fit_is_a_row_and_the_others_are_swapped(name: str) -> None:
    build, reason = LEFT[name]
    model = nn.Sequential(rebuilt.SKConv(8, 4), build(), rebuilt.SKFF(8))
    first, middle, last = skt.accelerate(model)
    assert (first.status, middle.status, last.status) == ("accelerated", "left", "accelerated")
    assert reason in middle.reason
    assert type(model[1]) is type(build())


class DoublesEverything(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if isinstance(out, Tensor) and func is torch.stack else out


CONTEXTS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fake tensors": FakeTensorMode,
    "counter": lambda: FlopCounterMode(display=False),
    "function mode": DoublesEverything,
    "anomalies": torch.autograd.detect_anomaly,
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("name", CONTEXTS)
def test_the_callers_context_does_not_matter(name: str) -> None:
    modules: list[nn.Module] = [rebuilt.SKConv(8, 4), rebuilt.CycleMLP(8), rebuilt.SKFF(8)]
    with CONTEXTS[name]():
        assert [row_of(module).status for module in modules] == ["accelerated"] * 3


# The forward's name, signature and arguments; tracing.


class Optional(rebuilt.SKConv):
    def forward(self, x: Tensor, scale: float = 1.0, *, flag: bool = False) -> Tensor:
        """Says what it does."""
        return super().forward(x) * scale + flag


class Annotated(rebuilt.SKFF):
    def forward(self, inp_feats: "list[Tensor]") -> "Tensor":
        """Says what it takes."""
        return super().forward(inp_feats)


@pytest.mark.parametrize(
    "module",
    [Optional(8, 4), rebuilt.SelectiveKernel(8, 4), Annotated(8)],
    ids=lambda m: type(m).__name__,
)
def test_the_forward_keeps_its_name_signature_and_documentation(module: nn.Module) -> None:
    def description() -> tuple[Any, ...]:
        forward = module.forward
        return forward.__name__, forward.__qualname__, inspect.signature(forward), forward.__doc__

    before = description()
    assert row_of(module).status == "accelerated"
    assert description() == before


def test_optional_arguments_bring_the_own_forward() -> None:
    module, x = scramble(Optional(8, 4)).double().eval(), images()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((), {"x": x}),
        ((x, 2.0), {}),
        ((x,), {"flag": True}),
        ((), {"x": x, "scale": 0.5, "flag": True}),
    ]
    expected = [module(*args, **kwargs) for args, kwargs in calls]
    skt.accelerate(module)
    for (args, kwargs), value in zip(calls, expected, strict=True):
        torch.testing.assert_close(module(*args, **kwargs), value, rtol=EXACT, atol=EXACT)
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        module(x, y=1)
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}, "scale": None}
    program = torch.export.export(module, (x, 2.0), dynamic_shapes=sizes)
    torch.testing.assert_close(program.module()(x, 2.0), expected[2], rtol=EXACT, atol=EXACT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.script itself
@pytest.mark.parametrize(
    "build", [port, lambda: rebuilt.SKConvHeads(8, 4), lambda: rebuilt.SKConv(8, 4, M=3)]
)
def test_what_could_be_traced_and_scripted_still_can(build: Callable[[], nn.Module]) -> None:
    model, x = nn.Sequential(scramble(build()), nn.ReLU()).double().eval(), images()
    before: list[Any] = [torch.fx.symbolic_trace(model), torch.jit.script(model)]
    skt.accelerate(model)
    after: list[Any] = [torch.fx.symbolic_trace(model), torch.jit.script(model)]
    assert before[0].code == after[0].code
    assert before[1].code == after[1].code
    assert all(torch.equal(program(x), before[0](x)) for program in (*before, *after))


def compiled_operators(module: nn.Module, inputs: Any) -> list[str]:
    torch._dynamo.reset()
    recorded = EagerAndRecordGraphs()
    torch.compile(module, fullgraph=True, backend=recorded)(inputs)
    graphs = [g for g in recorded.graphs[0].modules() if isinstance(g, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    names = [str(node.target) for node in nodes if node.op.startswith("call")]
    # torch.compile notes what a function asked of it; the note computes nothing.
    return [name for name in names if "_are_functorch_transforms_active" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("stacks", [False, True])
def test_compiled_code_holds_the_stages_where_they_pay_and_the_row_says_where(
    stacks: bool, fresh_dynamo: None
) -> None:
    splits: list[dict[str, Any]] = [{}, {"radix": 1, "groups": 2}, {"one_relu": True}]
    modules: list[nn.Module] = [rebuilt.SplitAttn(8, 4, **options) for options in splits]
    if stacks:
        modules = [rebuilt.SelectiveKernel(8, 4), port(), rebuilt.SKFF(8)]
    for module in modules:
        x: Any = images().float()
        inputs = [x, x + 1, x * 2] if isinstance(module, rebuilt.SKFF) else x
        own = compiled_operators(module, inputs)
        remark = row_of(module).reason
        assert remark == ("" if stacks else "its own forward under torch.compile without kernels")
        for each in (module, copy.deepcopy(module)):
            assert (compiled_operators(each, inputs) == own) != stacks
            with skt.use_backend("triton"):
                called = compiled_operators(each, inputs)
            assert any(name.startswith("sknet_triton.") for name in called)


@pytest.mark.parametrize("threshold", [31, 47])
def test_a_garbage_collection_in_between_is_not_its_doing(threshold: int) -> None:
    called, thresholds = lambda phase, info: time.perf_counter(), gc.get_threshold()
    gc.callbacks.append(called)
    gc.set_threshold(threshold)
    try:
        rows = [row_of(rebuilt.SplitAttn(8, 4)), row_of(rebuilt.SKFF(4, 3))]
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(called)
    assert [row.status for row in rows] == ["accelerated"] * 2, rows
    assert gc.isenabled()


# Tools that look at a module, rebuild it, or put something in its place.


@pytest.mark.parametrize("full", [True, False], ids=["full", "not full"])
@pytest.mark.parametrize("build", [timm_kernel, lambda: rebuilt.SplitAttn(8, 4), port])
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_a_backward_hook_anywhere_sees_what_it_saw(
    build: Callable[[], nn.Module], full: bool
) -> None:
    own = scramble(build()).double()
    for module in own.modules():
        # Until they copy, torch refuses the hook at a ReLU that works in place.
        if isinstance(module, nn.ReLU):
            module.inplace = False
    for path, _ in own.named_modules():
        torch.manual_seed(0)
        x, grads = images().requires_grad_(), list[list[Any]]()
        for module in (copy.deepcopy(own), copy.deepcopy(own)):
            if grads:
                skt.accelerate(module)
            seen: list[Any] = []
            register = "register_full_backward_hook" if full else "register_backward_hook"
            getattr(module.get_submodule(path), register)(
                lambda _, *both, seen=seen: seen.extend([*both[0], *both[1]])
            )
            (x.grad,) = torch.autograd.grad(module(x).square().sum(), x)
            grads.append([*seen, x.grad])
        torch.testing.assert_close(grads[1], grads[0], rtol=EXACT, atol=EXACT, msg=path)


def wrapped(module: nn.Module) -> nn.Module:
    """Returns what DeepSpeed puts on top of a module: a subclass that takes its attributes over."""
    cls: Any = type("Wrapped", (type(module),), {"marked": True})
    made: nn.Module = cls.__new__(cls)
    made.__dict__ = module.__dict__.copy()
    return made


def made_anew(module: nn.Module) -> nn.Module:
    """Returns another instance of its class with its parts, as layers that are cloned."""
    new: nn.Module = type(module).__new__(type(module))
    nn.Module.__init__(new)
    new.__dict__.update((k, v) for k, v in vars(module).items() if not k.startswith("_skt_"))
    return new


def replica(module: Any) -> nn.Module:
    """Returns what DataParallel makes of a module for another device."""
    twin = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(twin, name, None if parameter is None else 2 * parameter)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else replica(child)
    return cast(nn.Module, twin)


def with_adapters(module: nn.Module) -> nn.Module:
    """Puts a module in the place of some convolutions that has them inside, as adapters do."""
    torch.manual_seed(0)
    for path, child in list(module.named_modules()):
        if isinstance(child, nn.Conv2d) and child.dilation == (1, 1):
            parent, _, name = path.rpartition(".")
            adapted = nn.Sequential(child, nn.Conv2d(child.out_channels, child.out_channels, 1))
            module.get_submodule(parent).add_module(name, adapted.double())
    return module


class SyncBatchNormAct(nn.SyncBatchNorm):
    """timm's, which its own conversion makes of a batch norm with its activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = cast(Any, self).act(super().forward(x))
        return out


def synced(module: nn.Module) -> nn.Module:
    for norm in cast(Any, module).modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.__class__ = SyncBatchNormAct if hasattr(norm, "act") else nn.SyncBatchNorm  # type: ignore[assignment]  # as timm's conversion does
            cast(Any, norm).process_group = None
    return module


REBUILT: dict[str, tuple[Callable[[Any], nn.Module], bool]] = {
    "DeepSpeed": (wrapped, True),
    "copy of DeepSpeed": (lambda module: copy.deepcopy(wrapped(module)), True),
    "made anew": (made_anew, False),
    "replica": (replica, True),
    "adapters": (with_adapters, True),
    "SyncBatchNorm": (synced, True),
}


@pytest.mark.parametrize("name", REBUILT)
@pytest.mark.parametrize(
    "build", [lambda: rebuilt.SplitAttn(8, 4), port, lambda: rebuilt.SKConvHeads(8, 4)]
)
def test_what_is_made_of_an_accelerated_module_computes_the_same(
    build: Callable[[], nn.Module], name: str
) -> None:
    change, fits = REBUILT[name]
    own, x = scramble(build()).double(), images()
    module = copy.deepcopy(own)
    skt.accelerate(module)
    own, module = change(own), change(module)
    torch.testing.assert_close(module(x), own(x), rtol=EXACT, atol=EXACT)
    assert (cast(Accelerated, module)._skt_checked.reason is None) == fits
    assert hasattr(module, "marked") == ("DeepSpeed" in name)


@needs_gloo
@pytest.mark.parametrize("build", [port, timm_kernel])
def test_statistics_of_several_processes_are_no_hindrance(
    build: Callable[[], nn.Module], one_process: None
) -> None:
    module = synced(build())
    assert row_of(module).status == "accelerated"
    for norm in cast(Any, module).modules():
        if isinstance(norm, nn.SyncBatchNorm):
            norm.process_group = SimpleNamespace(size=lambda: 2)
            assert cast(Any, parts.group_of(norm)) is norm.process_group


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_may_be_pruned_away_from_skconv(backend: Backend) -> None:
    narrow: Any = scramble(skt.SKConv(8, 4, G=1)).double()
    module, x = skt.SKConv(8, 8, G=1), images()
    # Pruning replaces what has weights, and knows no other attribute.
    for name in ("branches", "fc1", "fc2"):
        setattr(module, name, getattr(narrow, name))
    with skt.use_backend(backend):
        assert torch.equal(module(x), narrow(x))


# restore, and what was put on top.


@pytest.fixture
def blend(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(family, "_known", dict(family._known))
    skt.register_family(blend_family())
    return Blend()


def test_a_registered_family_is_pickled_by_name(blend: nn.Module) -> None:
    assert row_of(blend).status == "accelerated"
    saved = pickle.dumps(nn.Sequential(blend))
    a, b = torch.randn(2, 2, 4, 3, 3)
    assert torch.equal(pickle.loads(saved)[0](a, b), blend(a, b))
    assert torch.equal(copy.deepcopy(blend)(a, b), blend(a, b))
    unregister_family("Blend")
    with pytest.raises(ValueError, match="got 'Blend'; register_family adds a family"):
        pickle.loads(saved)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("when", ["before restore", "after restore"])
def test_a_parametrization_on_top_stays(blend: nn.Module, when: str) -> None:
    skt.accelerate(blend)
    parametrize.register_parametrization(blend, "scale", Doubled())
    a, b = torch.randn(2, 2, 4, 3, 3)
    expected = blend(a, b)
    if when == "after restore":
        skt.restore(blend)
        assert isinstance(blend, Blend)
        assert not isinstance(blend, Accelerated)
        assert parametrize.is_parametrized(blend, "scale")
        torch.testing.assert_close(blend(a, b), expected)
    parametrize.remove_parametrizations(blend, "scale")
    torch.testing.assert_close(blend(a, b), expected)
    assert isinstance(blend, Accelerated) == (when == "before restore")


def test_a_parametrized_module_is_left_and_a_parametrized_child_not(blend: nn.Module) -> None:
    parametrize.register_parametrization(blend, "scale", Doubled())
    assert "it is parametrized itself" in row_of(blend).reason
    module = rebuilt.SKConv(8, 4)
    parametrizations.weight_norm(module.fc2)
    assert row_of(module).status == "accelerated"


@needs_gloo
def test_fully_shard_on_top_stays(one_process: None) -> None:
    module, x = scramble(rebuilt.SKConv(8, 4)), torch.randn(2, 8, 5, 4)
    skt.accelerate(module)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    expected = module(x)
    skt.restore(module)
    assert isinstance(module, FSDPModule)
    assert not isinstance(module, Accelerated)
    out = module(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert type(module).__name__ == "FSDPSKConv"


def test_in_place_changes_are_named_by_autograd() -> None:
    module = rebuilt.SKFF(8)
    skt.accelerate(module)
    maps = [torch.randn(2, 8, 5, 4, requires_grad=True) * 1 for _ in range(3)]
    out = module(maps)
    maps[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_profiler_of_the_caller_is_put_back() -> None:
    events: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        events.append(event)

    sys.setprofile(profile)
    try:
        skt.accelerate(rebuilt.SKConv(8, 4))
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert events
