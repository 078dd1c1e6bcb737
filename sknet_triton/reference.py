"""The mathematics of fuse and select in plain PyTorch: oracle, CPU path and baseline in one.

Every function takes branches as a sequence of M tensors [B, C, *spatial] of one shape and dtype,
accumulates in float32 (float64 for float64 input) and casts once at the end. Arguments are not
checked here; `sknet_triton.functional` does that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that sums over ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def sk_select(branches: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Weighs the branches by the softmax of logits [B, M, C] over M (section 3.1, eqs. 5 and 6)."""
    first = branches[0]
    axes = first.dim() - 2
    attn = attention(logits, first.dtype)
    out = over_space(attn[:, 0], axes) * first
    for i, x in enumerate(branches[1:], start=1):
        out = out + over_space(attn[:, i], axes) * x
    return out.to(first.dtype)


def sk_select_bwd(
    dout: Tensor, branches: Sequence[Tensor], logits: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Returns the gradients of `sk_select` for every branch and for the logits.

    With g_i = sum over s of dout * x_i: dlogits_i = a_i (g_i - sum_j a_j g_j), dx_i = a_i dout.
    """
    first = branches[0]
    spatial = tuple(range(2, first.dim()))
    attn = attention(logits, first.dtype)
    wide = dout.to(attn.dtype)
    dattn = torch.stack([torch.sum(wide * x, spatial) for x in branches], dim=1)
    dlogits = attn * (dattn - torch.sum(attn * dattn, dim=1, keepdim=True))
    dbranches = [
        (over_space(attn[:, i], len(spatial)) * wide).to(x.dtype) for i, x in enumerate(branches)
    ]
    return dbranches, dlogits.to(logits.dtype)


def attention(logits: Tensor, branch_dtype: torch.dtype) -> Tensor:
    """Returns the softmax of logits [B, M, C] over M in the branches' accumulation dtype."""
    return torch.softmax(logits, dim=1, dtype=accumulation_dtype(branch_dtype))


def over_space(per_channel: Tensor, spatial_axes: int) -> Tensor:
    """Views [B, C] as [B, C, 1, ...], ready to broadcast over so many axes of space."""
    return per_channel.reshape(*per_channel.shape, *(1,) * spatial_axes)
