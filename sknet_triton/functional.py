"""The two stages as functions: they check their arguments and choose the implementation.

Branches come as a list or tuple of M tensors [B, C, *spatial] with 1, 2 or 3 spatial axes, or as
one stacked tensor with ``branch_dim`` naming the axis of length M. A list is never stacked, and a
stacked tensor is only viewed. Any strides are right; contiguous and channels_last are fast. A
crop, whose rows do not lie evenly in memory, costs one copy of that branch on the Triton path.
torch.fx does not look into them: a graph that it traces calls them.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sknet_kernels.norms import Norms
from sknet_triton import fused, ops, reference
from sknet_triton.backend import takes_triton
from sknet_triton.checks import (
    BatchNormArgs,
    check_fuse_select,
    check_limits,
    check_logits,
    checked_branches,
)

__all__ = ["BatchNormArgs", "FuseSelect", "sk_fuse", "sk_fuse_select", "sk_select"]

Reduction = Literal["mean", "sum"]
Activation = Literal["softmax", "sigmoid"]


@torch.fx.wrap
def sk_fuse(
    branches: Sequence[Tensor] | Tensor,
    *,
    reduction: Reduction = "mean",
    branch_dim: int | None = None,
) -> Tensor:
    """Averages the sum of the branches over space (Li et al. 2019, section 3.1, eqs. 1 and 2).

    Args:
        branches: M tensors [B, C, *spatial] of one shape, dtype and device, or one tensor that
            stacks them along ``branch_dim``. Floating point; sums are kept in float32, or in
            float64 for float64 input.
        reduction: ``"mean"`` over space, as published, or ``"sum"``, as in S2-MLPv2.
        branch_dim: the axis of length M where ``branches`` is one tensor.

    Returns:
        [B, C] in the dtype of the branches.

    Raises:
        TypeError: a branch is no tensor or not floating point, or ``branch_dim`` is missing or
            superfluous.
        ValueError: the branches are none, differ, have no spatial axis or too many of them, or
            outnumber what the Triton kernels take; or ``reduction`` is unknown.
    """
    xs = checked_branches(branches, branch_dim)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if _takes_triton(xs):
        pooled: Tensor = ops.sk_fuse(xs, reduction)
        return pooled
    return reference.sk_fuse(xs, reduction)


@torch.fx.wrap
def sk_select(
    branches: Sequence[Tensor] | Tensor,
    logits: Tensor,
    *,
    activation: Activation | None = "softmax",
    branch_dim: int | None = None,
) -> Tensor:
    """Weighs the branches by a softmax over them and adds (section 3.1, eqs. 5 and 6).

    Args:
        branches: as in `sk_fuse`.
        logits: [B, M, C], of any strides and any floating dtype.
        activation: makes weights of the logits: ``"softmax"`` over M, as published; ``"sigmoid"``
            of each, as ResNeSt at radix 1; None where ``logits`` are the weights.
        branch_dim: the axis of length M where ``branches`` is one tensor.

    Returns:
        [B, C, *spatial] in the dtype of the branches and in the first one's memory format,
        contiguous or channels_last; the Triton kernels keep any dense order of its axes.

    Raises:
        TypeError: as in `sk_fuse`, or ``logits`` is not a floating-point tensor.
        ValueError: as in `sk_fuse`, or ``logits`` has another shape or device, or ``activation``
            is unknown.
    """
    xs = checked_branches(branches, branch_dim)
    check_logits(logits, xs)
    if activation is not None and activation not in get_args(Activation):
        names = ", ".join(map(repr, get_args(Activation)))
        raise ValueError(f"activation: expected {names} or None, got {activation!r}")
    name = activation or "none"
    if _takes_triton(xs):
        out: Tensor = ops.sk_select(xs, logits, name)
        return out
    return reference.sk_select(xs, logits, name)


class FuseSelect(NamedTuple):
    """What `sk_fuse_select` returns.

    Attributes:
        out: V, [B, C, *spatial] in the dtype and layout of the first branch.
        mean: the batch's mean of every branch [M, C]; None where running statistics were taken.
        var: the unbiased variance, likewise, as ``running_var`` keeps it.
        fc1_mean: the batch's mean of fc1's output [d], or None.
        fc1_var: the unbiased variance, likewise.
    """

    out: Tensor
    mean: Tensor | None
    var: Tensor | None
    fc1_mean: Tensor | None
    fc1_var: Tensor | None


@torch.fx.wrap
def sk_fuse_select(
    branches: Sequence[Tensor] | Tensor,
    norms: Sequence[BatchNormArgs],
    fc1_weight: Tensor,
    fc1_norm: BatchNormArgs,
    fc2_weight: Tensor,
    *,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    branch_dim: int | None = None,
) -> FuseSelect:
    """Carries out everything between the branches' convolutions and V (section 3.1).

    u_i = ReLU(norm_i(branch_i)); s = average over space of their sum;
    z = ReLU(fc1_norm(fc1 s)); a = softmax over i of fc2 z; V = sum of a_i u_i. Training moves
    6M + 3 passes over a branch and saves the branches and small tensors; inference moves 2M + 1.
    The MLP is computed in float32 (float64 for float64 branches), under autocast too.

    Args:
        branches: as in `sk_fuse`: the convolutions' outputs, not normalised.
        norms: one a branch; they agree in eps, batch_stats and process_group.
        fc1_weight: [d, C].
        fc1_norm: of fc1's output.
        fc2_weight: [M * C, d], branch-major.
        fc1_bias: [d].
        fc2_bias: [M * C].
        branch_dim: as in `sk_fuse`.

    Raises:
        TypeError: as in `sk_fuse`.
        ValueError: as in `sk_fuse`; a shape does not fit; the norms disagree; running statistics
            are missing; or a batch has one value a channel where its statistics are taken.
    """
    xs = checked_branches(branches, branch_dim)
    check_fuse_select(xs, norms, fc1_weight, fc1_norm, fc2_weight)
    # That of all norms that take statistics, which the check has seen to.
    groups = [n.process_group for n in (norms[0], fc1_norm) if n.batch_stats]
    arguments = fused.Arguments(
        xs, _norms(norms), fc1_weight, fc1_bias, _norms([fc1_norm]), fc2_weight, fc2_bias
    )
    group = groups[0] if groups else None
    out, kept, fc1_kept = fused.fuse_select(fused.way_of(xs[0]), arguments, group)
    mean, var = (None, None) if kept is None else kept
    fc1_mean, fc1_var = (None, None) if fc1_kept is None else fc1_kept
    return FuseSelect(out, mean, var, fc1_mean, fc1_var)


def _norms(norms: Sequence[BatchNormArgs]) -> Norms:
    return Norms(
        tuple(None if n.batch_stats else n.running_mean for n in norms),
        tuple(None if n.batch_stats else n.running_var for n in norms),
        tuple(n.weight for n in norms),
        tuple(n.bias for n in norms),
        norms[0].eps,
    )


def _takes_triton(xs: Sequence[Tensor]) -> bool:
    if not takes_triton(xs[0]):
        return False
    check_limits(xs)
    return True
