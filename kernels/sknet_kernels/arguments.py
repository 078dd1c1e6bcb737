"""What every launcher derives from its tensors."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sknet_kernels.config import DeviceFacts, LaunchConfig, Problem, Stage, cdiv
from sknet_kernels.launch import Launch, Pointer, remembered
from sknet_kernels.layout import is_channels_last
from sknet_kernels.norms import Norms

_ACCESS_BYTES = 16
# Pointers to tensors [B, C, S], in the order in which kernels number their strides.
_FULL_SIZE = ("x_ptrs", "out_ptr", "dout_ptr", "dx_ptrs")


def problem_of(xs: Sequence[Tensor]) -> Problem:
    """Returns the sizes that launch configurations depend on, for branches [B, C, S]."""
    first = xs[0]
    B, C, S = first.shape
    align = common_alignment(xs, is_channels_last(first))
    return Problem(B, C, S, len(xs), first.element_size(), is_channels_last(first), align)


def common_alignment(tensors: Sequence[Tensor], channels_last: bool) -> int:
    """Returns the elements of [B, C, S] that can be read at once: a power of two, 16 bytes at most.

    It divides the size of the axis along which elements lie side by side, C with ``channels_last``
    and S else, and every stride but that of this axis.
    """
    side, across = (1, 2) if channels_last else (2, 1)
    divisor = _ACCESS_BYTES // tensors[0].element_size()
    for x in tensors:
        divisor = math.gcd(divisor, x.shape[side], x.stride(0), x.stride(across))
    return divisor


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    """Returns the dtype that sums are kept in, as torch and as Triton name it."""
    if dtype == torch.float64:
        return torch.float64, tl.float64
    return torch.float32, tl.float32


def configuration(stage: Stage, xs: Sequence[Tensor], config: LaunchConfig | None) -> LaunchConfig:
    """Returns ``config``, or where it is None what suits the branches ``xs`` [B, C, S]."""
    if config is not None:
        return config

    def find() -> LaunchConfig:
        strides = tuple(x.stride() for x in xs)
        return _configuration(stage, xs[0].shape, strides, xs[0].dtype, xs[0].device)

    return remembered(stage, find)


@functools.lru_cache(maxsize=4096)
def _configuration(
    stage: Stage,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> LaunchConfig:
    xs = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for stride in strides]
    return LaunchConfig.from_heuristic(stage, problem_of(xs), DeviceFacts.of(device))


def norm_pointers(norms: Norms | None) -> tuple[Pointer, Pointer, Pointer, Pointer]:
    """Returns mean, var, gamma and beta as kernels take them, four times None without norms."""
    return (None, None, None, None) if norms is None else norms[:4]


def streaming_launch(
    kernel: Any,
    pointers: Sequence[Pointer],
    *,
    stage: Stage,
    config: LaunchConfig | None,
    **constants: Any,
) -> Launch:
    """Returns the launch of a kernel that reads branches ``x_ptrs`` [B, C, S] tile by tile.

    Args:
        kernel: takes ``pointers`` first. Of what follows here it takes what its signature names:
            ``strides`` of the full-size tensors in the order of `_FULL_SIZE`; ``logits_strides``;
            ``B``, ``C``, ``S``; ``splits`` of ``tiles`` tiles each; constants.
        pointers: as `Launch` has them.
        stage: whose configuration is taken where ``config`` is None.
        config: tile sizes and splits.
        constants: whatever else the kernel takes.
    """
    named = dict(zip(kernel.arg_names, pointers, strict=False))
    full_size = [x for name in _FULL_SIZE if name in named for x in _as_tuple(named[name])]
    xs = _as_tuple(named["x_ptrs"])
    problem = problem_of(xs)
    config = configuration(stage, xs, config)
    align = common_alignment(full_size, problem.channels_last)
    values: dict[str, Any] = {
        "strides": _strides(full_size),
        "B": problem.B,
        "C": problem.C,
        "S": problem.S,
        "tiles": cdiv(stage.tiles(problem, config), config.splits),
        "splits": config.splits,
    }
    if "logits_ptr" in named:
        values["logits_strides"] = _as_tuple(named["logits_ptr"])[0].stride()
    known = {
        "NUM_BRANCHES": problem.num_branches,
        "HAS_NORM": named.get("mean_ptrs") is not None,
        "ACC": accumulator(xs[0].dtype)[1],
        "ALIGN": min(align, config.access),
        "CHANNELS_LAST": problem.channels_last,
        "BLOCK_C": config.block_c,
        "BLOCK_S": config.block_s,
        "NUM_STAGES": config.num_stages,
        **constants,
    }
    rest = kernel.arg_names[len(pointers) :]
    return Launch(
        kernel=kernel,
        programs=stage.rows(problem, config) * config.splits,
        pointers=named,
        scalars={name: values[name] for name in rest if name in values},
        constants={name: known[name] for name in rest if name in known},
        num_warps=config.num_warps,
    )


def _as_tuple(pointer: Pointer) -> tuple[Any, ...]:
    return pointer if isinstance(pointer, tuple) else (pointer,)


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Returns the strides of every tensor, or of one alone where all have the same."""
    strides = tuple(x.stride() for x in tensors)
    return strides[:1] if len(set(strides)) == 1 else strides
