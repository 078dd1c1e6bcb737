"""The two stages as functions: they check their arguments and choose the implementation.

Branches come as a list or tuple of M tensors [B, C, *spatial] with 1, 2 or 3 spatial axes, or as
one stacked tensor with ``branch_dim`` naming the axis of length M. A list is never stacked, and a
stacked tensor is only viewed. Any strides are right; contiguous and channels_last are fast. A
crop, whose rows do not lie evenly in memory, costs one copy of that branch on the Triton path.
torch.fx does not look into them: a graph that it traces calls them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sknet_kernels.config import MAX_BRANCHES
from sknet_triton import ops, reference
from sknet_triton.backend import in_transform, takes_triton
from sknet_triton.reference.sk_fuse_select import Parameters, Results, Settings

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
    xs = _checked_branches(branches, branch_dim)
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
    xs = _checked_branches(branches, branch_dim)
    _check_logits(logits, xs)
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation: expected 'softmax', 'sigmoid' or None, got {activation!r}")
    name = activation or "none"
    if _takes_triton(xs):
        out: Tensor = ops.sk_select(xs, logits, name)
        return out
    return reference.sk_select(xs, logits, name)


@dataclass(frozen=True)
class BatchNormArgs:
    """What `sk_fuse_select` needs of one batch norm over n channels.

    Attributes:
        weight: [n], or None for ones.
        bias: [n], or None for zeros.
        running_mean: [n]; needed where ``batch_stats`` is False.
        running_var: [n]; needed where ``batch_stats`` is False.
        eps: added to the variance.
        batch_stats: whether to normalise by the statistics of the batch, as in training.
        group: name of the process group whose joint batch is meant; empty for this process.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5
    batch_stats: bool = True
    group: str = ""


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
        norms: one a branch; they agree in eps, batch_stats and group.
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
    xs = _checked_branches(branches, branch_dim)
    norm = norms[0] if norms else fc1_norm
    _check_section(xs, norms, fc1_weight, fc1_norm, fc2_weight)
    parameters = Parameters(
        torch.stack([_or_constant(n.weight, xs[0].shape[1], fc1_weight, 1.0) for n in norms]),
        torch.stack([_or_constant(n.bias, xs[0].shape[1], fc1_weight, 0.0) for n in norms]),
        None if norm.batch_stats else torch.stack([_given(n.running_mean) for n in norms]),
        None if norm.batch_stats else torch.stack([_given(n.running_var) for n in norms]),
        fc1_weight,
        fc1_bias,
        _or_constant(fc1_norm.weight, fc1_weight.shape[0], fc1_weight, 1.0),
        _or_constant(fc1_norm.bias, fc1_weight.shape[0], fc1_weight, 0.0),
        None if fc1_norm.batch_stats else _given(fc1_norm.running_mean),
        None if fc1_norm.batch_stats else _given(fc1_norm.running_var),
        fc2_weight,
        fc2_bias,
    )
    # The one group of the norms that take statistics, which _check_section has seen to.
    group = norm.group if norm.batch_stats else fc1_norm.group if fc1_norm.batch_stats else ""
    settings = Settings(norm.eps, fc1_norm.eps, norm.batch_stats, fc1_norm.batch_stats, group)
    if _takes_triton(xs):
        results = Results(*ops.sk_fuse_select(xs, *parameters, *settings))
    elif in_transform():
        results = reference.sk_fuse_select(xs, parameters, settings)
    else:
        # torch leaves Function.apply untyped.
        results = Results(*reference.SKFuseSelect.apply(*settings, *parameters, *xs))  # type: ignore[no-untyped-call]
    return _with_unbiased_variances(results, settings)


def _with_unbiased_variances(r: Results, settings: Settings) -> FuseSelect:
    mean, var, fc1_mean, fc1_var = None, None, None, None
    if settings.batch_stats:
        mean, var = r.mean, r.var * _bessel(r.counts[1])
    if settings.fc1_batch_stats:
        fc1_mean, fc1_var = r.fc1_mean, r.fc1_var * _bessel(r.counts[0])
    return FuseSelect(r.out, mean, var, fc1_mean, fc1_var)


def _bessel(count: Tensor) -> Tensor:
    return count / (count - 1)


def _or_constant(x: Tensor | None, size: int, like: Tensor, value: float) -> Tensor:
    return like.new_full((size,), value) if x is None else x


def _given(statistic: Tensor | None) -> Tensor:
    if statistic is None:
        raise ValueError(
            "norms: running_mean and running_var are needed where batch_stats is False, got None"
        )
    return statistic


def _check_section(
    xs: list[Tensor],
    norms: Sequence[BatchNormArgs],
    fc1_weight: Tensor,
    fc1_norm: BatchNormArgs,
    fc2_weight: Tensor,
) -> None:
    (B, C), M = xs[0].shape[:2], len(xs)
    if len(norms) != M:
        raise ValueError(f"norms: expected one a branch, {M}, got {len(norms)}")
    for i, n in enumerate(norms):
        ours, first = (n.eps, n.batch_stats, n.group), norms[0]
        if ours != (first.eps, first.batch_stats, first.group):
            raise ValueError(
                f"norms[{i}]: expected eps, batch_stats and group of norms[0], "
                f"{(first.eps, first.batch_stats, first.group)}, got {ours}"
            )
    taken = [n.group for n in (norms[0], fc1_norm) if n.batch_stats]
    if len(set(taken)) > 1:
        raise ValueError(
            f"fc1_norm: expected the group of the norms, {taken[0]!r}, got {taken[1]!r}"
        )
    if fc1_weight.dim() != 2 or fc1_weight.shape[1] != C:
        raise ValueError(
            f"fc1_weight: expected shape [d, C] with C = {C}, got {tuple(fc1_weight.shape)}"
        )
    if tuple(fc2_weight.shape) != (M * C, fc1_weight.shape[0]):
        raise ValueError(
            f"fc2_weight: expected shape [M * C, d] = {(M * C, fc1_weight.shape[0])}, "
            f"got {tuple(fc2_weight.shape)}"
        )
    if norms[0].batch_stats and not norms[0].group and B * math.prod(xs[0].shape[2:]) < 2:
        raise ValueError(
            "branches: batch statistics need more than one value a channel, "
            f"got shape {tuple(xs[0].shape)}"
        )
    if fc1_norm.batch_stats and not fc1_norm.group and B < 2:
        raise ValueError(f"branches: fc1's batch statistics need a batch of at least 2, got {B}")


def _checked_branches(branches: Sequence[Tensor] | Tensor, branch_dim: int | None) -> list[Tensor]:
    xs = _as_list(branches, branch_dim)
    if not xs:
        raise ValueError("branches: expected at least one tensor, got none")
    for i, x in enumerate(xs):
        _check_branch(x, i, xs[0])
    first = xs[0]
    if not 3 <= first.dim() <= 5:
        raise ValueError(
            "branches: expected [B, C, *spatial] with 1, 2 or 3 spatial axes, "
            f"got shape {tuple(first.shape)}"
        )
    if math.prod(first.shape[2:]) == 0:
        raise ValueError(
            f"branches: the average needs at least one position, got shape {tuple(first.shape)}"
        )
    return xs


def _as_list(branches: Sequence[Tensor] | Tensor, branch_dim: int | None) -> list[Tensor]:
    if isinstance(branches, Tensor):
        if branch_dim is None:
            raise TypeError(
                "branches: expected a sequence of tensors, or one tensor together with branch_dim, "
                f"got one tensor of shape {tuple(branches.shape)} and branch_dim=None"
            )
        if not -branches.dim() <= branch_dim < branches.dim():
            raise ValueError(
                f"branch_dim: expected an axis of a tensor with {branches.dim()} axes, "
                f"got {branch_dim}"
            )
        return list(branches.unbind(branch_dim))
    if not isinstance(branches, (list, tuple)):
        raise TypeError(
            f"branches: expected a list or tuple of tensors, got {type(branches).__name__}"
        )
    if branch_dim is not None:
        raise TypeError(
            f"branch_dim: only for one stacked tensor, got {branch_dim} with a sequence of branches"
        )
    return list(branches)


def _check_branch(x: Tensor, i: int, first: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"branches[{i}]: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"branches[{i}]: expected a floating dtype, got {x.dtype}")
    if x.shape != first.shape:
        raise ValueError(
            f"branches[{i}]: expected the shape of branches[0], {tuple(first.shape)}, "
            f"got {tuple(x.shape)}"
        )
    if x.dtype != first.dtype:
        raise ValueError(
            f"branches[{i}]: expected the dtype of branches[0], {first.dtype}, got {x.dtype}"
        )
    if x.device != first.device:
        raise ValueError(
            f"branches[{i}]: expected the device of branches[0], {first.device}, got {x.device}"
        )


def _check_logits(logits: Tensor, xs: list[Tensor]) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating dtype, got {logits.dtype}")
    expected = (xs[0].shape[0], len(xs), xs[0].shape[1])
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"logits: expected shape [B, M, C] = {expected}, got {tuple(logits.shape)}"
        )
    if logits.device != xs[0].device:
        raise ValueError(
            f"logits: expected the device of the branches, {xs[0].device}, got {logits.device}"
        )


def _takes_triton(xs: list[Tensor]) -> bool:
    if not takes_triton(xs[0]):
        return False
    if len(xs) > MAX_BRANCHES:
        raise ValueError(
            f"branches: the triton backend takes at most {MAX_BRANCHES}, got {len(xs)}; "
            "use_backend('reference') takes any number"
        )
    if xs[0].dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            "branches: the triton backend takes float16, bfloat16, float32 and float64, "
            f"got {xs[0].dtype}"
        )
    return True
