"""fuse in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sknet_triton.reference.common import accumulation_dtype, over_space


def sk_fuse(branches: Sequence[Tensor]) -> Tensor:
    """Averages the sum of the branches over space: [B, C, *spatial] -> [B, C] (section 3.1).

    Each branch is summed by itself, so that no tensor of full size is made.
    """
    first = branches[0]
    spatial = tuple(range(2, first.dim()))
    dtype = accumulation_dtype(first.dtype)
    total = torch.sum(branches[0], spatial, dtype=dtype)
    for x in branches[1:]:
        total = total + torch.sum(x, spatial, dtype=dtype)
    return (total / first.shape[2:].numel()).to(first.dtype)


def sk_fuse_bwd(dpooled: Tensor, shape: torch.Size) -> Tensor:
    """Returns every branch's gradient, one broadcast tensor: dpooled / S as a stride-0 view."""
    share = dpooled.to(accumulation_dtype(dpooled.dtype)) / shape[2:].numel()
    return over_space(share.to(dpooled.dtype), len(shape) - 2).expand(shape)
