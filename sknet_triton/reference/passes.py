"""The five passes over full-size tensors that fuse_select is made of, and their PyTorch form.

``norm`` is [M, 4, C] in the accumulation dtype: the batch's mean, rstd, scale = gamma * rstd, and
beta. u_i = max((x_i - mean_i) * scale_i + beta_i, 0), and k_i is 0 where u_i is, else 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sknet_triton.reference.common import accumulation_dtype, cast, over_space
from sknet_triton.reference.sk_select import attention


def moments(branches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance of every channel of every branch, [M, C].

    Deviations are taken from the first image's mean. It lies at most sqrt(B - 1) standard
    deviations from the batch's, so one pass of plain sums loses no more than a factor B in
    precision; torch.compile makes loops of divisions of `torch.var_mean`.
    """
    means, variances = zip(*(_moments_of(x) for x in branches), strict=True)
    return torch.stack(means), torch.stack(variances)


def fuse(branches: Sequence[Tensor], norm: Tensor) -> Tensor:
    """Returns the average over space of the sum of u_i, [B, C] in the dtype of ``norm``."""
    space = _space(branches[0])
    total = torch.sum(_activated(branches[0], norm[0]), space)
    for i, x in enumerate(branches[1:], start=1):
        total = total + torch.sum(_activated(x, norm[i]), space)
    return total / math.prod(branches[0].shape[2:])


def select(branches: Sequence[Tensor], logits: Tensor, norm: Tensor) -> Tensor:
    """Returns the sum of softmax(logits)_i * u_i in the dtype of the branches."""
    axes = branches[0].dim() - 2
    attn = attention(logits, norm.dtype)
    out = over_space(attn[:, 0], axes) * _activated(branches[0], norm[0])
    for i, x in enumerate(branches[1:], start=1):
        out = out + over_space(attn[:, i], axes) * _activated(x, norm[i])
    return cast(out, branches[0].dtype)


def sums(dout: Tensor, branches: Sequence[Tensor], norm: Tensor) -> Tensor:
    """Returns the sums over space of dout k, k, dout k xhat and k xhat, [4, B, M, C].

    Only ``centred`` and ``off`` are used more than once: from five operands on, Inductor would
    write a tensor of full size instead of computing it again.
    """
    space, dtype = _space(dout), norm.dtype
    wide = dout.to(dtype)
    columns = []
    for i, x in enumerate(branches):
        centred, y = _normalised(x, norm[i])
        off, rstd = y <= 0, norm[i, 1]
        columns.append(
            torch.stack(
                [
                    torch.sum(torch.where(off, 0.0, wide), space),
                    torch.sum(torch.where(off, 0.0, 1.0), space, dtype=dtype),
                    torch.sum(torch.where(off, 0.0, wide * centred), space) * rstd,
                    torch.sum(torch.where(off, 0.0, centred), space) * rstd,
                ]
            )
        )
    return torch.stack(columns, dim=2)


def gradients(
    dout: Tensor,
    branches: Sequence[Tensor],
    norm: Tensor,
    attn: Tensor,
    share: Tensor,
    drift: Tensor | None,
) -> list[Tensor]:
    """Returns scale_i (k (attn_i dout + share) - drift_i0 - xhat_i drift_i1) for every branch."""
    axes = dout.dim() - 2
    wide = dout.to(norm.dtype)
    dbranches = []
    for i, x in enumerate(branches):
        centred, y = _normalised(x, norm[i])
        dy = over_space(attn[:, i], axes) * wide + over_space(share, axes)
        dy = torch.where(y <= 0, 0.0, dy)
        if drift is not None:
            xhat = centred * _over_batch(norm[i, 1], axes)
            dy = dy - _over_batch(drift[i, 0], axes) - xhat * _over_batch(drift[i, 1], axes)
        dbranches.append((_over_batch(norm[i, 2], axes) * dy).to(x.dtype))
    return dbranches


def _space(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _over_batch(per_channel: Tensor, axes: int) -> Tensor:
    return over_space(per_channel[None], axes)


def _moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    space, count = _space(x), x.shape[0] * math.prod(x.shape[2:])
    x = x.to(accumulation_dtype(x.dtype))
    origin = torch.mean(x[:1].detach(), (0, *space), keepdim=True)
    centred = x - origin
    # Image by image: short sums keep their digits, and there is work for every thread.
    mean = torch.sum(torch.sum(centred, space), 0) / count
    square = torch.sum(torch.sum(centred * centred, space), 0) / count
    return mean + origin.flatten(), torch.clamp_min(square - mean * mean, 0)


def _normalised(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x - mean and y = gamma * xhat + beta of one branch; ``norm`` is [4, C]."""
    mean, _, scale, beta = (_over_batch(row, x.dim() - 2) for row in norm)
    centred = x.to(norm.dtype) - mean
    return centred, centred * scale + beta


def _activated(x: Tensor, norm: Tensor) -> Tensor:
    return torch.relu(_normalised(x, norm)[1])
