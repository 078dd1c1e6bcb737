"""`sk_fuse_select`, all between the convolutions and V, in PyTorch: as seven steps, and `composed`.

A step reads or writes full-size tensors, or lies between two that do. The derivation: with x the
convolutions' outputs, y_i = gamma_i xhat_i + beta_i and u_i = max(y_i, 0), one read of dV and x
gives P1 = sum dV k, P2 = sum k, P3 = sum dV k xhat and P4 = sum k xhat over space, k being 0 where
u is, else 1. From them da_i = gamma_i P3 + beta_i P1, the gradients of the MLP, ds,
dbeta_i = sum_b (a_i P1 + (ds / S) P2), dgamma_i = sum_b (a_i P3 + (ds / S) P4), and with one more
read dx_i = gamma_i rstd_i (k (a_i dV + ds / S) - dbeta_i / m - xhat_i dgamma_i / m).

Small tensors are kept in the accumulation dtype. fc1_weight is [d, C] and fc2_weight [M * C, d], or
with two more axes of size 1 as a convolution has it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sknet_kernels.norms import ChannelGradients, Norms, common_dtype
from sknet_triton.reference.common import (
    accumulation_dtype,
    cast,
    no_autocast,
    over_space,
    sum_over,
)
from sknet_triton.reference.sk_fuse import pooled as pooled_over
from sknet_triton.reference.sk_select import attention, sk_select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Steps:
    """An implementation of the seven steps: these formulas, Triton's launchers, or operators.

    ``norms`` are those of the branches, ``fc1_norm`` holds one; the statistics in them are applied.

    Attributes:
        moments: branches -> the batch's mean and biased variance [2, M, C], and once more as
            running statistics keep them, mean and unbiased variance [2, M, C]. Launchers take a
            `Running` too, which they move, and then return None for the latter.
        hidden: branches, norms, fc1_weight, fc1_bias -> s [B, C] and fc1's output [B, d].
        logits: hidden, fc1_norm (a mean of None: the batch's statistics), fc2_weight, fc2_bias,
            M -> logits [B, M, C], and the batch's statistics, [2, d] and [2, d] as for
            ``moments``, with a `Running` too; None where they were given.
        out: branches, logits, norms -> V, like a branch.
        hidden_bwd: dV, branches, logits, norms, fc2_weight -> P1 to P4 [4, B, M, C], dlogits
            [B, M, C] and dz [B, d].
        channels_bwd: see `channels_bwd`.
        dx: dV, branches, logits, norms, share [B, C], drift [2, M, C] or None -> the gradients
            of the branches.
    """

    moments: Callable[..., tuple[Tensor, Tensor | None]]
    hidden: Callable[..., tuple[Tensor, Tensor]]
    logits: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    out: Callable[..., Tensor]
    hidden_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    channels_bwd: Callable[..., ChannelGradients]
    dx: Callable[..., Sequence[Tensor]]


def moments(branches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance [2, M, C], then mean and unbiased variance [2, M, C].

    Deviations are taken from the first image's mean. It lies at most sqrt(B - 1) standard
    deviations from the batch's, so one pass of plain sums loses no more than a factor B in
    precision; torch.compile makes loops of divisions of `torch.var_mean`.
    """
    mean, var = (torch.stack(each) for each in zip(*map(moments_of, branches), strict=True))
    size = branches[0].shape[0] * math.prod(branches[0].shape[2:])
    return torch.stack([mean, var]), torch.stack([mean, var * (size / (size - 1))])


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance of every channel of one branch, [C] each."""
    space, count = _space(x), x.shape[0] * math.prod(x.shape[2:])
    x = x.to(accumulation_dtype(x.dtype))
    origin = torch.mean(x[:1].detach(), (0, *space), keepdim=True)
    centred = x - origin
    # Image by image: short sums keep their digits, and there is work for every thread.
    mean = torch.sum(torch.sum(centred, space), 0) / count
    square = torch.sum(torch.sum(centred * centred, space), 0) / count
    return mean + origin.flatten(), torch.clamp_min(square - mean * mean, 0)


def hidden(
    branches: Sequence[Tensor], norms: Norms, fc1_weight: Tensor, fc1_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns s [B, C] (eqs. 1 and 2) and fc1's output [B, d] (eq. 3)."""
    pooled = fuse(branches, norms)
    return pooled, _linear(pooled, fc1_weight, fc1_bias)


def fuse(branches: Sequence[Tensor], norms: Norms) -> Tensor:
    """Returns s, the average over space of the sum of u_i [B, C]."""
    space, norm = _space(branches[0]), _rows(branches[0], norms)
    total = torch.sum(_activated(branches[0], norm[0]), space)
    for i, x in enumerate(branches[1:], start=1):
        total = total + torch.sum(_activated(x, norm[i]), space)
    return total / math.prod(branches[0].shape[2:])


def logits(
    hidden: Tensor, fc1_norm: Norms, fc2_weight: Tensor, fc2_bias: Tensor | None, M: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns logits [B, M, C] (eqs. 3 to 5) and the batch's statistics, or None."""
    applied, kept = None, None
    if fc1_norm.mean[0] is None:
        var, mean = torch.var_mean(hidden, 0, correction=0)
        size = hidden.shape[0]
        applied = torch.stack([mean, var])
        kept = torch.stack([mean, var * (size / (size - 1))])
        fc1_norm = fc1_norm._replace(mean=(mean,), var=(var,))
    _, _, z = _fc1_norm(hidden, fc1_norm)
    wide = _linear(z, fc2_weight, fc2_bias)
    return wide.view(hidden.shape[0], M, fc2_weight.shape[0] // M), applied, kept


def out(branches: Sequence[Tensor], logits: Tensor, norms: Norms) -> Tensor:
    """Returns V, the sum of softmax(logits)_i * u_i, in the dtype of the branches (eq. 6)."""
    axes, norm = branches[0].dim() - 2, _rows(branches[0], norms)
    attn = attention(logits, norm.dtype)
    v = over_space(attn[:, 0], axes) * _activated(branches[0], norm[0])
    for i, x in enumerate(branches[1:], start=1):
        v = v + over_space(attn[:, i], axes) * _activated(x, norm[i])
    return cast(v, branches[0].dtype)


def hidden_bwd(
    dout: Tensor, branches: Sequence[Tensor], logits: Tensor, norms: Norms, fc2_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns P1 to P4 [4, B, M, C], dlogits [B, M, C] and dz [B, d]."""
    p = sums(dout, branches, norms)
    attn = torch.softmax(logits, dim=1)
    weight, bias = _stacked(norms.weight, norms, p, 1), _stacked(norms.bias, norms, p, 0)
    dattn = weight * p[2] + bias * p[0]
    dlogits = attn * (dattn - torch.sum(attn * dattn, dim=1, keepdim=True))
    return p, dlogits, dlogits.flatten(1) @ _matrix(fc2_weight, p)


def sums(dout: Tensor, branches: Sequence[Tensor], norms: Norms) -> Tensor:
    """Returns P1 to P4, the sums over space of dV k, k, dV k xhat and k xhat [4, B, M, C].

    Only ``centred`` and ``off`` are used more than once: from five operands on, Inductor would
    write a tensor of full size instead of computing it again.
    """
    space, norm = _space(dout), _rows(dout, norms)
    wide = dout.to(norm.dtype)
    columns = []
    for i, x in enumerate(branches):
        centred, y = _normalised(x, norm[i])
        off, rstd = y <= 0, norm[i, 1]
        p1 = torch.sum(torch.where(off, 0.0, wide), space)
        p2 = torch.sum(torch.where(off, 0.0, 1.0), space, dtype=norm.dtype)
        p3 = torch.sum(torch.where(off, 0.0, wide * centred), space) * rstd
        p4 = torch.sum(torch.where(off, 0.0, centred), space) * rstd
        columns.append(torch.stack([p1, p2, p3, p4]))
    return torch.stack(columns, dim=2)


def channels_bwd(
    sums: Tensor,
    dlogits: Tensor,
    dz: Tensor,
    logits: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    norms: Norms,
    fc1_norm: Norms,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    S: int,
    batch_stats: bool,
    fc1_batch_stats: bool,
    group: "ProcessGroup | None" = None,
    counts: Sequence[Tensor] | None = None,
) -> ChannelGradients:
    """Returns what the backward has left to give but dx.

    ``sums`` are P1 to P4 [4, B, M, C], ``dlogits`` and ``logits`` [B, M, C], ``dz`` is the gradient
    of fc2's input [B, d], ``pooled`` s [B, C], ``hidden`` fc1's output before its norm [B, d], and
    S the positions. ``batch_stats`` says whether norms took the statistics of the batch, over the
    processes of ``group``, whose images, and values a channel, are ``counts``.
    """
    B = dz.shape[0]
    images, size = (B, B * S) if counts is None else counts
    scale, hhat, z = _fc1_norm(hidden, fc1_norm)
    dy = dz.masked_fill(z <= 0, 0)
    fc1_gamma, fc1_beta = torch.sum(dy * hhat, 0), torch.sum(dy, 0)
    dhidden = dy
    if fc1_batch_stats:
        fc1_drift = sum_over(group, torch.stack([fc1_beta, fc1_gamma])) / images
        dhidden = dy - fc1_drift[0] - hhat * fc1_drift[1]
    dhidden = dhidden * scale
    share = (dhidden @ _matrix(fc1_weight, sums)) / S
    attn = torch.softmax(logits, dim=1)
    p1, p2, p3, p4 = sums
    beta = torch.sum(attn * p1 + share[:, None] * p2, dim=0)
    gamma = torch.sum(attn * p3 + share[:, None] * p4, dim=0)
    drift = None
    if batch_stats:
        drift = sum_over(group, torch.stack([beta, gamma])) / size
    flat = dlogits.flatten(1)
    return ChannelGradients(
        share,
        drift,
        gamma.to(common_dtype(norms.weight, gamma)),
        beta.to(common_dtype(norms.bias, beta)),
        (dhidden.t() @ pooled).to(fc1_weight.dtype).view(fc1_weight.shape),
        _like(fc1_bias, torch.sum(dhidden, 0)),
        _like(fc1_norm.weight[0], fc1_gamma),
        _like(fc1_norm.bias[0], fc1_beta),
        (flat.t() @ z).to(fc2_weight.dtype).view(fc2_weight.shape),
        _like(fc2_bias, torch.sum(flat, 0)),
    )


def dx(
    dout: Tensor,
    branches: Sequence[Tensor],
    logits: Tensor,
    norms: Norms,
    share: Tensor,
    drift: Tensor | None,
) -> list[Tensor]:
    """Returns scale_i (k (a_i dV + share) - drift_0i - xhat_i drift_1i) for every branch."""
    axes, norm = dout.dim() - 2, _rows(dout, norms)
    attn, wide = torch.softmax(logits, dim=1), dout.to(norm.dtype)
    dbranches = []
    for i, x in enumerate(branches):
        centred, y = _normalised(x, norm[i])
        dy = over_space(attn[:, i], axes) * wide + over_space(share, axes)
        dy = torch.where(y <= 0, 0.0, dy)
        if drift is not None:
            xhat = centred * _over_batch(norm[i, 1], axes)
            dy = dy - _over_batch(drift[0, i], axes) - xhat * _over_batch(drift[1, i], axes)
        dbranches.append((_over_batch(norm[i, 2], axes) * dy).to(x.dtype))
    return dbranches


REFERENCE = Steps(moments, hidden, logits, out, hidden_bwd, channels_bwd, dx)


def composed(
    branches: Sequence[Tensor],
    norms: Norms,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc1_norm: Norms,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes V = sum of a_i u_i, as `functional.sk_fuse_select` says, for eager PyTorch.

    Every operator is PyTorch's, so every kind of derivative is. What it keeps for the backward is
    the branches and the u_i. No process group is known here.

    Returns:
        V in the dtype of the branches; mean and unbiased variance of the branches [2, M, C] and of
        fc1's output [2, d] in the accumulation dtype, None where running ones were taken.
    """
    B, C = branches[0].shape[:2]
    with no_autocast(branches[0]):
        maps, kept = _batch_normed(branches, norms)
        hidden = _linear(pooled_over(maps), fc1_weight, fc1_bias)
        (z,), fc1_kept = _batch_normed([hidden], fc1_norm)
        logits = _linear(z, fc2_weight, fc2_bias)
        out = sk_select(maps, logits.view(B, len(maps), C))
    return out, kept, None if fc1_kept is None else fc1_kept[:, 0]


def _batch_normed(xs: Sequence[Tensor], norms: Norms) -> tuple[list[Tensor], Tensor | None]:
    """Returns the xs normalised and rectified, and the batch's statistics where they were taken.

    Those are mean and unbiased variance [2, n, C] of the n norms.
    """
    dtype = accumulation_dtype(xs[0].dtype)
    kept, mean, var = None, norms.mean, norms.var
    if mean[0] is None:
        # At momentum 1 running statistics are the batch's and nothing else.
        kept = xs[0].new_zeros((2, len(xs), xs[0].shape[1]), dtype=dtype)
        rows = kept.flatten(0, 1).unbind()
        mean, var = rows[: len(xs)], rows[len(xs) :]
    maps = []
    for x, *row in zip(xs, mean, var, norms.weight, norms.bias, strict=True):
        m, v, weight, bias = (cast(vector, dtype) for vector in row)
        maps.append(F.batch_norm(x, m, v, weight, bias, kept is not None, 1.0, norms.eps).relu_())
    return maps, kept


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, _matrix(weight, x), cast(bias, x.dtype))


def _space(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _over_batch(per_channel: Tensor, axes: int) -> Tensor:
    return over_space(per_channel[None], axes)


def _normalised(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x - mean and y = gamma * xhat + beta of one branch; ``norm`` is [4, C]."""
    mean, _, scale, beta = (_over_batch(row, x.dim() - 2) for row in norm)
    centred = x.to(norm.dtype) - mean
    return centred, centred * scale + beta


def _activated(x: Tensor, norm: Tensor) -> Tensor:
    return torch.relu(_normalised(x, norm)[1])


def _rows(x: Tensor, norms: Norms) -> Tensor:
    """Returns the rows mean, rstd, scale and beta, [M, 4, C]."""
    like = x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    mean, var = _stacked(norms.mean, norms, like, 0), _stacked(norms.var, norms, like, 1)
    rstd = torch.rsqrt(var + norms.eps)
    scale = _stacked(norms.weight, norms, like, 1) * rstd
    return torch.stack([mean, rstd, scale, _stacked(norms.bias, norms, like, 0)], dim=1)


def _stacked(vectors: Sequence[Tensor | None], norms: Norms, like: Tensor, absent: float) -> Tensor:
    """Returns [M, C] in the dtype of ``like``, with ``absent`` in the place of None."""
    return torch.stack(
        [
            like.new_full(other.shape, absent) if x is None else x.to(like.dtype)
            for x, other in zip(vectors, norms.mean, strict=True)
            if other is not None
        ]
    )


def _fc1_norm(hidden: Tensor, fc1_norm: Norms) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scale = gamma * rstd, xhat and z = max(y, 0) of fc1's norm: [d], [B, d], [B, d]."""
    mean, rstd, scale, beta = _rows(hidden, fc1_norm)[0]
    centred = hidden - mean
    return scale, centred * rstd, torch.relu(centred * scale + beta)


def _matrix(weight: Tensor, like: Tensor) -> Tensor:
    """Returns a weight [n, m], or [n, m, 1, 1] as a convolution has it, as a matrix."""
    return cast(weight.flatten(1), like.dtype)


def _like(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    """Returns the gradient in the parameter's dtype, None where there is no parameter."""
    return None if parameter is None else gradient.to(parameter.dtype)
