"""The steps of `sk_fuse_select`, between the convolutions and V, by launchers; imports triton.

Branches, V and their gradients are [B, C, *spatial] and lie evenly (see `layout.evenly`). Each step
is a pass with the small launch that joins its partial sums, or a small launch alone.
"""

from collections.abc import Sequence

from torch import Tensor

from sknet_kernels.layout import empty_like_branch, positions
from sknet_kernels.norms import Norms, Running
from sknet_kernels.sk_fuse import sk_fuse_partials
from sknet_kernels.sk_fuse_mlp import sk_channels_bwd, sk_hidden, sk_hidden_bwd, sk_logits
from sknet_kernels.sk_fuse_select import sk_fuse_select_dx, sk_fuse_select_sums
from sknet_kernels.sk_moments import sk_moments
from sknet_kernels.sk_select import sk_select_fwd

__all__ = ["channels_bwd", "dx", "hidden", "hidden_bwd", "logits", "moments", "out"]

logits, channels_bwd = sk_logits, sk_channels_bwd


def moments(
    branches: Sequence[Tensor], running: Running | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns the batch's statistics [2, M, C], as they are applied and as they are kept.

    With ``running`` the latter are not returned: it is moved towards them.
    """
    return sk_moments(tuple(branches), running)


def hidden(
    branches: Sequence[Tensor], norms: Norms, fc1_weight: Tensor, fc1_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the pooled average [B, C] and fc1's output [B, d]."""
    partials = sk_fuse_partials(tuple(branches), norms)
    return sk_hidden(partials, positions(branches[0]), fc1_weight, fc1_bias)


def out(branches: Sequence[Tensor], logits: Tensor, norms: Norms) -> Tensor:
    """Returns V in the layout of the first branch."""
    v = empty_like_branch(branches[0])
    sk_select_fwd(v, tuple(branches), logits, norms)
    return v


def hidden_bwd(
    dout: Tensor, branches: Sequence[Tensor], logits: Tensor, norms: Norms, fc2_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the four sums [4, B, M, C], dlogits [B, M, C] and dz [B, d]."""
    partials = sk_fuse_select_sums(dout, tuple(branches), norms)
    return sk_hidden_bwd(partials, logits, norms, fc2_weight)


def dx(
    dout: Tensor,
    branches: Sequence[Tensor],
    logits: Tensor,
    norms: Norms,
    share: Tensor,
    drift: Tensor | None,
) -> tuple[Tensor, ...]:
    """Returns the gradients of the branches, each in the layout of its branch."""
    dbranches = tuple([empty_like_branch(x) for x in branches])
    sk_fuse_select_dx(dbranches, dout, tuple(branches), norms, logits, share, drift)
    return dbranches
