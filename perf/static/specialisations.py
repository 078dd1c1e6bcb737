"""The launches to compile ahead of time: every kernel, as a call with real shapes makes it."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sknet_kernels import arguments, tuned
from sknet_kernels import launch as launching
from sknet_kernels.config import MAX_BRANCHES, STREAMING_KERNELS, DeviceFacts, StreamingKernel
from sknet_kernels.launch import Launch
from sknet_kernels.norms import Norms, Running
from sknet_kernels.sk_fuse import sk_fuse_fwd
from sknet_kernels.sk_select import sk_select_bwd, sk_select_fwd
from sknet_triton import ops, reference
from sknet_triton.reference.steps import Steps

LAYOUTS = ("contiguous", "channels_last")
# Channels and positions of SKNet-50's stages at 224 x 224.
NETWORK_STAGES = ((128, 3136), (256, 784), (512, 196), (1024, 49))
BATCHES = (32, 128)
SHORT_ROWS = (196, 49)
# Whose rows are aligned in both layouts.
FAST_SHAPE = (128, 128, 3136)
_REDUCTION = 16


@dataclass(frozen=True)
class Setting:
    """M branches [B, C, S] of one dtype and layout; a layout is as memory formats are called.

    On the device "meta" they have no memory.
    """

    M: int
    layout: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    device: str | torch.device = "meta"

    @property
    def is_usual(self) -> bool:
        """Whether branches are as networks have them, two in bfloat16."""
        return (self.M, self.dtype) == (2, torch.bfloat16)

    @property
    def is_fast(self) -> bool:
        """Whether every access to a branch must be 16 bytes wide."""
        return self.is_usual and self.shape == FAST_SHAPE

    def branch(self) -> Tensor:
        """Returns a branch [B, C, S]."""
        B, C, S = self.shape
        if self.layout == "contiguous":
            return torch.empty(B, C, S, dtype=self.dtype, device=self.device)
        return torch.empty(B, S, C, dtype=self.dtype, device=self.device).transpose(1, 2)

    def branches(self) -> tuple[Tensor, ...]:
        """Returns M of them."""
        return tuple(self.branch() for _ in range(self.M))

    def training(self, facts: DeviceFacts) -> list[Launch]:
        """Returns the launches of `sk_fuse_select` in a training step on a device of ``facts``."""
        with recorded(facts) as launches:
            _fuse_select(self, batch_stats=True)
        return launches

    def launches(self, facts: DeviceFacts) -> list[Launch]:
        """Returns what training launches and what inference and the stages by themselves launch."""
        with recorded(facts) as launches:
            given = inputs(self)
            given["logits"] = given["logits"].to(self.dtype)
            for stage in ("sk_fuse", "sk_select", "sk_select_bwd"):
                carried_out(LAUNCHERS, stage, given)
            for batch_stats in (True, False):
                _fuse_select(self, batch_stats)
        return launches


def settings(branches: Sequence[int] = ()) -> Iterator[Setting]:
    """Yields what to compile for: a network's stages, or M of ``branches`` with the fast shape."""
    if branches:
        for layout, M in itertools.product(LAYOUTS, branches):
            yield Setting(M, layout, torch.bfloat16, FAST_SHAPE)
        return
    for layout in LAYOUTS:
        for C, S in NETWORK_STAGES:
            for B in BATCHES:
                yield Setting(2, layout, torch.bfloat16, (B, C, S))
            for M, dtype in ((3, torch.bfloat16), (2, torch.float32), (2, torch.float16)):
                yield Setting(M, layout, dtype, (BATCHES[-1], C, S))
        # As many branches as the kernels take, and sizes of one.
        yield Setting(MAX_BRANCHES, layout, torch.bfloat16, FAST_SHAPE)
    yield Setting(2, "contiguous", torch.bfloat16, (1, 1, 1))


def kernel_name(launch: Launch) -> str:
    """Returns the name of the kernel, as files and figures use it."""
    name: str = launch.kernel.__name__
    return name.strip("_").removesuffix("_kernel")


def streaming_kernel(launch: Launch) -> StreamingKernel | None:
    """Returns what a kernel that reads branches is known as, None of those that do not."""
    return next(
        (kernel for kernel in STREAMING_KERNELS if kernel.name == kernel_name(launch)), None
    )


def streaming_launch(setting: Setting, kernel: str) -> Launch:
    """Returns the launch of ``kernel`` in a training step, on new tensors."""
    launches = setting.training(DeviceFacts.of(torch.device(setting.device)))
    return next(launch for launch in launches if kernel_name(launch) == kernel)


@contextmanager
def recorded(facts: DeviceFacts) -> Iterator[list[Launch]]:
    """Collects launches in place of running them, for a device of ``facts``."""
    launches: list[Launch] = []

    def compiled(first: Launch) -> Callable[..., None]:
        launches.append(first)
        return lambda *pointers: None

    with (
        forgetting_configurations(),
        mock.patch.object(DeviceFacts, "of", return_value=facts),
        mock.patch.object(launching, "_PLANS", {}),
        mock.patch.object(launching, "_compiled", compiled),
        mock.patch.object(launching, "current", return_value=nullcontext()),
    ):
        yield launches


@contextmanager
def forgetting_configurations() -> Iterator[None]:
    """Lets launchers choose anew inside, and again after it."""
    arguments._configuration.cache_clear()
    try:
        yield
    finally:
        arguments._configuration.cache_clear()


@contextmanager
def chosen(own: Mapping[Any, Any]) -> Iterator[dict[Any, Any]]:
    """Lets launchers take the configurations in ``own``, by kernel, and forget them in the end.

    Yields the problems that configurations are asked for, by kernel.
    """
    asked: dict[Any, Any] = {}

    def choice(kernel: Any, problem: Any, facts: DeviceFacts) -> Any:
        asked[kernel] = problem
        return own.get(kernel) or tuned.choice(kernel, problem, facts)

    with (
        forgetting_configurations(),
        mock.patch.object(arguments, "choice", choice),
        mock.patch.object(launching, "_PLANS", {}),
    ):
        yield asked


def inputs(setting: Setting) -> dict[str, Any]:
    """Draws what the steps of `sk_fuse_select` take, by the names of their parameters.

    Without memory where the setting's device is "meta".
    """
    (B, C, S), M, device = setting.shape, setting.M, setting.device
    d = max(32, C // _REDUCTION)

    def norms(count: int, size: int) -> Norms:
        def vectors(least: float, most: float) -> tuple[Tensor, ...]:
            drawn = (torch.empty(size, device=device) for _ in range(count))
            return tuple(x.uniform_(least, most) for x in drawn)

        return Norms(
            vectors(0.25, 0.75), vectors(0.5, 1.5), vectors(0.5, 1.5), vectors(-0.5, 0.5), 1e-5
        )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    return {
        # Away from zero, so that means have digits to be compared by.
        "branches": tuple(x.normal_(0.5) for x in setting.branches()),
        "dout": setting.branch().normal_(),
        "logits": normal(B, M, C),
        "norms": norms(M, C),
        "fc1_weight": normal(d, C),
        "fc1_bias": None,
        "fc1_norm": norms(1, d),
        "fc2_weight": normal(M * C, d),
        "fc2_bias": None,
        "pooled": normal(B, C),
        "hidden": normal(B, d),
        "sums": normal(4, B, M, C),
        "dlogits": normal(B, M, C),
        "dz": normal(B, d),
        "share": normal(B, C) / S,
        "drift": normal(2, M, C) / S,
        "M": M,
        "S": S,
        "batch_stats": True,
        "fc1_batch_stats": True,
    }


def _sk_select(branches: Sequence[Tensor], logits: Tensor) -> Tensor:
    out = torch.empty_like(branches[0])
    sk_select_fwd(out, tuple(branches), logits)
    return out


def _sk_select_bwd(
    dout: Tensor, branches: Sequence[Tensor], logits: Tensor
) -> tuple[list[Tensor], Tensor]:
    dxs = [torch.empty_like(x) for x in branches]
    return dxs, sk_select_bwd(tuple(dxs), dout, tuple(branches), logits)


# The seven steps and the stages by themselves, by Triton's launchers and by formulas.
LAUNCHERS = SimpleNamespace(
    **vars(ops.launchers()),
    sk_fuse=lambda branches: sk_fuse_fwd(branches),
    sk_select=_sk_select,
    sk_select_bwd=_sk_select_bwd,
)
FORMULAS = SimpleNamespace(
    **vars(reference.REFERENCE),
    sk_fuse=reference.sk_fuse,
    sk_select=reference.sk_select,
    sk_select_bwd=reference.sk_select_bwd,
)


def carried_out(steps: Any, step: str, given: Mapping[str, Any]) -> Any:
    """Returns what a step of `LAUNCHERS` or `FORMULAS` makes of what it names of `inputs`."""
    function = getattr(steps, step)
    if step == "logits" and given["fc1_batch_stats"]:
        of_batch = given["fc1_norm"]._replace(mean=(None,), var=(None,))
        given = {**given, "fc1_norm": of_batch, "running": given.get("fc1_running")}
    names = inspect.signature(function).parameters
    return function(**{name: given[name] for name in names if name in given})


def _fuse_select(setting: Setting, batch_stats: bool) -> None:
    """Everything between the convolutions and V, forward and backward."""
    given = inputs(setting) | {"batch_stats": batch_stats, "fc1_batch_stats": batch_stats}
    if batch_stats:
        for name, norms in (("running", given["norms"]), ("fc1_running", given["fc1_norm"])):
            tracked = [torch.zeros_like(x[0], dtype=torch.int64) for x in norms.mean]
            given[name] = Running(norms.mean, norms.var, tuple(tracked), momentum=0.1)
    else:
        given["drift"] = None
    for step in fields(Steps):
        if batch_stats or step.name != "moments":
            carried_out(LAUNCHERS, step.name, given)
