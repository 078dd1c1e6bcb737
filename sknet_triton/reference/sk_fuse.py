"""fuse in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sknet_triton.reference.common import accumulation_dtype, cast, over_space


def sk_fuse(branches: Sequence[Tensor], reduction: str = "mean") -> Tensor:
    """Averages the sum of the branches over space: [B, C, *spatial] -> [B, C] (section 3.1).

    With the reduction "sum" nothing is divided. Each branch is summed by itself, so that no tensor
    of full size is made.
    """
    return cast(pooled(branches, reduction), branches[0].dtype)


def pooled(branches: Sequence[Tensor], reduction: str = "mean") -> Tensor:
    """Returns `sk_fuse` in the accumulation dtype."""
    spatial = tuple(range(2, branches[0].dim()))
    dtype = accumulation_dtype(branches[0].dtype)
    total = torch.sum(branches[0], spatial, dtype=dtype)
    for x in branches[1:]:
        total = total + torch.sum(x, spatial, dtype=dtype)
    # Sums and not means: a mean's gradient is divided at every position.
    return total / math.prod(branches[0].shape[2:]) if reduction == "mean" else total


def sk_fuse_bwd(dpooled: Tensor, shape: torch.Size, reduction: str = "mean") -> Tensor:
    """Returns every branch's gradient, one broadcast tensor: a stride-0 view.

    It is dpooled / S, or dpooled where the reduction is "sum".
    """
    share = dpooled
    if reduction == "mean":
        wide = dpooled.to(accumulation_dtype(dpooled.dtype))
        share = (wide / math.prod(shape[2:])).to(dpooled.dtype)
    return over_space(share, len(shape) - 2).expand(shape)
