"""Devices: tensors without memory, CPUs beside GPUs, the current device, streams, CUDA graphs.

What needs a GPU is marked so. That nothing waits for a device is shown without one: tensors on
the device "meta" hold no values, so that nobody can read one.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sknet_kernels import launch as launching
from sknet_kernels.launch import Launch, launch, planned
from sknet_triton import functional, use_backend
from sknet_triton.backend import Backend
from sknet_triton.reference.steps import Steps
from tests.helpers import (
    BACKENDS,
    DEVICE,
    Seen,
    assert_same,
    call_one_by_one,
    images,
    laid_out,
    outcome,
    small_conv,
    small_network,
    state_of,
)
from tests.plain_sknet import for_norms

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


# --- everything there is to run -----------------------------------------------------------------


class Stages(nn.Module):
    """fuse and select as functions, with the pooled sum for logits."""

    def __init__(self, activation: functional.Activation | None, **factory: Any) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(1, 1, 1, 1, **factory))

    def forward(self, x: Tensor) -> Tensor:
        branches = [x * self.weight, x.flip(0), x.flip(1)]
        pooled = functional.sk_fuse(branches)
        logits = torch.stack([pooled, -pooled, 2 * pooled], 1)
        return functional.sk_select(branches, logits, activation=self.activation)


def synced(**factory: Any) -> nn.Module:
    """In one process: `sk_fuse_select` in plain PyTorch too."""
    return cast(
        nn.Module, cast(Any, nn.SyncBatchNorm).convert_sync_batchnorm(small_conv(**factory))
    )


@dataclass(frozen=True)
class Path:
    """A module and the layout of its input [3, 4, height, width]."""

    build: Callable[..., nn.Module]
    layout: str = "contiguous"
    size: tuple[int, int] = (5, 4)
    training: bool = True

    def module(self, device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Module:
        return self.build(device=device, dtype=dtype).train(self.training)

    def x(self, device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        return laid_out(images(3, self.size, seed).to(device, dtype), self.layout)

    def step(self, device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 1) -> Seen:
        """Returns the outcome of one step of a new module."""
        module = self.module(device, dtype)
        return outcome(module, module, self.x(device, dtype, seed))


PATHS = {
    "stages": Path(partial(Stages, "softmax")),
    "stages sigmoid": Path(partial(Stages, "sigmoid"), "channels_last"),
    "stages none cropped": Path(partial(Stages, None), "cropped"),
    "SKConv": Path(small_conv),
    "SKConv eval": Path(small_conv, training=False),
    "SKConv channels_last M3": Path(partial(small_conv, M=3), "channels_last"),
    "SKConv hooked": Path(lambda **factory: call_one_by_one(small_conv(**factory))),
    "SKConv synced": Path(synced),
    "SKConv layer": Path(partial(small_conv, fc_norm="layer")),
    "SKNet": Path(small_network, size=(16, 12)),
    "SKNet eval": Path(small_network, size=(16, 12), training=False),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
on_both = pytest.mark.parametrize("chosen", BACKENDS)


def kinds(tensors: Seen) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}


# --- tensors without memory ---------------------------------------------------------------------

CPU, META = torch.device("cpu"), torch.device("meta")


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_meta_tensors_tell_what_a_step_would_give(path: Path, dtype: torch.dtype) -> None:
    with use_backend("auto"):
        seen, expected = (path.step(device, dtype) for device in (META, CPU))
    assert {t.device.type for t in seen.values()} == {"meta"}
    assert kinds(seen) == kinds(expected)  # torch's convolution loses its layout on this device


@every_path
@on_both
def test_fake_tensors_tell_what_a_step_would_give(path: Path, chosen: Backend) -> None:
    with use_backend(chosen):
        expected = path.step(DEVICE, torch.float32)
        with FakeTensorMode():
            seen = path.step(DEVICE, torch.float32)
    assert kinds(seen) == kinds(expected)
    assert all(seen[name].stride() == t.stride() for name, t in expected.items())


# --- nothing waits for a device -----------------------------------------------------------------

aten = torch.ops.aten
# They bring a value from the device, or need one to know the size of their result.
WAITING = {
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select),
    *(aten._unique2, aten.unique_consecutive, aten.bincount),
}
OPERATORS = ("sk_fuse", "sk_select", "sk_select_bwd", *(f"sk_{s.name}" for s in fields(Steps)))


class NoSynchronisation(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own hook
    """Fails where an operator would wait for the device, inside of our own operators too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.ours: Counter[str] = Counter()
        self.bodies = {
            getattr(torch.ops.sknet_triton, name).default: OPDEFS[f"sknet_triton::{name}"]._init_fn
            for name in OPERATORS
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        assert packet not in WAITING, f"{func} waits for the device"
        if packet is aten._to_copy:
            device = kwargs.get("device") or args[0].device
            assert device == args[0].device, f"{func} from {args[0].device} to {device}"
        if packet is aten.copy_:
            assert args[0].device == args[1].device, f"{func} to {args[0].device}"
        if packet is aten.index:  # of a mask, whose true elements are counted
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} of a mask"
        with self:
            if func in self.bodies:
                self.ours[packet.__name__] += 1
                return self.bodies[func](*args, **kwargs)
            parts = func.decompose(*args, **kwargs)  # as autograd would, which is past in a body
        return func(*args, **kwargs) if parts is NotImplemented else parts


@contextmanager
def refusing_to_wait() -> Iterator[NoSynchronisation]:
    def refused(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a tensor made of the host's values waits for the copy")

    with pytest.MonkeyPatch.context() as patch, NoSynchronisation() as mode:
        patch.setattr(torch, "tensor", refused)
        patch.setattr(torch, "as_tensor", refused)
        yield mode


@pytest.fixture
def kernels_for_meta(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Sends tensors without memory along the way of those on a GPU; counts the launches."""
    counts: Counter[str] = Counter()

    def counted(first: Launch) -> Callable[..., None]:
        def again(*pointers: Any) -> None:
            counts[first.kernel.__name__] += 1

        again()
        return again

    monkeypatch.setattr(launching, "_PLANS", {})
    monkeypatch.setattr(launching, "_compiled", counted)
    monkeypatch.setattr(launching, "current", lambda device: nullcontext())
    for stem in ("backend", "ops.sk_fuse", "ops.sk_select", "ops.steps"):
        module = importlib.import_module(f"sknet_triton.{stem}")
        monkeypatch.setattr(module, "has_kernels", lambda _: True)
    return counts


@every_path
@on_both
def test_no_step_waits_for_the_device(
    path: Path, chosen: Backend, kernels_for_meta: Counter[str]
) -> None:
    module, x = path.module(META), path.x(META)
    with use_backend(chosen), refusing_to_wait() as mode:
        outcome(module, module, x)
    assert (mode.ours.total() > 0) == (chosen == "triton")
    assert (kernels_for_meta.total() > 0) == (chosen == "triton")


def test_the_cumulative_average_waits_for_nothing_on_the_kernels(
    kernels_for_meta: Counter[str],
) -> None:
    # torch's own batch norm with momentum None reads its counter.
    module, x = small_conv(device=META), images(device=META)
    for_norms(lambda bn: setattr(bn, "momentum", None))(module)
    with use_backend("triton"), refusing_to_wait():
        outcome(module, module, x)
    assert kernels_for_meta["_sk_moments_kernel"] == 1
    with use_backend("reference"), refusing_to_wait(), pytest.raises(AssertionError):
        module(x)


WAITERS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: bool((x > 0).any()),
    "list": lambda x: x.sum().tolist(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: cast(Any, x).unique(),
    "to the CPU": lambda x: x.cpu(),
    "from the CPU": lambda x: torch.zeros(1).to(x.device),
    "made on the CPU": lambda x: torch.tensor([1.0], device=x.device),
    "copied to the CPU": lambda x: torch.zeros(x.shape).copy_(x),
}


@pytest.mark.parametrize("name", WAITERS)
def test_what_waits_would_be_seen(name: str) -> None:
    x = torch.ones(3, device=META)
    with refusing_to_wait(), pytest.raises(AssertionError):
        WAITERS[name](x)


# --- a GPU --------------------------------------------------------------------------------------


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@every_path
@on_both
def test_no_step_waits_for_a_gpu(path: Path, chosen: Backend) -> None:
    module, x = path.module(DEVICE), path.x(DEVICE)
    with use_backend(chosen):
        outcome(module, module, x)  # compiles the kernels
        with waiting_is_an_error():
            outcome(module, module, x)


@pytest.mark.gpu
def test_waiting_for_a_gpu_would_be_seen() -> None:
    x = torch.ones(3, device=DEVICE)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.gpu
@two_gpus
@every_path
@on_both
def test_tensors_on_a_device_that_is_not_the_current_one(path: Path, chosen: Backend) -> None:
    current, other = torch.device("cuda:0"), torch.device("cuda:1")
    with use_backend(chosen), torch.cuda.device(current):
        expected, seen = path.step(current), path.step(other)
        assert torch.cuda.current_device() == 0
    assert {t.device for t in seen.values()} == {other}
    assert_same(seen, expected)


@pytest.mark.gpu
@every_path
@on_both
def test_work_stays_on_the_stream_that_it_was_called_on(path: Path, chosen: Backend) -> None:
    with use_backend(chosen):
        expected = path.step(DEVICE)
        module, x = path.module(DEVICE), path.x(DEVICE)
        value, stream = x.clone(), cast(Any, torch.cuda).Stream()
        x.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The input comes late: whoever does not wait on this stream reads zeros.
            cast(Any, torch.cuda)._sleep(50_000_000)
            x.copy_(value)
            seen = outcome(module, module, x)
        torch.cuda.synchronize()
    assert_same(seen, expected)


def train_step(module: nn.Module, x: Tensor) -> None:
    torch.autograd.backward(module(x).square().mean())
    with torch.no_grad():
        for p in module.parameters():
            p.sub_(cast(Tensor, p.grad), alpha=0.05)


def captured(
    call: Callable[[nn.Module, Tensor], Any], fresh: nn.Module, module: nn.Module, x: Tensor
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures a call, after the same of a fresh module: inside of it nothing may be compiled."""
    stream = cast(Any, torch.cuda).Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(fresh, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(module, x)
    return graph, out


@pytest.mark.gpu
@every_path
@on_both
def test_inference_and_a_training_step_in_cuda_graphs(path: Path, chosen: Backend) -> None:
    module, twin, x = path.module(DEVICE), path.module(DEVICE), path.x(DEVICE)
    with use_backend(chosen):
        graph, _ = captured(train_step, path.module(DEVICE), module, x)
        for seed in (5, 6, 7):
            x.copy_(path.x(DEVICE, seed=seed))
            graph.replay()
            twin.zero_grad()
            train_step(twin, x)
            assert_same(state_of(module), state_of(twin))
        with torch.no_grad():
            module.eval()
            graph, out = captured(lambda m, x: m(x), module, module, x)
            for seed in (5, 6):
                x.copy_(path.x(DEVICE, seed=seed))
                graph.replay()
                assert_same({"out": out}, {"out": module(x)})


@pytest.mark.gpu
@pytest.mark.parametrize("path", [PATHS[n] for n in ("SKConv", "SKConv layer", "SKNet")])
@on_both
def test_a_graphed_callable(path: Path, chosen: Backend) -> None:
    module, twin, x = path.module(DEVICE), path.module(DEVICE), path.x(DEVICE).requires_grad_()
    with use_backend(chosen):
        graphed = cast(Any, torch.cuda).make_graphed_callables(module, (x,))
        twin.load_state_dict(module.state_dict())  # graphing has run a few steps of its own
        for seed in (5, 6):
            module.zero_grad()
            twin.zero_grad()
            other = path.x(DEVICE, seed=seed)
            assert_same(outcome(graphed, module, other), outcome(twin, twin, other))


class OnTheSecondGpu(Tensor):
    """Says that it is on a device that is not the current one."""

    device = torch.device("cuda", 1)


@pytest.mark.parametrize("planned_before", [False, True], ids=["alone", "in a plan"])
def test_a_launch_is_made_under_the_device_of_its_tensors(
    planned_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, seen = [0], list[int]()

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen.index)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *pointers, **arguments: seen.append(current[-1])

    def build(x: Tensor) -> Launch:
        return Launch(Kernel(), 3, {"x_ptr": x}, {"n": 1}, {"BLOCK": 8}, num_warps=2)

    module = SimpleNamespace(device=device, current_device=lambda: current[-1])
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    x = torch.zeros(1).as_subclass(OnTheSecondGpu)
    for _ in range(2):  # the second launch is remembered
        with planned("a key", x.device) if planned_before else nullcontext():
            launch(build, x)
    assert seen == [1, 1]
    assert current == [0]
