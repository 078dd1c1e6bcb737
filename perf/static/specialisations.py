"""The launches to compile ahead of time: every kernel, as a call with real shapes makes it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sknet_kernels.arguments import problem_of
from sknet_kernels.config import DeviceFacts, LaunchConfig
from sknet_kernels.launch import Launch
from sknet_kernels.sk_fuse import sk_fuse_fwd_launches
from sknet_kernels.sk_fuse_select import (
    NUM_SUMS,
    sk_fuse_select_dx_launch,
    sk_fuse_select_sums_launch,
)
from sknet_kernels.sk_moments import sk_moments_launches
from sknet_kernels.sk_select import sk_select_bwd_launches, sk_select_fwd_launch

# 128 channels of 56 x 56: the first stage at 224 x 224, whose rows are aligned in both layouts.
FAST_SHAPE = (128, 128, 3136)
# What Triton specialises apart: rows aligned to 4 or to nothing, and sizes of one.
OTHER_SHAPES = ((128, 512, 196), (128, 1024, 49), (1, 1, 1))
DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Specialisation:
    """One launch to compile and what it is a launch of."""

    stage: str
    M: int
    layout: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    launch: Launch

    @property
    def splits(self) -> int:
        """Programs that share a row of the branches, or parts that share a channel."""
        arguments = {**self.launch.arguments, **self.launch.constants}
        return int(next(arguments[k] for k in ("splits", "SPLITS", "PARTS") if k in arguments))

    @property
    def is_fast(self) -> bool:
        """Whether every access to a branch must be 16 bytes wide."""
        return self.shape == FAST_SHAPE and self.dtype == torch.bfloat16

    @property
    def is_reduction(self) -> bool:
        """Whether the kernel writes nothing of full size."""
        return self.stage in _REDUCTIONS

    @property
    def is_streaming(self) -> bool:
        """Whether the kernel reads branches, rather than combining partial sums."""
        return "combine" not in self.launch.kernel.__name__


@dataclass(frozen=True)
class _Setting:
    M: int
    layout: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    device: str | torch.device = "meta"

    def branch(self) -> Tensor:
        B, C, S = self.shape
        if self.layout == "contiguous":
            return torch.empty(B, C, S, dtype=self.dtype, device=self.device)
        return torch.empty(B, S, C, dtype=self.dtype, device=self.device).transpose(1, 2)

    def branches(self) -> list[Tensor]:
        return [self.branch() for _ in range(self.M)]

    def pooled(self) -> Tensor:
        return torch.empty(self.shape[:2], dtype=self.dtype, device=self.device)

    def logits(self) -> Tensor:
        B, C, _ = self.shape
        return torch.empty(B, self.M, C, dtype=self.dtype, device=self.device)

    def small(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def norm(self) -> Tensor:
        return self.small(self.M, 4, self.shape[1])


def specialisations(facts: DeviceFacts) -> Iterator[Specialisation]:
    """Yields the launches to compile for a device of ``facts``."""
    for setting in _settings():
        for stage, launches in _STAGES.items():
            for launch in launches(setting, facts):
                yield Specialisation(
                    stage, setting.M, setting.layout, setting.dtype, setting.shape, launch
                )


def streaming_launch(
    stage: str,
    M: int,
    layout: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: torch.device,
) -> Launch:
    """Returns the launch that reads the branches in ``stage``, on new tensors of ``device``."""
    setting = _Setting(M, layout, dtype, shape, device)
    specs = (
        Specialisation(stage, M, layout, dtype, shape, launch)
        for launch in _STAGES[stage](setting, DeviceFacts.of(device))
    )
    return next(spec.launch for spec in specs if spec.is_streaming)


def _settings() -> Iterator[_Setting]:
    for M in (2, 3):
        for layout in LAYOUTS:
            for dtype in DTYPES:
                yield _Setting(M, layout, dtype, FAST_SHAPE)
    for shape in OTHER_SHAPES:
        yield _Setting(2, "contiguous", torch.bfloat16, shape)


def _fuse(setting: _Setting, facts: DeviceFacts) -> list[Launch]:
    xs = setting.branches()
    return [
        launch
        for config in _reductions(xs, facts, sums=1)
        for launch in sk_fuse_fwd_launches(setting.pooled(), xs, config=config)
    ]


def _select(setting: _Setting, facts: DeviceFacts) -> list[Launch]:
    xs = setting.branches()
    config = LaunchConfig.elementwise(problem_of(xs), facts)
    return [sk_select_fwd_launch(setting.branch(), xs, setting.logits(), config=config)]


def _select_bwd(setting: _Setting, facts: DeviceFacts) -> list[Launch]:
    xs, logits = setting.branches(), setting.logits()
    return [
        launch
        for config in _reductions(xs, facts, sums=setting.M)
        for launch in sk_select_bwd_launches(
            setting.branches(), logits, setting.branch(), xs, logits, config
        )
    ]


def _reductions(xs: list[Tensor], facts: DeviceFacts, sums: int) -> list[LaunchConfig]:
    """Returns the configuration whole and split in two, which are different kernels."""
    config = LaunchConfig.reduction(problem_of(xs), facts, sums)
    return [
        LaunchConfig(config.block_c, config.block_s, splits, config.num_warps) for splits in (1, 2)
    ]


def _moments(setting: _Setting, facts: DeviceFacts) -> list[Launch]:
    xs = setting.branches()
    mean, var = setting.small(setting.M, setting.shape[1]), setting.small(*setting.shape[:1])
    return sk_moments_launches(mean, var, xs, LaunchConfig.moments(problem_of(xs), facts))


def _fuse_norm(setting: _Setting, facts: DeviceFacts) -> list[Launch]:
    xs = setting.branches()
    config = LaunchConfig.reduction(problem_of(xs), facts, sums=1)
    pooled = setting.small(*setting.shape[:2])
    return sk_fuse_fwd_launches(pooled, xs, setting.norm(), config)


def _select_norm(setting: _Setting, facts: DeviceFacts) -> list[Launch]:
    xs = setting.branches()
    config = LaunchConfig.elementwise(problem_of(xs), facts)
    return [sk_select_fwd_launch(setting.branch(), xs, setting.logits(), setting.norm(), config)]


def _sums(setting: _Setting, facts: DeviceFacts) -> list[Launch]:
    xs = setting.branches()
    config = LaunchConfig.reduction(problem_of(xs), facts, sums=NUM_SUMS * setting.M)
    return [sk_fuse_select_sums_launch(setting.branch(), xs, setting.norm(), config)]


def _dx(setting: _Setting, facts: DeviceFacts) -> list[Launch]:
    xs, (B, C, _), M = setting.branches(), setting.shape, setting.M
    config = LaunchConfig.elementwise(problem_of(xs), facts)
    return [
        sk_fuse_select_dx_launch(
            setting.branches(),
            setting.branch(),
            xs,
            setting.norm(),
            setting.small(B, M, C),
            setting.small(B, C),
            drift,
            config,
        )
        for drift in (setting.small(M, 2, C), None)
    ]


_REDUCTIONS = frozenset({"sk_fuse", "sk_moments", "sk_fuse_norm", "sk_fuse_select_sums"})

_STAGES: dict[str, Callable[[_Setting, DeviceFacts], list[Launch]]] = {
    "sk_fuse": _fuse,
    "sk_select": _select,
    "sk_select_bwd": _select_bwd,
    "sk_moments": _moments,
    "sk_fuse_norm": _fuse_norm,
    "sk_select_norm": _select_norm,
    "sk_fuse_select_sums": _sums,
    "sk_fuse_select_dx": _dx,
}
