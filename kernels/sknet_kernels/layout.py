"""How a tensor [B, C, *spatial] lies in memory: the one place that decides about layout.

Kernels address [B, C, S] by three strides, S being the flattened space. Contiguous and
channels_last tensors, their slices along B and C, and tensors expanded as a whole have such
strides. A crop, or an axis of space expanded alone, does not: `evenly` copies that one tensor, at
a cost of two passes.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor


def evenly(x: Tensor) -> Tensor:
    """Returns ``x`` [B, C, *spatial] as kernels read it: itself if its space lies evenly."""
    return x if lies_evenly(x) else empty_like_branch(x).copy_(x)


def as_bcs(x: Tensor) -> Tensor:
    """Returns ``x`` [B, C, *spatial], whose space lies evenly, as a view [B, C, S]."""
    return x if x.dim() == 3 else x.flatten(2)


def lies_evenly(x: Tensor) -> bool:
    """Tells whether the space of ``x`` [B, C, *spatial] is one axis of constant stride."""
    sizes, strides = x.shape, x.stride()
    if len(sizes) == 4:  # spelt out, since this is asked of every image at every call
        return strides[2] == strides[3] * sizes[3] or sizes[2] == 1 or sizes[3] == 1
    axes = [d for d in range(2, len(sizes)) if sizes[d] != 1]
    return all(strides[outer] == strides[inner] * sizes[inner] for outer, inner in pairwise(axes))


def positions(x: Tensor) -> int:
    """Returns S of [B, C, *spatial]."""
    return math.prod(x.shape[2:])


def empty_like_branch(x: Tensor) -> Tensor:
    """Returns an uninitialised tensor in the layout of ``x``, contiguous where that is uneven."""
    out = torch.empty_like(x)
    if lies_evenly(out):
        return out
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def is_channels_last(x: Tensor) -> bool:
    """Tells whether neighbours of ``x`` [B, C, S] in memory are channels rather than positions."""
    return x.stride(1) == 1 and x.shape[1] > 1 and (x.stride(2) != 1 or x.shape[2] == 1)
