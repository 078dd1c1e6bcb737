"""The launches to compile ahead of time: every kernel, as a call with real shapes makes it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from sknet_kernels import arguments
from sknet_kernels import launch as launching
from sknet_kernels.config import MAX_BRANCHES, STREAMING_KERNELS, DeviceFacts, StreamingKernel
from sknet_kernels.launch import Launch
from sknet_kernels.norms import Norms, Running
from sknet_kernels.sk_fuse import sk_fuse_fwd, sk_fuse_partials
from sknet_kernels.sk_fuse_mlp import sk_channels_bwd, sk_hidden, sk_hidden_bwd, sk_logits
from sknet_kernels.sk_fuse_select import sk_fuse_select_dx, sk_fuse_select_sums
from sknet_kernels.sk_moments import sk_moments
from sknet_kernels.sk_select import sk_select_bwd, sk_select_fwd

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
    def is_fast(self) -> bool:
        """Whether every access to a branch must be 16 bytes wide."""
        return self.is_usual and self.shape == FAST_SHAPE

    @property
    def is_usual(self) -> bool:
        """Whether branches are as networks have them, two in bfloat16."""
        return (self.M, self.dtype) == (2, torch.bfloat16)

    @property
    def has_short_rows(self) -> bool:
        """Whether rows of positions do not fill a tile, which are read in ways of their own."""
        return self.layout == "contiguous" and self.shape[2] in SHORT_ROWS

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

    def telling(self, facts: DeviceFacts) -> list[Launch]:
        """Returns of the launches those whose kernels differ from the others' by more than a tile.

        With the fast shape these are all, or a training step's where branches are not the usual or
        the most; of short rows it is a training step's of the larger batch.
        """
        if self.shape == FAST_SHAPE:
            most = self.is_usual or self.M == MAX_BRANCHES
            return self.launches(facts) if most else self.training(facts)
        tells = self.is_usual and self.has_short_rows and self.shape[0] == BATCHES[-1]
        return self.training(facts) if tells else []

    def at_risk(self, facts: DeviceFacts, modelled: bool) -> list[Launch]:
        """Returns of the launches those that a change of tiles or compilers breaks first.

        These are all of the fast shape with two branches, and a training step's of it with the
        most; where ``modelled``, a training step's of every setting but float16's, which is
        bfloat16's but for a conversion.
        """
        if self.shape == FAST_SHAPE and self.is_usual:
            return self.launches(facts)
        most = self.shape == FAST_SHAPE and self.M == MAX_BRANCHES
        tells = modelled and self.dtype != torch.float16
        return self.training(facts) if tells or most else []

    def launches(self, facts: DeviceFacts) -> list[Launch]:
        """Returns what training launches and what inference and the stages by themselves launch."""
        with recorded(facts) as launches:
            _stages(self)
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

    arguments._configuration.cache_clear()
    with (
        mock.patch.object(DeviceFacts, "of", return_value=facts),
        mock.patch.object(launching, "_PLANS", {}),
        mock.patch.object(launching, "_compiled", compiled),
        mock.patch.object(launching, "current", return_value=nullcontext()),
    ):
        yield launches
    arguments._configuration.cache_clear()


def _stages(setting: Setting) -> None:
    """The stages by themselves, on branches that are activated already."""
    xs, (B, C, _) = setting.branches(), setting.shape
    logits = torch.empty(B, setting.M, C, dtype=setting.dtype, device=setting.device)
    sk_fuse_fwd(xs)
    sk_select_fwd(setting.branch(), xs, logits)
    sk_select_bwd(setting.branches(), setting.branch(), xs, logits)


def _fuse_select(setting: Setting, batch_stats: bool) -> None:
    """Everything between the convolutions and V, forward and backward."""
    xs, out, (_, C, S), M = setting.branches(), setting.branch(), setting.shape, setting.M
    d = max(32, C // _REDUCTION)

    def vectors(*sizes: int) -> tuple[Tensor, ...]:
        return tuple(torch.empty(size, device=setting.device) for size in sizes)

    def running(n: int, size: int) -> Running:
        tracked = tuple(torch.empty((), dtype=torch.int64, device=setting.device) for _ in range(n))
        return Running(vectors(*[size] * n), vectors(*[size] * n), tracked, 0.1)

    if batch_stats:
        (mean, var), _ = sk_moments(xs, running(M, C))
    else:
        mean, var = torch.empty(2, M, C, device=setting.device)
    norms = Norms(tuple(mean), tuple(var), vectors(*[C] * M), vectors(*[C] * M), 1e-5)
    fc1_norm = Norms(vectors(d), vectors(d), vectors(d), vectors(d), 1e-5)
    given = fc1_norm._replace(mean=(None,), var=(None,)) if batch_stats else fc1_norm
    fc1, fc2 = (
        torch.empty(d, C, device=setting.device),
        torch.empty(M * C, d, device=setting.device),
    )

    pooled, hidden = sk_hidden(sk_fuse_partials(xs, norms), S, fc1, None)
    logits, _, _ = sk_logits(hidden, given, fc2, None, M, running(1, d) if batch_stats else None)
    sk_select_fwd(out, xs, logits, norms)
    partials = sk_fuse_select_sums(out, xs, norms)
    sums, dlogits, dz = sk_hidden_bwd(partials, logits, norms, fc2)
    small = (sums, dlogits, dz, logits, pooled, hidden, norms, fc1_norm, fc1, None, fc2, None)
    gradients = sk_channels_bwd(*small, S, batch_stats, batch_stats)
    dxs = setting.branches()
    sk_fuse_select_dx(dxs, out, xs, norms, logits, gradients.share, gradients.drift)
