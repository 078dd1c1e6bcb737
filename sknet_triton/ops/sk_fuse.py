"""The operator ``sknet_triton::sk_fuse``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sknet_kernels.layout import evenly
from sknet_triton import reference
from sknet_triton.backend import NAMESPACE, has_kernels, refuse_forward_mode


@torch.library.custom_op(f"{NAMESPACE}::sk_fuse", mutates_args=())
def sk_fuse(branches: Sequence[Tensor], reduction: str) -> Tensor:
    """Reduces the sum of M branches [B, C, *spatial] over space to [B, C]: "mean" or "sum"."""
    refuse_forward_mode("sk_fuse")
    if not has_kernels(branches[0]):
        return reference.sk_fuse(branches, reduction)
    from sknet_kernels.sk_fuse import sk_fuse_fwd

    return sk_fuse_fwd(tuple(map(evenly, branches)), reduction=reduction)


@sk_fuse.register_fake
def _(branches: Sequence[Tensor], reduction: str) -> Tensor:
    return branches[0].new_empty(branches[0].shape[:2])


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], str], output: Tensor) -> None:
    branches, ctx.reduction = inputs
    ctx.shape, ctx.num_branches = branches[0].shape, len(branches)


def _backward(ctx: Any, dout: Tensor) -> tuple[list[Tensor], None]:
    # The gradient of every branch is one stride-0 view: no kernel, and nothing of full size.
    return [reference.sk_fuse_bwd(dout, ctx.shape, ctx.reduction)] * ctx.num_branches, None


sk_fuse.register_autograd(_backward, setup_context=_setup_context)
