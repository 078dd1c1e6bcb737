"""What every launcher derives from its tensors."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sknet_kernels.config import (
    DeviceFacts,
    LaunchConfig,
    Problem,
    StreamingKernel,
    cdiv,
    most_registers,
)
from sknet_kernels.launch import Launch, Pointer, remembered
from sknet_kernels.layout import as_bcs, is_channels_last
from sknet_kernels.norms import Norms
from sknet_kernels.small import SmallConfig, SmallKernel, SmallProblem
from sknet_kernels.tuned import choice

_ACCESS_BYTES = 16
# Rows whose own alignment allows less are read along with their neighbours' ends.
_LEAST_ACCESS_BYTES = 8
# Pointers to tensors [B, C, *spatial], in the order in which kernels number their strides.
_FULL_SIZE = ("x_ptrs", "out_ptr", "dout_ptr", "dx_ptrs")


def problem_of(tensors: Sequence[Tensor], num_branches: int) -> Problem:
    """Returns what launch configurations depend on.

    Args:
        tensors: all tensors [B, C, S] of a launch. The first is a branch, whose layout decides.
        num_branches: how many of them are branches.
    """
    first = tensors[0]
    B, C, S = first.shape
    channels_last = is_channels_last(first)
    most = max(1, _ACCESS_BYTES // first.element_size())
    align = _common_alignment(tensors, channels_last, most)
    shifted = False
    if align * first.element_size() < _LEAST_ACCESS_BYTES and not channels_last:
        image = _image_alignment(tensors, most)
        align, shifted = max(align, image), image > align
    return Problem(B, C, S, num_branches, first.element_size(), channels_last, align, shifted)


def _common_alignment(tensors: Sequence[Tensor], channels_last: bool, most: int) -> int:
    """Returns the elements at once in rows that are all aligned, a power of two up to ``most``.

    It divides the size of the axis along which elements lie side by side, C with ``channels_last``
    and S else, and every stride but that of this axis.
    """
    side, across = (1, 2) if channels_last else (2, 1)
    strides = (x.stride(d) for x in tensors for d in (0, across) if x.shape[d] > 1)
    return math.gcd(most, tensors[0].shape[side], *strides)


def _image_alignment(tensors: Sequence[Tensor], most: int) -> int:
    """Returns the elements at once in images [C, S] without gaps, 1 where there are any."""
    _, C, S = tensors[0].shape
    stride_b, stride_c, stride_s = tensors[0].stride()
    alike = all(x.stride() == tensors[0].stride() for x in tensors)
    return math.gcd(most, C * S, stride_b) if alike and (stride_c, stride_s) == (S, 1) else 1


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    """Returns the dtype that sums are kept in, as torch and as Triton name it."""
    if dtype == torch.float64:
        return torch.float64, tl.float64
    return torch.float32, tl.float32


def configuration(
    kernel: StreamingKernel, xs: Sequence[Tensor], config: LaunchConfig | None
) -> LaunchConfig:
    """Returns ``config``, or where it is None what suits the branches ``xs`` [B, C, *spatial]."""
    if config is not None:
        return config

    def find() -> LaunchConfig:
        views = [as_bcs(x) for x in xs]
        first, strides = views[0], tuple(x.stride() for x in views)
        return _configuration(kernel, first.shape, strides, first.dtype, first.device)

    return remembered(kernel, find)


@functools.lru_cache(maxsize=4096)
def _configuration(
    kernel: StreamingKernel,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> LaunchConfig:
    xs = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for stride in strides]
    return choice(kernel, problem_of(xs, len(xs)), DeviceFacts.of(device))


def norm_pointers(norms: Norms | None) -> tuple[Pointer, Pointer, Pointer, Pointer]:
    """Returns mean, var, gamma and beta as kernels take them, four times None without norms."""
    return (None, None, None, None) if norms is None else norms[:4]


def streaming_launch(
    function: Any,
    pointers: Sequence[Pointer],
    *,
    kernel: StreamingKernel,
    config: LaunchConfig | None,
    **constants: Any,
) -> Launch:
    """Returns the launch of a kernel that reads branches ``x_ptrs`` tile by tile.

    Args:
        function: the ``triton.jit`` function. It takes ``pointers`` first, then what its signature
            names of these: ``strides`` of the full-size tensors in the order of `_FULL_SIZE`;
            ``logits_strides``; ``B``, ``C``, ``S``; ``splits`` of ``tiles`` tiles each; constants.
        pointers: as `Launch` has them; full-size ones are [B, C, *spatial] and lie evenly.
        kernel: whose configuration is taken where ``config`` is None.
        config: tile sizes and splits.
        constants: whatever else it takes.
    """
    named = dict(zip(function.arg_names, pointers, strict=False))
    full_size = [as_bcs(x) for name in _FULL_SIZE for x in _as_tuple(named.get(name, ()))]
    xs = _as_tuple(named["x_ptrs"])
    problem = problem_of(full_size, len(xs))
    config = configuration(kernel, xs, config)
    access = min(problem.align, config.access)
    values: dict[str, Any] = {
        "strides": _strides(full_size),
        "B": problem.B,
        "C": problem.C,
        "S": problem.S,
        "tiles": cdiv(kernel.tiles(problem, config), config.splits),
        "splits": config.splits,
    }
    if "logits_ptr" in named:
        values["logits_strides"] = _as_tuple(named["logits_ptr"])[0].stride()
    known = {
        "NUM_BRANCHES": problem.num_branches,
        "HAS_NORM": named.get("mean_ptrs") is not None,
        "ACC": accumulator(xs[0].dtype)[1],
        "ALIGN": access,
        "LAYOUT": problem.layout,
        "BLOCK_C": config.block_c,
        "BLOCK_S": config.block_s,
        "NUM_STAGES": config.num_stages,
        **constants,
    }
    rest = function.arg_names[len(pointers) :]
    return Launch(
        kernel=function,
        programs=kernel.rows(problem, config) * config.splits,
        pointers=named,
        scalars={name: values[name] for name in rest if name in values},
        constants={name: known[name] for name in rest if name in known},
        num_warps=config.num_warps,
        maxnreg=most_registers(DeviceFacts.of(xs[0].device)),
    )


def small_launch(
    function: Any,
    pointers: Sequence[Pointer],
    *,
    kernel: SmallKernel,
    problem: SmallProblem,
    config: SmallConfig | None,
    scalars: Mapping[str, Any],
    **constants: Any,
) -> Launch:
    """Returns the launch of a kernel that reads no branch.

    Args:
        function: the ``triton.jit`` function. It takes ``pointers`` first, then what its signature
            names of these: ``scalars``; ``B``, ``C``, ``d``, ``N`` = M * C; the parts of a sum,
            ``splits``; constants.
        pointers: as `Launch` has them; the first is a tensor.
        kernel: whose configuration is taken where ``config`` is None.
        problem: sizes.
        config: tile sizes.
        scalars: whatever else it takes at run time.
        constants: whatever else it takes.
    """
    names = function.arg_names
    named = dict(zip(names, pointers, strict=False))
    device = DeviceFacts.of(_as_tuple(pointers[0])[0].device)
    config = config or choice(kernel, problem, device)
    values: dict[str, Any] = {
        "B": problem.B,
        "C": problem.C,
        "d": problem.d,
        "N": problem.num_branches * problem.C,
        "splits": problem.parts,
        **scalars,
    }
    known = {
        "NUM_BRANCHES": problem.num_branches,
        "BLOCK_B": config.block_b,
        "BLOCK_C": config.block_c,
        "BLOCK_D": config.block_d,
        "BLOCK_N": config.block_n,
        "BLOCK_R": config.block_r,
        "BLOCK_P": config.block_p,
        **constants,
    }
    rest = names[len(pointers) :]
    return Launch(
        kernel=function,
        programs=kernel.programs(problem, config),
        pointers=named,
        scalars={name: values[name] for name in rest if name in values},
        constants={name: known[name] for name in rest if name in known},
        num_warps=config.num_warps,
        maxnreg=most_registers(device),
    )


def _as_tuple(pointer: Pointer) -> tuple[Any, ...]:
    return pointer if isinstance(pointer, tuple) else (pointer,)


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Returns the strides of every tensor, or of one alone where all have the same."""
    strides = tuple(x.stride() for x in tensors)
    return strides[:1] if len(set(strides)) == 1 else strides
