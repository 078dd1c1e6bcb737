"""The operators ``sknet_triton::sk_fuse_select`` and ``sknet_triton::sk_fuse_select_bwd``.

The formulas are those of `reference.sk_fuse_select`; only the passes over full-size tensors are
Triton's.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sknet_kernels.layout import empty_like_branch
from sknet_triton.backend import has_kernels, needs_plain_backward
from sknet_triton.ops.namespace import NAMESPACE, refuse_forward_mode
from sknet_triton.reference.common import accumulation_dtype, no_autocast
from sknet_triton.reference.sk_fuse_select import (
    NUM_PARAMETERS,
    NUM_SETTINGS,
    NUM_SMALL,
    Gradients,
    Parameters,
    Results,
    Settings,
    backward,
    differentiable_backward,
    flattened,
    forward,
)
from sknet_triton.reference.stages import REFERENCE, Stages


@torch.library.custom_op(f"{NAMESPACE}::sk_fuse_select", mutates_args=())
def sk_fuse_select(
    branches: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc1_gamma: Tensor,
    fc1_beta: Tensor,
    fc1_running_mean: Tensor | None,
    fc1_running_var: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float,
    fc1_eps: float,
    batch_stats: bool,
    fc1_batch_stats: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of `Results` from the fields of `Parameters` and `Settings`."""
    refuse_forward_mode("sk_fuse_select")
    p = Parameters(
        gamma,
        beta,
        running_mean,
        running_var,
        fc1_weight,
        fc1_bias,
        fc1_gamma,
        fc1_beta,
        fc1_running_mean,
        fc1_running_var,
        fc2_weight,
        fc2_bias,
    )
    settings = Settings(eps, fc1_eps, batch_stats, fc1_batch_stats, group)
    with no_autocast(branches[0]):
        r = forward(_stages(branches[0]), branches, p, settings)
    return r._replace(out=_in_layout_of(branches[0], r.out))


@sk_fuse_select.register_fake
def _(
    branches: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc1_gamma: Tensor,
    fc1_beta: Tensor,
    fc1_running_mean: Tensor | None,
    fc1_running_var: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float,
    fc1_eps: float,
    batch_stats: bool,
    fc1_batch_stats: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = branches[0]
    (B, C), M, d = x.shape[:2], len(branches), fc1_weight.shape[0]
    empty = functools.partial(x.new_empty, dtype=accumulation_dtype(x.dtype))
    stats = (M, C) if batch_stats else (0,)
    fc1_stats = (d,) if fc1_batch_stats else (0,)
    return (
        empty_like_branch(x),
        empty(stats),
        empty(stats),
        empty(fc1_stats),
        empty(fc1_stats),
        empty((2,)),
        empty((B, C)),
        empty((B, d)),
        empty((B, M, C)),
    )


@torch.library.custom_op(f"{NAMESPACE}::sk_fuse_select_bwd", mutates_args=())
def sk_fuse_select_bwd(
    dout: Tensor,
    branches: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    small: Sequence[Tensor],
    eps: float,
    fc1_eps: float,
    batch_stats: bool,
    fc1_batch_stats: bool,
    group: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of `Gradients`; ``small`` are the fields of `Results` but V."""
    refuse_forward_mode("sk_fuse_select_bwd")
    settings = Settings(eps, fc1_eps, batch_stats, fc1_batch_stats, group)
    saved = Results(branches[0], *small)
    p = Parameters(*parameters)  # type: ignore[arg-type]  # None only where Parameters allows it
    with no_autocast(dout):
        g = backward(_stages(dout), dout, branches, p, saved, settings)
    dbranches = [_in_layout_of(x, dx) for x, dx in zip(branches, g.branches, strict=True)]
    return g._replace(branches=dbranches)


@sk_fuse_select_bwd.register_fake
def _(
    dout: Tensor,
    branches: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    small: Sequence[Tensor],
    eps: float,
    fc1_eps: float,
    batch_stats: bool,
    fc1_batch_stats: bool,
    group: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = Parameters(*parameters)  # type: ignore[arg-type]  # None only where Parameters allows it
    return (
        [empty_like_branch(x) for x in branches],
        _empty(p.gamma),
        _empty(p.beta),
        _empty(p.fc1_weight),
        p.fc1_weight.new_empty(p.fc1_weight.shape[0]),
        _empty(p.fc1_gamma),
        _empty(p.fc1_beta),
        _empty(p.fc2_weight),
        p.fc2_weight.new_empty(p.fc2_weight.shape[0]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    branches, *rest = inputs
    parameters, settings = rest[:NUM_PARAMETERS], rest[NUM_PARAMETERS:]
    ctx.settings = settings
    ctx.num_branches = len(branches)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*branches, *parameters, *output[1:])


def _backward(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    settings = (None,) * NUM_SETTINGS
    if dout is None:
        return ([None] * ctx.num_branches, *(None,) * NUM_PARAMETERS, *settings)
    saved = ctx.saved_tensors
    branches, small = saved[: ctx.num_branches], saved[-NUM_SMALL:]
    parameters = saved[ctx.num_branches : -NUM_SMALL]
    p = Parameters(*parameters)
    if needs_plain_backward(dout):
        gradients = differentiable_backward(dout, branches, p, Settings(*ctx.settings))
    else:
        gradients = Gradients(*sk_fuse_select_bwd(dout, branches, parameters, small, *ctx.settings))
    return (gradients.branches, *flattened(gradients, p), *settings)


sk_fuse_select.register_autograd(_backward, setup_context=_setup_context)


def _stages(x: Tensor) -> Stages:
    return _triton_stages() if has_kernels(x) else REFERENCE


@functools.cache
def _triton_stages() -> Stages:
    from sknet_kernels.sk_fuse import sk_fuse_fwd
    from sknet_kernels.sk_fuse_select import sk_fuse_select_dx, sk_fuse_select_sums
    from sknet_kernels.sk_moments import sk_moments
    from sknet_kernels.sk_select import sk_select_fwd

    return Stages(sk_moments, sk_fuse_fwd, sk_select_fwd, sk_fuse_select_sums, sk_fuse_select_dx)


def _in_layout_of(x: Tensor, out: Tensor) -> Tensor:
    expected = empty_like_branch(x)
    return out if out.stride() == expected.stride() else expected.copy_(out)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
