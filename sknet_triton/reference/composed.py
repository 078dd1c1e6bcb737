"""fuse and select with batch norm and ReLU inside, composed of PyTorch's own operators."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from sknet_kernels.norms import Norms
from sknet_triton.reference.common import accumulation_dtype, cast, no_autocast
from sknet_triton.reference.sk_fuse import pooled
from sknet_triton.reference.sk_select import sk_select


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
        maps, kept = _activated(branches, norms)
        hidden = _product(pooled(maps), fc1_weight, fc1_bias)
        (z,), fc1_kept = _activated([hidden], fc1_norm)
        logits = _product(z, fc2_weight, fc2_bias)
        out = sk_select(maps, logits.view(B, len(maps), C))
    return out, kept, None if fc1_kept is None else fc1_kept[:, 0]


def _activated(xs: Sequence[Tensor], norms: Norms) -> tuple[list[Tensor], Tensor | None]:
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


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, cast(weight, x.dtype).flatten(1), cast(bias, x.dtype))
