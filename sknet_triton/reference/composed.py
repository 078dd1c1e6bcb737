"""fuse and select with batch norm and ReLU inside, composed of PyTorch's own operators."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from sknet_triton.reference.common import accumulation_dtype, cast, no_autocast
from sknet_triton.reference.sk_fuse import pooled
from sknet_triton.reference.sk_select import sk_select

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


def composed(
    branches: Sequence[Tensor],
    norms: Sequence[BatchNormArgs],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc1_norm: BatchNormArgs,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes V = sum of a_i u_i, as `functional.sk_fuse_select` says, for eager PyTorch.

    Every operator is PyTorch's, so every kind of derivative is. What it keeps for the backward is
    the branches and the u_i. The norms agree in ``batch_stats``; no process group is known here.

    Returns:
        V in the dtype of the branches; mean and unbiased variance of the branches [2, M, C] and of
        fc1's output [2, d] in the accumulation dtype, None where running ones were taken.
    """
    first = branches[0]
    dtype = accumulation_dtype(first.dtype)
    with no_autocast(first):
        kept, statistics = _statistics(first, norms)
        maps = [
            _normalised(x, norm, *pair).relu_()
            for x, norm, pair in zip(branches, norms, statistics, strict=True)
        ]
        hidden = F.linear(pooled(maps), cast(fc1_weight, dtype), cast(fc1_bias, dtype))
        fc1_kept, (fc1_statistics,) = _statistics(hidden, [fc1_norm])
        z = _normalised(hidden, fc1_norm, *fc1_statistics).relu_()
        logits = F.linear(z, cast(fc2_weight, dtype), cast(fc2_bias, dtype))
        out = sk_select(maps, logits.view(first.shape[0], len(maps), first.shape[1]))
    return out, kept, None if fc1_kept is None else fc1_kept[:, 0]


def _statistics(
    x: Tensor, norms: Sequence[BatchNormArgs]
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """Returns room [2, n, C] for the batch's statistics of x, and mean and variance of every norm.

    Those are views of the room, or the running ones.
    """
    dtype = accumulation_dtype(x.dtype)
    if not norms[0].batch_stats:
        return None, [(cast(n.running_mean, dtype), cast(n.running_var, dtype)) for n in norms]
    room = x.new_zeros((2, len(norms), x.shape[1]), dtype=dtype)
    rows = room.flatten(0, 1).unbind()
    return room, list(zip(rows[: len(norms)], rows[len(norms) :], strict=True))


def _normalised(x: Tensor, norm: BatchNormArgs, mean: Tensor | None, var: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    weight, bias = cast(norm.weight, dtype), cast(norm.bias, dtype)
    # At momentum 1 the room holds the batch's mean and unbiased variance and nothing else.
    return F.batch_norm(x, mean, var, weight, bias, norm.batch_stats, 1.0, norm.eps)
