"""What the functions take of a norm, and ask of all arguments.

A ValueError or, for what is no floating-point tensor, a TypeError names argument, rule and value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sknet_kernels.config import MAX_BRANCHES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class BatchNormArgs:
    """What `functional.sk_fuse_select` needs of one batch norm over n channels.

    Attributes:
        weight: [n], or None for ones.
        bias: [n], or None for zeros.
        running_mean: [n]; needed where ``batch_stats`` is False.
        running_var: [n]; needed where ``batch_stats`` is False.
        eps: added to the variance.
        batch_stats: whether to normalise by the statistics of the batch, as in training.
        process_group: whose joint batch is meant; None for that of this process.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5
    batch_stats: bool = True
    process_group: "ProcessGroup | None" = None


def check_fuse_select(
    xs: list[Tensor],
    norms: Sequence[BatchNormArgs],
    fc1_weight: Tensor,
    fc1_norm: BatchNormArgs,
    fc2_weight: Tensor,
) -> None:
    """Checks what `functional.sk_fuse_select` takes beside the branches."""
    C, M = xs[0].shape[1], len(xs)
    if len(norms) != M:
        raise ValueError(f"norms: expected one a branch, {M}, got {len(norms)}")
    for i, n in enumerate(norms):
        agreed, own = ((x.eps, x.batch_stats, x.process_group) for x in (norms[0], n))
        if own != agreed:
            raise ValueError(
                f"norms[{i}]: expected eps, batch_stats and process_group of norms[0], "
                f"{agreed}, got {own}"
            )
    for n in (*norms, fc1_norm):
        if not n.batch_stats and (n.running_mean is None or n.running_var is None):
            raise ValueError(
                "norms: running_mean and running_var are needed where batch_stats is False, "
                "got None"
            )
    taken = [n.process_group for n in (norms[0], fc1_norm) if n.batch_stats]
    if len(set(taken)) > 1:
        raise ValueError(
            f"fc1_norm: expected the process_group of the norms, {taken[0]}, got {taken[1]}"
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


def check_counts(x: Tensor, batch_stats: bool, fc1_batch_stats: bool) -> None:
    """Checks that a batch like ``x`` [B, C, *spatial] has the statistics that are asked of it."""
    if batch_stats and x.shape[0] * math.prod(x.shape[2:]) < 2:
        raise ValueError(
            "branches: batch statistics need more than one value a channel, "
            f"got shape {tuple(x.shape)}"
        )
    if fc1_batch_stats and x.shape[0] < 2:
        raise ValueError(
            f"branches: fc1's batch statistics need a batch of at least 2, got {x.shape[0]}"
        )


def checked_branches(branches: Sequence[Tensor] | Tensor, branch_dim: int | None) -> list[Tensor]:
    """Returns the branches as a list, where they are some, alike and have 1 to 3 spatial axes."""
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


def check_logits(logits: Tensor, xs: list[Tensor]) -> None:
    """Checks logits [B, M, C]."""
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


def check_limits(xs: Sequence[Tensor]) -> None:
    """Checks what the Triton kernels ask of the branches beyond what `checked_branches` does."""
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
