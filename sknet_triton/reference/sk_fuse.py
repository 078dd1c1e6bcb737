"""fuse in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sknet_triton.reference.common import accumulation_dtype, over_space


def sk_fuse(branches: Sequence[Tensor], reduction: str = "mean") -> Tensor:
    """Averages the sum of the branches over space: [B, C, *spatial] -> [B, C] (section 3.1).

    With the reduction "sum" nothing is divided. Each branch is summed by itself, so that no tensor
    of full size is made.
    """
    first = branches[0]
    spatial = tuple(range(2, first.dim()))
    dtype = accumulation_dtype(first.dtype)
    total = torch.sum(branches[0], spatial, dtype=dtype)
    for x in branches[1:]:
        total = total + torch.sum(x, spatial, dtype=dtype)
    if reduction == "mean":
        total = total / math.prod(first.shape[2:])
    return total.to(first.dtype)


def sk_fuse_bwd(dpooled: Tensor, shape: torch.Size, reduction: str = "mean") -> Tensor:
    """Returns every branch's gradient, one broadcast tensor: a stride-0 view.

    It is dpooled / S, or dpooled where the reduction is "sum".
    """
    share = dpooled
    if reduction == "mean":
        wide = dpooled.to(accumulation_dtype(dpooled.dtype))
        share = (wide / math.prod(shape[2:])).to(dpooled.dtype)
    return over_space(share, len(shape) - 2).expand(shape)
