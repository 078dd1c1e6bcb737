"""select in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sknet_triton.reference.common import accumulation_dtype, cast, over_space


def sk_select(branches: Sequence[Tensor], logits: Tensor, activation: str = "softmax") -> Tensor:
    """Weighs the branches by the softmax of logits [B, M, C] over M (section 3.1, eqs. 5 and 6).

    The activation may also be "sigmoid" of every logit, or "none".
    """
    first = branches[0]
    attn = over_space(attention(logits, first.dtype, activation), first.dim() - 2).unbind(1)
    out = attn[0] * first
    for a, x in zip(attn[1:], branches[1:], strict=True):
        out = out + a * x
    return cast(out, first.dtype)


def sk_select_bwd(
    dout: Tensor, branches: Sequence[Tensor], logits: Tensor, activation: str = "softmax"
) -> tuple[list[Tensor], Tensor]:
    """Returns the gradients of `sk_select` for every branch and for the logits.

    With g_i = sum over s of dout * x_i: dx_i = a_i dout and, for the softmax,
    dlogits_i = a_i (g_i - sum_j a_j g_j); for the sigmoid, a_i (1 - a_i) g_i; else g_i.
    """
    first = branches[0]
    spatial = tuple(range(2, first.dim()))
    attn = attention(logits, first.dtype, activation)
    wide = dout.to(attn.dtype)
    dattn = torch.stack([torch.sum(wide * x, spatial) for x in branches], dim=1)
    if activation == "softmax":
        dlogits = attn * (dattn - torch.sum(attn * dattn, dim=1, keepdim=True))
    elif activation == "sigmoid":
        dlogits = attn * (1 - attn) * dattn
    else:
        dlogits = dattn
    dbranches = [
        (over_space(attn[:, i], len(spatial)) * wide).to(x.dtype) for i, x in enumerate(branches)
    ]
    return dbranches, dlogits.to(logits.dtype)


def attention(logits: Tensor, branch_dtype: torch.dtype, activation: str = "softmax") -> Tensor:
    """Returns the weights from logits [B, M, C] in the branches' accumulation dtype."""
    dtype = accumulation_dtype(branch_dtype)
    if activation == "softmax":
        return torch.softmax(logits, dim=1, dtype=dtype)
    wide = logits.to(dtype)
    return torch.sigmoid(wide) if activation == "sigmoid" else wide
