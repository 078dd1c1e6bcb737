"""The two stages as functions: they check their arguments and choose the implementation.

Branches come as a list or tuple of M tensors [B, C, *spatial] with 1, 2 or 3 spatial axes, or as
one stacked tensor with ``branch_dim`` naming the axis of length M. A list is never stacked, and a
stacked tensor is only viewed. Any strides are right; contiguous and channels_last are fast. A
crop, whose rows do not lie evenly in memory, costs one copy of that branch on the Triton path.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sknet_kernels.config import MAX_BRANCHES
from sknet_triton import reference
from sknet_triton.backend import takes_triton


def sk_fuse(branches: Sequence[Tensor] | Tensor, *, branch_dim: int | None = None) -> Tensor:
    """Averages the sum of the branches over space (Li et al. 2019, section 3.1, eqs. 1 and 2).

    Args:
        branches: M tensors [B, C, *spatial] of one shape, dtype and device, or one tensor that
            stacks them along ``branch_dim``. Floating point; sums are kept in float32, or in
            float64 for float64 input.
        branch_dim: the axis of length M where ``branches`` is one tensor.

    Returns:
        [B, C] in the dtype of the branches.

    Raises:
        TypeError: a branch is no tensor or not floating point, or ``branch_dim`` is missing or
            superfluous.
        ValueError: the branches are none, differ, have no spatial axis or too many of them, or
            outnumber what the Triton kernels take.
    """
    xs = _checked_branches(branches, branch_dim)
    if _takes_triton(xs):
        from sknet_triton import ops

        pooled: Tensor = ops.sk_fuse(xs)
        return pooled
    return reference.sk_fuse(xs)


def sk_select(
    branches: Sequence[Tensor] | Tensor, logits: Tensor, *, branch_dim: int | None = None
) -> Tensor:
    """Weighs the branches by a softmax over them and adds (section 3.1, eqs. 5 and 6).

    Args:
        branches: as in `sk_fuse`.
        logits: [B, M, C], of any strides and any floating dtype. The softmax runs over M.
        branch_dim: the axis of length M where ``branches`` is one tensor.

    Returns:
        [B, C, *spatial] in the dtype and the memory layout of the first branch.

    Raises:
        TypeError: as in `sk_fuse`, or ``logits`` is not a floating-point tensor.
        ValueError: as in `sk_fuse`, or ``logits`` has another shape or device.
    """
    xs = _checked_branches(branches, branch_dim)
    _check_logits(logits, xs)
    if _takes_triton(xs):
        from sknet_triton import ops

        out: Tensor = ops.sk_select(xs, logits)
        return out
    return reference.sk_select(xs, logits)


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
    if first.shape[2:].numel() == 0:
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
