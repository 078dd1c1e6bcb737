"""The launchers on tensors [B, C, *spatial], as operators call them, for the tests."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sknet_kernels.layout import empty_like_branch, evenly, positions
from sknet_kernels.norms import Norms
from sknet_kernels.sk_fuse import sk_fuse_fwd, sk_fuse_partials
from sknet_kernels.sk_fuse_select import sk_fuse_select_dx, sk_fuse_select_sums
from sknet_kernels.sk_moments import sk_moments
from sknet_kernels.sk_select import sk_select_bwd, sk_select_fwd


def read(xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the tensors as kernels read them."""
    return tuple(evenly(x) for x in xs)


def fuse(xs: Sequence[Tensor], **options: Any) -> Tensor:
    """Returns the pooled branches [B, C]."""
    return sk_fuse_fwd(read(xs), **options)


def fuse_norm(xs: Sequence[Tensor], norms: Norms, **options: Any) -> Tensor:
    """Returns the pooled branches [B, C], normalised and rectified."""
    partials = sk_fuse_partials(read(xs), norms, **options)
    return partials.sum(0) / positions(xs[0])


def select(
    xs: Sequence[Tensor], logits: Tensor, norms: Norms | None = None, **options: Any
) -> Tensor:
    """Returns the weighed branches, in the layout of the first."""
    out = empty_like_branch(xs[0])
    sk_select_fwd(out, read(xs), logits, norms, **options)
    return out


def select_bwd(
    dout: Tensor, xs: Sequence[Tensor], logits: Tensor, **options: Any
) -> tuple[list[Tensor], Tensor]:
    """Returns the gradients of the branches and of the logits."""
    dxs = [empty_like_branch(x) for x in xs]
    dlogits = sk_select_bwd(tuple(dxs), evenly(dout), read(xs), logits, **options)
    return dxs, dlogits


def moments(xs: Sequence[Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean, biased and unbiased variance [M, C]."""
    (mean, var), kept = sk_moments(read(xs), **options)
    assert kept is not None
    assert torch.equal(kept[0], mean)
    return mean, var, kept[1]


def sums(dout: Tensor, xs: Sequence[Tensor], norms: Norms, **options: Any) -> Tensor:
    """Returns the sums of the backward [4, B, M, C]."""
    return sk_fuse_select_sums(evenly(dout), read(xs), norms, **options).sum(0)


def dx(
    dout: Tensor,
    xs: Sequence[Tensor],
    norms: Norms,
    logits: Tensor,
    share: Tensor,
    drift: Tensor | None,
    **options: Any,
) -> list[Tensor]:
    """Returns the gradients of the branches."""
    dxs = [empty_like_branch(x) for x in xs]
    sk_fuse_select_dx(tuple(dxs), evenly(dout), read(xs), norms, logits, share, drift, **options)
    return dxs


def random_norms(M: int, C: int, like: Tensor) -> Norms:
    """Returns norms with gammas of both signs and a zero, in the dtype of sums over ``like``."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    mean, gamma, beta = torch.randn(3, M, C, dtype=wide, device=like.device)
    gamma[:, 0] = 0.0
    var = torch.rand(M, C, dtype=wide, device=like.device) + 0.5
    return Norms(tuple(mean), tuple(var), tuple(gamma), tuple(beta), 1e-3)
