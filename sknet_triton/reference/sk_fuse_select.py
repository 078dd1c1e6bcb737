"""fuse and select with batch norm and ReLU inside: forward, backward, and their autograd function.

The derivation: with x the convolutions' outputs, y_i = gamma_i xhat_i + beta_i and
u_i = max(y_i, 0), one read of dV and x gives P1 = sum dV k, P2 = sum k, P3 = sum dV k xhat and
P4 = sum k xhat over space. From them da_i = gamma_i P3 + beta_i P1, the gradients of the MLP, ds,
dbeta_i = sum_b (a_i P1 + (ds / S) P2), dgamma_i = sum_b (a_i P3 + (ds / S) P4), and with one more
read dx_i = gamma_i rstd_i (k (a_i dV + ds / S) - dbeta_i / m - xhat_i dgamma_i / m).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sknet_triton.reference.collectives import sum_over
from sknet_triton.reference.common import accumulation_dtype, no_autocast
from sknet_triton.reference.stages import REFERENCE, Stages


class Parameters(NamedTuple):
    """The small tensors of the section.

    Attributes:
        gamma: weights of the branches' norms [M, C].
        beta: biases of the branches' norms [M, C].
        running_mean: [M, C], read in eval mode only.
        running_var: [M, C], read in eval mode only.
        fc1_weight: [d, C].
        fc1_bias: [d] or None.
        fc1_gamma: weight of fc1's norm [d].
        fc1_beta: bias of fc1's norm [d].
        fc1_running_mean: [d], read in eval mode only.
        fc1_running_var: [d], read in eval mode only.
        fc2_weight: [M * C, d], branch-major.
        fc2_bias: [M * C] or None.
    """

    gamma: Tensor
    beta: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc1_gamma: Tensor
    fc1_beta: Tensor
    fc1_running_mean: Tensor | None
    fc1_running_var: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None


class Settings(NamedTuple):
    """How the section normalises.

    Attributes:
        eps: of the branches' norms.
        fc1_eps: of fc1's norm.
        batch_stats: whether the branches' norms take the statistics of the batch.
        fc1_batch_stats: whether fc1's norm does.
        group: name of the process group that statistics are taken over; empty for this process.
    """

    eps: float
    fc1_eps: float
    batch_stats: bool
    fc1_batch_stats: bool
    group: str = ""


class Results(NamedTuple):
    """What the forward gives: V and small tensors in the accumulation dtype.

    Attributes:
        out: V, like a branch.
        mean: the batch's, of every branch and channel [M, C]; empty where it is not taken.
        var: biased, likewise.
        fc1_mean: the batch's [d]; empty where it is not taken.
        fc1_var: biased, likewise.
        counts: images, and values a channel of a branch, over all processes [2].
        pooled: s [B, C].
        hidden: fc1's output before its norm [B, d].
        logits: [B, M, C].
    """

    out: Tensor
    mean: Tensor
    var: Tensor
    fc1_mean: Tensor
    fc1_var: Tensor
    counts: Tensor
    pooled: Tensor
    hidden: Tensor
    logits: Tensor


NUM_SETTINGS = len(Settings._fields)
NUM_PARAMETERS = len(Parameters._fields)
NUM_SMALL = len(Results._fields) - 1


class Gradients(NamedTuple):
    """What the backward gives, each in the dtype of what it is a gradient of."""

    branches: list[Tensor]
    gamma: Tensor
    beta: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc1_gamma: Tensor
    fc1_beta: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


def forward(
    stages: Stages, branches: Sequence[Tensor], p: Parameters, settings: Settings
) -> Results:
    """Carries out everything between the convolutions and V (2M + 1 passes, 3M + 1 in training)."""
    dtype = accumulation_dtype(branches[0].dtype)
    images = branches[0].shape[0]
    own = [p.gamma.new_full((), n, dtype=dtype) for n in (images, images * _positions(branches))]
    counts = sum_over(settings.group, torch.stack(own))
    mean, var = counts.new_empty(0), counts.new_empty(0)
    if settings.batch_stats:
        mean, var = _joined(*stages.moments(branches), own[1], counts[1], settings)
    norm = _norm(mean, var, p, settings)
    pooled = stages.fuse(branches, norm)
    hidden = F.linear(pooled, p.fc1_weight.to(dtype), _cast(p.fc1_bias, dtype))
    fc1_mean, fc1_var = counts.new_empty(0), counts.new_empty(0)
    if settings.fc1_batch_stats:
        fc1_var, fc1_mean = torch.var_mean(hidden, 0, correction=0)
        fc1_mean, fc1_var = _joined(fc1_mean, fc1_var, own[0], counts[0], settings)
    _, _, z = _fc1_norm(hidden, fc1_mean, fc1_var, p, settings)
    logits = F.linear(z, p.fc2_weight.to(dtype), _cast(p.fc2_bias, dtype))
    logits = logits.view(pooled.shape[0], len(branches), pooled.shape[1])
    out = stages.select(branches, logits, norm)
    return Results(out, mean, var, fc1_mean, fc1_var, counts, pooled, hidden, logits)


def backward(
    stages: Stages,
    dout: Tensor,
    branches: Sequence[Tensor],
    p: Parameters,
    saved: Results,
    settings: Settings,
) -> Gradients:
    """Carries out the backward in 3M + 2 passes; ``saved.out`` is not read."""
    dtype = saved.logits.dtype
    norm = _norm(saved.mean, saved.var, p, settings)
    p1, p2, p3, p4 = stages.sums(dout, branches, norm)
    attn = torch.softmax(saved.logits, dim=1)
    dattn = p.gamma.to(dtype) * p3 + p.beta.to(dtype) * p1
    dlogits = attn * (dattn - torch.sum(attn * dattn, dim=1, keepdim=True))
    mlp, dpooled = _mlp_backward(dlogits.flatten(1), p, saved, settings)
    share = dpooled / _positions(branches)
    dbeta = torch.sum(attn * p1 + share[:, None] * p2, dim=0)
    dgamma = torch.sum(attn * p3 + share[:, None] * p4, dim=0)
    drift = None
    if settings.batch_stats:
        drift = sum_over(settings.group, torch.stack([dbeta, dgamma], dim=1))
        drift = drift / saved.counts[1]
    dbranches = stages.gradients(dout, branches, norm, attn, share, drift)
    return Gradients(dbranches, dgamma.to(p.gamma.dtype), dbeta.to(p.beta.dtype), *mlp)


def _mlp_backward(
    dlogits: Tensor, p: Parameters, saved: Results, settings: Settings
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the gradients of fc1 (weight, bias, gamma, beta) and fc2 (weight, bias), and ds."""
    dtype = dlogits.dtype
    rstd, hhat, z = _fc1_norm(saved.hidden, saved.fc1_mean, saved.fc1_var, p, settings)
    dy = (dlogits @ p.fc2_weight.to(dtype)).masked_fill(z <= 0, 0)
    dgamma, dbeta = torch.sum(dy * hhat, 0), torch.sum(dy, 0)
    dhidden = dy
    if settings.fc1_batch_stats:
        drift = sum_over(settings.group, torch.stack([dbeta, dgamma])) / saved.counts[0]
        dhidden = dy - drift[0] - hhat * drift[1]
    dhidden = dhidden * (p.fc1_gamma.to(dtype) * rstd)
    gradients = (
        (dhidden.t() @ saved.pooled).to(p.fc1_weight.dtype),
        torch.sum(dhidden, 0).to(p.fc1_weight.dtype),
        dgamma.to(p.fc1_gamma.dtype),
        dbeta.to(p.fc1_beta.dtype),
        (dlogits.t() @ z).to(p.fc2_weight.dtype),
        torch.sum(dlogits, 0).to(p.fc2_weight.dtype),
    )
    return gradients, dhidden @ p.fc1_weight.to(dtype)


def _norm(mean: Tensor, var: Tensor, p: Parameters, settings: Settings) -> Tensor:
    """Returns the rows mean, rstd, scale and beta, [M, 4, C]."""
    dtype = mean.dtype
    if not settings.batch_stats:
        mean, var = _constant(p.running_mean, p.running_var, dtype)
    rstd = torch.rsqrt(var + settings.eps)
    return torch.stack([mean, rstd, p.gamma.to(dtype) * rstd, p.beta.to(dtype)], dim=1)


def _fc1_norm(
    hidden: Tensor, mean: Tensor, var: Tensor, p: Parameters, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rstd [d], the normalised hidden layer and its activation z [B, d]."""
    dtype = hidden.dtype
    if not settings.fc1_batch_stats:
        mean, var = _constant(p.fc1_running_mean, p.fc1_running_var, dtype)
    rstd = torch.rsqrt(var + settings.fc1_eps)
    hhat = (hidden - mean) * rstd
    return rstd, hhat, torch.relu(hhat * p.fc1_gamma.to(dtype) + p.fc1_beta.to(dtype))


def _joined(
    mean: Tensor, var: Tensor, count: Tensor, all_counts: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Joins this process's moments, of ``count`` values, with those of the group."""
    if not settings.group:
        return mean, var
    weight = count / all_counts
    # A process without an image has moments of nothing, NaN, that count for nothing.
    mean, var = (x.masked_fill(weight == 0, 0) for x in (mean, var))
    joined = sum_over(settings.group, mean * weight)
    spread = var + (mean - joined).square()
    return joined, sum_over(settings.group, spread * weight)


def _positions(branches: Sequence[Tensor]) -> int:
    return math.prod(branches[0].shape[2:])


def _constant(mean: Tensor | None, var: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if mean is None or var is None:
        raise ValueError("running_mean, running_var: needed where batch statistics are not taken")
    return mean.to(dtype), var.to(dtype)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def flattened(g: Gradients, p: Parameters) -> tuple[Tensor | None, ...]:
    """Returns the gradients in the order of `Parameters`: None for statistics and absent biases."""
    return (
        g.gamma,
        g.beta,
        None,
        None,
        g.fc1_weight,
        None if p.fc1_bias is None else g.fc1_bias,
        g.fc1_gamma,
        g.fc1_beta,
        None,
        None,
        g.fc2_weight,
        None if p.fc2_bias is None else g.fc2_bias,
    )


def sk_fuse_select(branches: Sequence[Tensor], p: Parameters, settings: Settings) -> Results:
    """Composes differentiable operators alone: for torch.func and forward-mode differentiation.

    Raises:
        RuntimeError: statistics are taken over a process group, whose sums have no derivative here.
    """
    _check_no_group(settings)
    with no_autocast(branches[0]):
        results = forward(REFERENCE, branches, p, settings)
    return Results(results.out, *(small.detach() for small in results[1:]))


def differentiable_backward(
    dout: Tensor, branches: Sequence[Tensor], p: Parameters, settings: Settings
) -> Gradients:
    """Carries out the backward such that its results can be differentiated again.

    The small tensors are computed once more: as the forward saved them, nothing says how they
    depend on the branches.

    Raises:
        RuntimeError: as in `sk_fuse_select`.
    """
    _check_no_group(settings)
    with no_autocast(dout):
        saved = forward(REFERENCE, branches, p, settings)
        return backward(REFERENCE, dout, branches, p, saved, settings)


def _check_no_group(settings: Settings) -> None:
    if settings.group:
        raise RuntimeError(
            "sk_fuse_select: statistics over a process group (SyncBatchNorm) have first "
            "derivatives in reverse mode only"
        )


class SKFuseSelect(torch.autograd.Function):
    """`forward` and `backward` over the PyTorch stages, for autograd and for torch.compile.

    Takes the fields of `Settings`, those of `Parameters`, then the branches; returns the fields
    of `Results`, of which only the first has a gradient. Saved are the branches and small tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        fc1_eps: float,
        batch_stats: bool,
        fc1_batch_stats: bool,
        group: str,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        """Returns V, then small tensors without a gradient."""
        settings = Settings(eps, fc1_eps, batch_stats, fc1_batch_stats, group)
        parameters, branches = tensors[:NUM_PARAMETERS], tensors[NUM_PARAMETERS:]
        with no_autocast(branches[0]):
            results = forward(REFERENCE, branches, Parameters(*parameters), settings)
        ctx.settings = settings
        ctx.save_for_backward(*tensors, *results[1:])
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Returns a gradient for every tensor that `forward` took."""
        saved_tensors = ctx.saved_tensors
        tensors, small = saved_tensors[:-NUM_SMALL], saved_tensors[-NUM_SMALL:]
        if dout is None:
            return (None,) * (NUM_SETTINGS + len(tensors))
        p, branches = Parameters(*tensors[:NUM_PARAMETERS]), tensors[NUM_PARAMETERS:]
        if torch.is_grad_enabled():  # a graph of the backward is asked for
            gradients = differentiable_backward(dout, branches, p, ctx.settings)
        else:
            saved = Results(branches[0], *small)
            with no_autocast(dout):
                gradients = backward(REFERENCE, dout, branches, p, saved, ctx.settings)
        return ((None,) * NUM_SETTINGS) + flattened(gradients, p) + tuple(gradients.branches)
