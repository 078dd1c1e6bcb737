"""What every launcher derives from its tensors."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sknet_kernels.config import Problem
from sknet_kernels.layout import is_channels_last


def problem_of(xs: Sequence[Tensor]) -> Problem:
    """Returns the sizes that launch configurations depend on, for branches [B, C, S]."""
    first = xs[0]
    B, C, S = first.shape
    return Problem(B, C, S, len(xs), first.element_size(), is_channels_last(first))


def common_alignment(tensors: Sequence[Tensor]) -> int:
    """Returns the largest power of two up to 16 that divides S and every stride but that of S.

    It is what makes the rows of contiguous tensors [B, C, S] aligned; for channels_last it is 1.
    """
    divisor = math.gcd(16, *(n for x in tensors for n in (x.shape[2], x.stride(0), x.stride(1))))
    return divisor & -divisor


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    """Returns the dtype that sums are kept in, as torch and as Triton name it."""
    if dtype == torch.float64:
        return torch.float64, tl.float64
    return torch.float32, tl.float32


def branch_arguments(name: str, xs: Sequence[Tensor]) -> dict[str, tuple[Any, ...]]:
    """Returns pointers and strides of ``xs`` [B, C, S] as tuples that kernels index by branch."""
    return {
        f"{name}_ptrs": tuple(xs),
        f"{name}_strides_b": tuple(x.stride(0) for x in xs),
        f"{name}_strides_c": tuple(x.stride(1) for x in xs),
        f"{name}_strides_s": tuple(x.stride(2) for x in xs),
    }


def tensor_arguments(name: str, x: Tensor, axes: str) -> dict[str, Any]:
    """Returns pointer and strides of one tensor, a stride per letter of ``axes``."""
    strides = {f"{name}_stride_{axis}": x.stride(d) for d, axis in enumerate(axes)}
    return {f"{name}_ptr": x, **strides}
