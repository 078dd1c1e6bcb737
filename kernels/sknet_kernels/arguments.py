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
    Tile,
    cdiv,
)
from sknet_kernels.launch import Launch, Pointer, remembered
from sknet_kernels.layout import as_bcs, is_channels_last
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


def configuration(kernel: StreamingKernel, xs: Sequence[Tensor]) -> LaunchConfig:
    """Returns what suits the branches ``xs`` [B, C, *spatial]: how often sums are split, too."""

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
    chosen: LaunchConfig = choice(kernel, problem_of(xs, len(xs)), DeviceFacts.of(device))
    return chosen


def streaming_launch(
    function: Any,
    kernel: StreamingKernel,
    *pointers: Pointer,
    **options: Any,
) -> Launch:
    """Returns the launch of a kernel that reads branches ``x_ptrs`` tile by tile.

    Args:
        function: the ``triton.jit`` function. It takes ``pointers`` first, then what its signature
            names of these: ``strides`` of the full-size tensors in the order of `_FULL_SIZE`;
            ``logits_strides``; ``B``, ``C``, ``S``; ``splits`` of ``tiles`` tiles each; constants.
        kernel: whose configuration is taken.
        pointers: as `Launch` has them; full-size ones are [B, C, *spatial] and lie evenly.
        options: whatever else it takes, by name.
    """
    named = dict(zip(function.arg_names, pointers, strict=False))
    full_size = [as_bcs(x) for name in _FULL_SIZE for x in _as_tuple(named.get(name, ()))]
    xs = _as_tuple(named["x_ptrs"])
    problem = problem_of(full_size, len(xs))
    config = configuration(kernel, xs)
    strides = tuple(x.stride() for x in full_size)
    values = {
        # Of one alone where all have the same.
        "strides": strides[:1] if len(set(strides)) == 1 else strides,
        "B": problem.B,
        "C": problem.C,
        "S": problem.S,
        "tiles": cdiv(kernel.tiles(problem, config), config.splits),
        "splits": config.splits,
        "NUM_BRANCHES": problem.num_branches,
        "ACC": accumulator(xs[0].dtype)[1],
        "TILE": Tile(
            config.block_c,
            config.block_s,
            min(problem.align, config.access),
            problem.layout,
            config.num_stages,
        ),
        **options,
    }
    return _launch(function, named, values, kernel.rows(problem, config) * config.splits, config)


def small_launch(
    function: Any,
    kernel: SmallKernel,
    shapes: Mapping[str, str],
    *pointers: Pointer,
    **options: Any,
) -> Launch:
    """Returns the launch of a kernel that reads no branch.

    Args:
        function: the ``triton.jit`` function. It takes ``pointers`` first, then what its signature
            names of these: ``weight_strides``, ``logits_strides``; ``B``, ``C``, ``d``, ``N`` =
            M * C, ``size`` = B * C; the parts of a sum, ``splits``; constants.
        kernel: whose configuration is taken.
        shapes: of the pointers, by name, that settle the sizes: a letter an axis, ``k`` for parts.
        pointers: as `Launch` has them; the first is a tensor.
        options: whatever else it takes, by name.
    """
    named: dict[str, Any] = dict(zip(function.arg_names, pointers, strict=False))
    tensors = [named[name] for name in shapes]
    sizes = dict.fromkeys("BCMdk", 1)
    for x, letters in zip(tensors, shapes.values(), strict=True):
        sizes |= zip(letters, x.shape, strict=True)
    B, C, M, d, k = (sizes[letter] for letter in "BCMdk")
    problem = SmallProblem(B, C, M, d, k, tensors[0].itemsize)
    config: SmallConfig = choice(kernel, problem, DeviceFacts.of(tensors[0].device))
    values = {"B": B, "C": C, "d": d, "N": M * C, "size": B * C, "splits": k, "NUM_BRANCHES": M}
    values |= {name.upper(): value for name, value in vars(config).items()}
    if "weight_ptr" in named:
        values["weight_strides"] = named["weight_ptr"].stride()[:2]
    return _launch(function, named, values | options, kernel.programs(problem, config), config)


def _launch(
    function: Any,
    named: Mapping[str, Pointer],
    values: dict[str, Any],
    programs: int,
    config: LaunchConfig | SmallConfig,
) -> Launch:
    """Returns the launch that takes of ``values`` what ``function`` names after the pointers."""
    logits, first = named.get("logits_ptr"), next(iter(named.values()))
    if isinstance(logits, Tensor):
        values["logits_strides"] = logits.stride()
    rest = function.arg_names[len(named) :]
    constants = function.fn.__annotations__
    return Launch(
        kernel=function,
        programs=programs,
        pointers=named,
        scalars={name: values[name] for name in rest if name not in constants},
        constants={name: values[name] for name in rest if name in constants},
        num_warps=config.num_warps,
        maxnreg=DeviceFacts.of(_as_tuple(first)[0].device).most_registers,
    )


def _as_tuple(pointer: Pointer) -> tuple[Any, ...]:
    return pointer if isinstance(pointer, tuple) else (pointer,)
