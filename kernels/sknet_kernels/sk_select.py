"""select: the sum of the branches, each weighed by a softmax over them or by another activation."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import (
    accumulator,
    branch_arguments,
    common_alignment,
    problem_of,
    tensor_arguments,
)
from sknet_kernels.config import DeviceFacts, LaunchConfig, Problem, cdiv
from sknet_kernels.jit import (
    branch_pointers,
    branch_weights,
    branch_weights_bwd,
    known_multiple,
    norm_rows,
    normalised,
    program_coordinates,
    relu,
    tile_pointers,
    zero_tiles,
)
from sknet_kernels.launch import Launch
from sknet_kernels.layout import as_bcs, empty_like_branch

_COMBINE_BLOCK = 128


@triton.jit
def _sk_select_fwd_kernel(
    out_ptr,
    out_stride_b,
    out_stride_c,
    out_stride_s,
    x_ptrs,
    x_strides_b,
    x_strides_c,
    x_strides_s,
    logits_ptr,
    logits_stride_b,
    logits_stride_m,
    logits_stride_c,
    norm_ptr,
    C,
    S,
    span,
    splits,
    NUM_BRANCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[b, c, s] = sum over i of a_i[b, c] * u_i[b, c, s], with a = ACTIVATION of logits.

    u_i is x_i, or with HAS_NORM max((x_i - mean_i) * scale_i + beta_i, 0).
    Shapes: x_i and out [B, C, S], logits [B, M, C], all of any strides; norm [M, 4, C] as in
    `norm_rows`. Arithmetic in ACC.
    Passes moved: M read, 1 written. Source: Li et al. 2019, eqs. 5 and 6.
    """
    # One program owns BLOCK_C channels of one image over `span` positions.
    pid_b, pid_c, pid_s = program_coordinates(C, splits, BLOCK_C)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    attn = branch_weights(
        logits_ptr + pid_b * logits_stride_b,
        logits_stride_m,
        logits_stride_c,
        offs_c,
        mask_c,
        NUM_BRANCHES,
        ACTIVATION,
        ACC,
    )
    if HAS_NORM:
        means = norm_rows(norm_ptr, offs_c, mask_c, C, 0, NUM_BRANCHES)
        scales = norm_rows(norm_ptr, offs_c, mask_c, C, 2, NUM_BRANCHES)
        betas = norm_rows(norm_ptr, offs_c, mask_c, C, 3, NUM_BRANCHES)
    start = pid_s * span
    stop = tl.minimum(start + span, known_multiple(S, ALIGN))
    for first in range(start, stop, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = mask_c[:, None] & (offs_s < stop)[None, :]
        out = tl.zeros([BLOCK_C, BLOCK_S], ACC)
        for i in tl.static_range(NUM_BRANCHES):
            ptrs = branch_pointers(
                x_ptrs, x_strides_b, x_strides_c, x_strides_s, i, pid_b, offs_c, offs_s, ALIGN
            )
            u = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
            if HAS_NORM:
                u = relu(normalised(u, means[i], scales[i], betas[i]))
            out += attn[i][:, None] * u
        ptrs = tile_pointers(
            out_ptr, out_stride_b, out_stride_c, out_stride_s, pid_b, offs_c, offs_s, ALIGN
        )
        tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sk_select_bwd_kernel(
    dx_ptrs,
    dx_strides_b,
    dx_strides_c,
    dx_strides_s,
    dlogits_ptr,
    dout_ptr,
    dout_stride_b,
    dout_stride_c,
    dout_stride_s,
    x_ptrs,
    x_strides_b,
    x_strides_c,
    x_strides_s,
    logits_ptr,
    logits_stride_b,
    logits_stride_m,
    logits_stride_c,
    B,
    C,
    S,
    span,
    NUM_BRANCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx_i = a_i * dout;  g_i = sum over s of dout * x_i;  dlogits_i as in `branch_weights_bwd`.

    Shapes: dx_i, dout and x_i [B, C, S] and logits [B, M, C] of any strides; dlogits [B, M, C]
    contiguous, or with SPLITS > 1 the partial g [SPLITS, B, M, C]. Sums are kept in ACC.
    Passes moved: M + 1 read, M written. Source: the derivative of Li et al. 2019, eqs. 5 and 6.
    """
    # One program owns BLOCK_C channels of one image over `span` positions.
    pid_b, pid_c, pid_s = program_coordinates(C, SPLITS, BLOCK_C)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    attn = branch_weights(
        logits_ptr + pid_b * logits_stride_b,
        logits_stride_m,
        logits_stride_c,
        offs_c,
        mask_c,
        NUM_BRANCHES,
        ACTIVATION,
        ACC,
    )
    start = pid_s * span
    stop = tl.minimum(start + span, known_multiple(S, ALIGN))
    products = zero_tiles(NUM_BRANCHES, ACC, BLOCK_C, BLOCK_S)
    for first in range(start, stop, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = mask_c[:, None] & (offs_s < stop)[None, :]
        ptrs = tile_pointers(
            dout_ptr, dout_stride_b, dout_stride_c, dout_stride_s, pid_b, offs_c, offs_s, ALIGN
        )
        dout = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
        grown = ()
        for i in tl.static_range(NUM_BRANCHES):
            ptrs = branch_pointers(
                x_ptrs, x_strides_b, x_strides_c, x_strides_s, i, pid_b, offs_c, offs_s, ALIGN
            )
            x = tl.load(ptrs, mask=mask, other=0.0)
            grown = grown + (products[i] + dout * x.to(ACC),)
            ptrs = branch_pointers(
                dx_ptrs, dx_strides_b, dx_strides_c, dx_strides_s, i, pid_b, offs_c, offs_s, ALIGN
            )
            dx = (attn[i][:, None] * dout).to(dx_ptrs[i].dtype.element_ty)
            tl.store(ptrs, dx, mask=mask)
        products = grown
    dattn = ()
    for i in tl.static_range(NUM_BRANCHES):
        dattn = dattn + (tl.sum(products[i], axis=1),)
    if SPLITS == 1:
        dattn = branch_weights_bwd(attn, dattn, NUM_BRANCHES, ACTIVATION)
    for i in tl.static_range(NUM_BRANCHES):
        offs = ((pid_s * B + pid_b) * NUM_BRANCHES + i) * C + offs_c
        tl.store(dlogits_ptr + offs, dattn[i].to(dlogits_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _sk_select_bwd_combine_kernel(
    dlogits_ptr,
    partial_ptr,
    logits_ptr,
    logits_stride_b,
    logits_stride_m,
    logits_stride_c,
    B,
    C,
    NUM_BRANCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The dlogits of `branch_weights_bwd`, with g_i the sum over k of partial[k], in order of k.

    Shapes: partial [SPLITS, B, M, C] and dlogits [B, M, C] contiguous, logits [B, M, C] of any
    strides. Passes moved: none of full size.
    """
    # One program owns BLOCK_C channels of one image.
    pid_b, pid_c, _ = program_coordinates(C, 1, BLOCK_C)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    attn = branch_weights(
        logits_ptr + pid_b * logits_stride_b,
        logits_stride_m,
        logits_stride_c,
        offs_c,
        mask_c,
        NUM_BRANCHES,
        ACTIVATION,
        ACC,
    )
    dattn = ()
    for i in tl.static_range(NUM_BRANCHES):
        total = tl.zeros([BLOCK_C], ACC)
        for k in range(SPLITS):
            offs = ((tl.cast(B, tl.int64) * k + pid_b) * NUM_BRANCHES + i) * C + offs_c
            total += tl.load(partial_ptr + offs, mask=mask_c, other=0.0)
        dattn = dattn + (total,)
    dlogits = branch_weights_bwd(attn, dattn, NUM_BRANCHES, ACTIVATION)
    for i in tl.static_range(NUM_BRANCHES):
        offs = (pid_b * NUM_BRANCHES + i) * C + offs_c
        tl.store(dlogits_ptr + offs, dlogits[i].to(dlogits_ptr.dtype.element_ty), mask=mask_c)


def sk_select_fwd(
    branches: Sequence[Tensor],
    logits: Tensor,
    norm: Tensor | None = None,
    config: LaunchConfig | None = None,
    activation: str = "softmax",
) -> Tensor:
    """Launches select: M tensors [B, C, *spatial] and logits [B, M, C] -> [B, C, *spatial].

    ``activation`` is "softmax", "sigmoid" or "none". With ``norm`` [M, 4, C] the branches are
    normalised and rectified on the fly.
    """
    out = empty_like_branch(branches[0])
    launch = sk_select_fwd_launch(
        as_bcs(out), [as_bcs(x) for x in branches], logits, norm, config, activation
    )
    launch.run(out.device)
    return out


def sk_select_bwd(
    dout: Tensor,
    branches: Sequence[Tensor],
    logits: Tensor,
    config: LaunchConfig | None = None,
    activation: str = "softmax",
) -> tuple[list[Tensor], Tensor]:
    """Launches the backward of select and returns the gradients of every branch and of logits."""
    dbranches = [empty_like_branch(x) for x in branches]
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launches = sk_select_bwd_launches(
        [as_bcs(dx) for dx in dbranches],
        dlogits,
        as_bcs(dout),
        [as_bcs(x) for x in branches],
        logits,
        config,
        activation,
    )
    for launch in launches:
        launch.run(dout.device)
    return dbranches, dlogits


def sk_select_fwd_launch(
    out: Tensor,
    xs: Sequence[Tensor],
    logits: Tensor,
    norm: Tensor | None = None,
    config: LaunchConfig | None = None,
    activation: str = "softmax",
) -> Launch:
    """Returns the launch that fills ``out`` [B, C, S] from ``xs`` [B, C, S]."""
    problem = problem_of(xs)
    config = config or LaunchConfig.elementwise(problem, DeviceFacts.of(out.device))
    return Launch(
        kernel=_sk_select_fwd_kernel,
        programs=problem.B * cdiv(problem.C, config.block_c) * config.splits,
        arguments={
            **tensor_arguments("out", out, "bcs"),
            **branch_arguments("x", xs),
            **tensor_arguments("logits", logits, "bmc"),
            "norm_ptr": norm,
            "C": problem.C,
            "S": problem.S,
            "span": config.span(problem.S),
            "splits": config.splits,
        },
        constants={
            "NUM_BRANCHES": problem.num_branches,
            "ACTIVATION": activation,
            "HAS_NORM": norm is not None,
            "ACC": accumulator(xs[0].dtype)[1],
            "ALIGN": common_alignment([out, *xs]),
            "BLOCK_C": config.block_c,
            "BLOCK_S": config.block_s,
        },
        num_warps=config.num_warps,
    )


def sk_select_bwd_launches(
    dxs: Sequence[Tensor],
    dlogits: Tensor,
    dout: Tensor,
    xs: Sequence[Tensor],
    logits: Tensor,
    config: LaunchConfig | None = None,
    activation: str = "softmax",
) -> list[Launch]:
    """Returns the launches that fill ``dxs`` [B, C, S] and ``dlogits`` [B, M, C]."""
    problem = problem_of(xs)
    config = config or LaunchConfig.reduction(
        problem, DeviceFacts.of(dout.device), sums=problem.num_branches
    )
    acc, tl_acc = accumulator(xs[0].dtype)
    split = config.splits > 1
    target = dlogits.new_empty((config.splits, *dlogits.shape), dtype=acc) if split else dlogits
    gradients = Launch(
        kernel=_sk_select_bwd_kernel,
        programs=problem.B * cdiv(problem.C, config.block_c) * config.splits,
        arguments={
            **branch_arguments("dx", dxs),
            "dlogits_ptr": target,
            **tensor_arguments("dout", dout, "bcs"),
            **branch_arguments("x", xs),
            **tensor_arguments("logits", logits, "bmc"),
            "B": problem.B,
            "C": problem.C,
            "S": problem.S,
            "span": config.span(problem.S),
        },
        constants={
            "NUM_BRANCHES": problem.num_branches,
            "ACTIVATION": activation,
            "SPLITS": config.splits,
            "ACC": tl_acc,
            "ALIGN": common_alignment([dout, *dxs, *xs]),
            "BLOCK_C": config.block_c,
            "BLOCK_S": config.block_s,
        },
        num_warps=config.num_warps,
    )
    if not split:
        return [gradients]
    return [gradients, _combine(dlogits, target, logits, problem, tl_acc, activation)]


def _combine(
    dlogits: Tensor, partial: Tensor, logits: Tensor, problem: Problem, tl_acc: Any, activation: str
) -> Launch:
    return Launch(
        kernel=_sk_select_bwd_combine_kernel,
        programs=problem.B * cdiv(problem.C, _COMBINE_BLOCK),
        arguments={
            "dlogits_ptr": dlogits,
            "partial_ptr": partial,
            **tensor_arguments("logits", logits, "bmc"),
            "B": problem.B,
            "C": problem.C,
        },
        constants={
            "NUM_BRANCHES": problem.num_branches,
            "ACTIVATION": activation,
            "SPLITS": partial.shape[0],
            "ACC": tl_acc,
            "BLOCK_C": _COMBINE_BLOCK,
        },
        num_warps=1,
    )
