"""The backward of fuse and select with batch norm and ReLU inside, in the fewest passes.

The forward is `sk_moments`, then `sk_fuse_fwd` and `sk_select_fwd` with ``norm``. Here are the two
kernels of the backward: four sums that carry all that parameters and attention need of the data,
and the branches' gradients.
"""

from collections.abc import Sequence

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
from sknet_kernels.config import DeviceFacts, LaunchConfig, cdiv
from sknet_kernels.jit import (
    branch_pointers,
    channel_rows,
    known_multiple,
    norm_rows,
    normalised,
    program_coordinates,
    tile_pointers,
    zero_tiles,
)
from sknet_kernels.launch import Launch
from sknet_kernels.layout import as_bcs, empty_like_branch

NUM_SUMS = 4


@triton.jit
def _sk_fuse_select_sums_kernel(
    sums_ptr,
    dout_ptr,
    dout_stride_b,
    dout_stride_c,
    dout_stride_s,
    x_ptrs,
    x_strides_b,
    x_strides_c,
    x_strides_s,
    norm_ptr,
    B,
    C,
    S,
    span,
    NUM_BRANCHES: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """P1 = sum dout k;  P2 = sum k;  P3 = sum dout k xhat_i;  P4 = sum k xhat_i, all over s.

    xhat_i = (x_i - mean_i) * rstd_i, and k = 0 where xhat_i * gamma_i + beta_i <= 0, else 1.
    Shapes: dout and x_i [B, C, S] of any strides; norm [M, 4, C] as in `norm_rows`; sums
    [SPLITS, 4, B, M, C]. Sums are kept in ACC. Passes moved: M + 1 read.
    Source: the derivative of Li et al. 2019, eqs. 1 to 6, through batch norm and ReLU.
    """
    # One program owns BLOCK_C channels of one image over `span` positions.
    pid_b, pid_c, pid_s = program_coordinates(C, SPLITS, BLOCK_C)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    means = norm_rows(norm_ptr, offs_c, mask_c, C, 0, NUM_BRANCHES)
    scales = norm_rows(norm_ptr, offs_c, mask_c, C, 2, NUM_BRANCHES)
    betas = norm_rows(norm_ptr, offs_c, mask_c, C, 3, NUM_BRANCHES)
    start = pid_s * span
    stop = tl.minimum(start + span, known_multiple(S, ALIGN))
    sums = zero_tiles(4 * NUM_BRANCHES, ACC, BLOCK_C, BLOCK_S)
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
            x = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
            off = (normalised(x, means[i], scales[i], betas[i]) <= 0.0) | ~mask
            passed = tl.where(off, 0.0, dout)
            centred = tl.where(off, 0.0, x - means[i][:, None])
            grown = grown + (
                sums[4 * i] + passed,
                sums[4 * i + 1] + tl.where(off, 0.0, 1.0).to(ACC),
                sums[4 * i + 2] + passed * centred,
                sums[4 * i + 3] + centred,
            )
        sums = grown
    # rstd is applied to the sums rather than to every xhat: one register a channel less.
    rstds = norm_rows(norm_ptr, offs_c, mask_c, C, 1, NUM_BRANCHES)
    for i in tl.static_range(NUM_BRANCHES):
        for j in tl.static_range(4):
            total = tl.sum(sums[4 * i + j], axis=1)
            if j >= 2:
                total *= rstds[i]
            row = ((pid_s * 4 + j) * B + pid_b) * NUM_BRANCHES + i
            tl.store(sums_ptr + row * C + offs_c, total, mask=mask_c)


@triton.jit
def _sk_fuse_select_dx_kernel(
    dx_ptrs,
    dx_strides_b,
    dx_strides_c,
    dx_strides_s,
    dout_ptr,
    dout_stride_b,
    dout_stride_c,
    dout_stride_s,
    x_ptrs,
    x_strides_b,
    x_strides_c,
    x_strides_s,
    norm_ptr,
    attn_ptr,
    share_ptr,
    drift_ptr,
    C,
    S,
    span,
    splits,
    NUM_BRANCHES: tl.constexpr,
    HAS_DRIFT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx_i = scale_i * (k * (a_i * dout + share) - drift_i0 - xhat_i * drift_i1).

    share = ds / S. drift holds dbeta_i / m and dgamma_i / m; without HAS_DRIFT, in eval mode, both
    are zero. k and xhat_i as in the kernel of the sums.
    Shapes: dx_i, dout and x_i [B, C, S] of any strides; norm [M, 4, C] as in `norm_rows`; attn
    [B, M, C], share [B, C] and drift [M, 2, C] contiguous, in ACC. Passes moved: M + 1 read, M
    written. Source: the derivative of Li et al. 2019, eqs. 1 to 6, through batch norm and ReLU.
    """
    # One program owns BLOCK_C channels of one image over `span` positions.
    pid_b, pid_c, pid_s = program_coordinates(C, splits, BLOCK_C)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    means = norm_rows(norm_ptr, offs_c, mask_c, C, 0, NUM_BRANCHES)
    scales = norm_rows(norm_ptr, offs_c, mask_c, C, 2, NUM_BRANCHES)
    betas = norm_rows(norm_ptr, offs_c, mask_c, C, 3, NUM_BRANCHES)
    share = tl.load(share_ptr + pid_b * C + offs_c, mask=mask_c, other=0.0)
    attn = channel_rows(attn_ptr + pid_b * NUM_BRANCHES * C, offs_c, mask_c, C, NUM_BRANCHES)
    if HAS_DRIFT:
        drifts = channel_rows(drift_ptr, offs_c, mask_c, C, 2 * NUM_BRANCHES)
        rstds = norm_rows(norm_ptr, offs_c, mask_c, C, 1, NUM_BRANCHES)
    start = pid_s * span
    stop = tl.minimum(start + span, known_multiple(S, ALIGN))
    for first in range(start, stop, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = mask_c[:, None] & (offs_s < stop)[None, :]
        ptrs = tile_pointers(
            dout_ptr, dout_stride_b, dout_stride_c, dout_stride_s, pid_b, offs_c, offs_s, ALIGN
        )
        dout = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
        for i in tl.static_range(NUM_BRANCHES):
            ptrs = branch_pointers(
                x_ptrs, x_strides_b, x_strides_c, x_strides_s, i, pid_b, offs_c, offs_s, ALIGN
            )
            x = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
            off = normalised(x, means[i], scales[i], betas[i]) <= 0.0
            dy = tl.where(off, 0.0, attn[i][:, None] * dout + share[:, None])
            if HAS_DRIFT:
                slope = rstds[i] * drifts[2 * i + 1]
                dy = dy - drifts[2 * i][:, None] - (x - means[i][:, None]) * slope[:, None]
            dx = (scales[i][:, None] * dy).to(dx_ptrs[i].dtype.element_ty)
            ptrs = branch_pointers(
                dx_ptrs, dx_strides_b, dx_strides_c, dx_strides_s, i, pid_b, offs_c, offs_s, ALIGN
            )
            tl.store(ptrs, dx, mask=mask)


def sk_fuse_select_sums(
    dout: Tensor, branches: Sequence[Tensor], norm: Tensor, config: LaunchConfig | None = None
) -> Tensor:
    """Launches the sums: dout and M tensors [B, C, *spatial], norm [M, 4, C] -> [4, B, M, C]."""
    xs = [as_bcs(x) for x in branches]
    launch = sk_fuse_select_sums_launch(as_bcs(dout), xs, norm, config)
    launch.run(dout.device)
    partial: Tensor = launch.arguments["sums_ptr"]
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


def sk_fuse_select_dx(
    dout: Tensor,
    branches: Sequence[Tensor],
    norm: Tensor,
    attn: Tensor,
    share: Tensor,
    drift: Tensor | None,
    config: LaunchConfig | None = None,
) -> list[Tensor]:
    """Launches the gradients of the branches, each in the layout of its branch.

    ``attn`` [B, M, C], ``share`` [B, C] and ``drift`` [M, 2, C] are contiguous, in the dtype of
    ``norm`` [M, 4, C]; ``drift`` is None where the statistics are constants.
    """
    dbranches = [empty_like_branch(x) for x in branches]
    launch = sk_fuse_select_dx_launch(
        [as_bcs(dx) for dx in dbranches],
        as_bcs(dout),
        [as_bcs(x) for x in branches],
        norm,
        attn,
        share,
        drift,
        config,
    )
    launch.run(dout.device)
    return dbranches


def sk_fuse_select_sums_launch(
    dout: Tensor, xs: Sequence[Tensor], norm: Tensor, config: LaunchConfig | None = None
) -> Launch:
    """Returns the launch that sums over S; its ``sums_ptr`` is [SPLITS, 4, B, M, C]."""
    problem = problem_of(xs)
    config = config or LaunchConfig.reduction(
        problem, DeviceFacts.of(dout.device), sums=NUM_SUMS * problem.num_branches
    )
    shape = (config.splits, NUM_SUMS, problem.B, problem.num_branches, problem.C)
    return Launch(
        kernel=_sk_fuse_select_sums_kernel,
        programs=problem.B * cdiv(problem.C, config.block_c) * config.splits,
        arguments={
            "sums_ptr": torch.empty(shape, dtype=norm.dtype, device=norm.device),
            **tensor_arguments("dout", dout, "bcs"),
            **branch_arguments("x", xs),
            "norm_ptr": norm,
            "B": problem.B,
            "C": problem.C,
            "S": problem.S,
            "span": config.span(problem.S),
        },
        constants={
            "NUM_BRANCHES": problem.num_branches,
            "SPLITS": config.splits,
            "ACC": accumulator(xs[0].dtype)[1],
            "ALIGN": common_alignment([dout, *xs]),
            "BLOCK_C": config.block_c,
            "BLOCK_S": config.block_s,
        },
        num_warps=config.num_warps,
    )


def sk_fuse_select_dx_launch(
    dxs: Sequence[Tensor],
    dout: Tensor,
    xs: Sequence[Tensor],
    norm: Tensor,
    attn: Tensor,
    share: Tensor,
    drift: Tensor | None,
    config: LaunchConfig | None = None,
) -> Launch:
    """Returns the launch that fills ``dxs`` [B, C, S]."""
    problem = problem_of(xs)
    config = config or LaunchConfig.elementwise(problem, DeviceFacts.of(dout.device))
    return Launch(
        kernel=_sk_fuse_select_dx_kernel,
        programs=problem.B * cdiv(problem.C, config.block_c) * config.splits,
        arguments={
            **branch_arguments("dx", dxs),
            **tensor_arguments("dout", dout, "bcs"),
            **branch_arguments("x", xs),
            "norm_ptr": norm,
            "attn_ptr": attn,
            "share_ptr": share,
            "drift_ptr": drift,
            "C": problem.C,
            "S": problem.S,
            "span": config.span(problem.S),
            "splits": config.splits,
        },
        constants={
            "NUM_BRANCHES": problem.num_branches,
            "HAS_DRIFT": drift is not None,
            "ACC": accumulator(xs[0].dtype)[1],
            "ALIGN": common_alignment([dout, *dxs, *xs]),
            "BLOCK_C": config.block_c,
            "BLOCK_S": config.block_s,
        },
        num_warps=config.num_warps,
    )
