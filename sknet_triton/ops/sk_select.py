"""The operators ``sknet_triton::sk_select`` and ``sknet_triton::sk_select_bwd``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sknet_kernels.layout import empty_like_branch, evenly
from sknet_triton import reference
from sknet_triton.backend import NAMESPACE, has_kernels, needs_plain_backward, refuse_forward_mode


@torch.library.custom_op(f"{NAMESPACE}::sk_select", mutates_args=())
def sk_select(branches: Sequence[Tensor], logits: Tensor, activation: str) -> Tensor:
    """Weighs M branches [B, C, *spatial] by the activation of logits [B, M, C].

    The activation is "softmax" over M, "sigmoid" or "none".
    """
    refuse_forward_mode("sk_select")
    if not has_kernels(branches[0]):
        out = reference.sk_select(branches, logits, activation)
        return empty_like_branch(branches[0]).copy_(out)
    from sknet_kernels.sk_select import sk_select_fwd

    out = empty_like_branch(branches[0])
    sk_select_fwd(out, tuple(map(evenly, branches)), logits, activation=activation)
    return out


@sk_select.register_fake
def _(branches: Sequence[Tensor], logits: Tensor, activation: str) -> Tensor:
    return empty_like_branch(branches[0])


@torch.library.custom_op(f"{NAMESPACE}::sk_select_bwd", mutates_args=())
def sk_select_bwd(
    dout: Tensor, branches: Sequence[Tensor], logits: Tensor, activation: str
) -> tuple[list[Tensor], Tensor]:
    """Returns the gradients of `sk_select` for every branch and for the logits."""
    refuse_forward_mode("sk_select_bwd")
    if not has_kernels(dout):
        dbranches, dlogits = reference.sk_select_bwd(dout, branches, logits, activation)
        laid_out = [
            empty_like_branch(x).copy_(dx) for x, dx in zip(branches, dbranches, strict=True)
        ]
        return laid_out, dlogits.contiguous()
    from sknet_kernels.sk_select import sk_select_bwd as launch

    dbranches = [empty_like_branch(x) for x in branches]
    dxs, xs = tuple(dbranches), tuple(map(evenly, branches))
    return dbranches, launch(dxs, evenly(dout), xs, logits, activation=activation)


@sk_select_bwd.register_fake
def _(
    dout: Tensor, branches: Sequence[Tensor], logits: Tensor, activation: str
) -> tuple[list[Tensor], Tensor]:
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return [empty_like_branch(x) for x in branches], dlogits


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor, str], output: Tensor) -> None:
    branches, logits, ctx.activation = inputs
    ctx.save_for_backward(logits, *branches)


def _backward(ctx: Any, dout: Tensor) -> tuple[list[Tensor], Tensor, None]:
    logits, *branches = ctx.saved_tensors
    compute = reference.sk_select_bwd if needs_plain_backward(dout) else sk_select_bwd
    dbranches, dlogits = compute(dout, branches, logits, ctx.activation)
    return dbranches, dlogits, None


sk_select.register_autograd(_backward, setup_context=_setup_context)
