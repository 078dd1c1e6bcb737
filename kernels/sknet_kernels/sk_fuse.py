"""fuse: the average, or the sum, over space of the sum of the branches."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import accumulator, branch_arguments, common_alignment, problem_of
from sknet_kernels.config import DeviceFacts, LaunchConfig, cdiv
from sknet_kernels.jit import (
    branch_pointers,
    known_multiple,
    norm_rows,
    normalised,
    program_coordinates,
    relu,
)
from sknet_kernels.launch import Launch
from sknet_kernels.layout import as_bcs

_COMBINE_BLOCK = 256


@triton.jit
def _sk_fuse_fwd_kernel(
    out_ptr,
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
    HAS_NORM: tl.constexpr,
    MEAN: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[b, c] = sum over i and s of u_i[b, c, s], divided by S with MEAN.

    u_i is x_i, or with HAS_NORM max((x_i - mean_i) * scale_i + beta_i, 0).
    Shapes: x_i [B, C, S] of any strides; norm [M, 4, C] as in `norm_rows`; out [B, C] contiguous,
    or with SPLITS > 1 the partial sums [SPLITS, B, C], not yet divided. Sums are kept in ACC.
    Passes moved: M read.
    Source: Li et al. 2019, eqs. 1 and 2.
    """
    # One program owns BLOCK_C channels of one image over `span` positions.
    pid_b, pid_c, pid_s = program_coordinates(C, SPLITS, BLOCK_C)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    start = pid_s * span
    stop = tl.minimum(start + span, known_multiple(S, ALIGN))
    if HAS_NORM:
        means = norm_rows(norm_ptr, offs_c, mask_c, C, 0, NUM_BRANCHES)
        scales = norm_rows(norm_ptr, offs_c, mask_c, C, 2, NUM_BRANCHES)
        betas = norm_rows(norm_ptr, offs_c, mask_c, C, 3, NUM_BRANCHES)
    total = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    for first in range(start, stop, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = mask_c[:, None] & (offs_s < stop)[None, :]
        for i in tl.static_range(NUM_BRANCHES):
            ptrs = branch_pointers(
                x_ptrs, x_strides_b, x_strides_c, x_strides_s, i, pid_b, offs_c, offs_s, ALIGN
            )
            x = tl.load(ptrs, mask=mask, other=0.0)
            if HAS_NORM:
                y = normalised(x.to(ACC), means[i], scales[i], betas[i])
                total += tl.where(mask, relu(y), 0.0)
            else:
                total += x.to(ACC)
    pooled = tl.sum(total, axis=1)
    if MEAN and SPLITS == 1:
        pooled = pooled / S
    offs_out = (pid_s * B + pid_b) * C + offs_c
    tl.store(out_ptr + offs_out, pooled.to(out_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _sk_fuse_combine_kernel(
    out_ptr,
    partial_ptr,
    size,
    S,
    MEAN: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n] = sum over k of partial[k, n], added in the order of k, divided by S with MEAN.

    Shapes: partial [SPLITS, size], out [size], with size = B * C. Passes moved: none of full size.
    """
    # One program owns BLOCK elements of out.
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros([BLOCK], ACC)
    offs_partial = offs
    for _ in range(SPLITS):
        total += tl.load(partial_ptr + offs_partial, mask=mask, other=0.0)
        offs_partial += size
    if MEAN:
        total = total / S
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def sk_fuse_fwd(
    branches: Sequence[Tensor],
    norm: Tensor | None = None,
    config: LaunchConfig | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Launches fuse: M tensors [B, C, *spatial] -> [B, C].

    ``reduction`` over space is "mean" or "sum". With ``norm`` [M, 4, C] the branches are normalised
    and rectified on the fly, and the result keeps the dtype of the sums; without it, the dtype of
    the branches.
    """
    xs = [as_bcs(x) for x in branches]
    out = xs[0].new_empty(xs[0].shape[:2], dtype=xs[0].dtype if norm is None else norm.dtype)
    for launch in sk_fuse_fwd_launches(out, xs, norm, config, reduction):
        launch.run(out.device)
    return out


def sk_fuse_fwd_launches(
    out: Tensor,
    xs: Sequence[Tensor],
    norm: Tensor | None = None,
    config: LaunchConfig | None = None,
    reduction: str = "mean",
) -> list[Launch]:
    """Returns the launches that fill ``out`` [B, C] from ``xs`` [B, C, S]."""
    problem = problem_of(xs)
    config = config or LaunchConfig.reduction(problem, DeviceFacts.of(out.device), sums=1)
    acc, tl_acc = accumulator(xs[0].dtype)
    split = config.splits > 1
    target = out.new_empty((config.splits, *out.shape), dtype=acc) if split else out
    sums = Launch(
        kernel=_sk_fuse_fwd_kernel,
        programs=problem.B * cdiv(problem.C, config.block_c) * config.splits,
        arguments={
            "out_ptr": target,
            **branch_arguments("x", xs),
            "norm_ptr": norm,
            "B": problem.B,
            "C": problem.C,
            "S": problem.S,
            "span": config.span(problem.S),
        },
        constants={
            "NUM_BRANCHES": problem.num_branches,
            "HAS_NORM": norm is not None,
            "MEAN": reduction == "mean",
            "SPLITS": config.splits,
            "ACC": tl_acc,
            "ALIGN": common_alignment(xs),
            "BLOCK_C": config.block_c,
            "BLOCK_S": config.block_s,
        },
        num_warps=config.num_warps,
    )
    if not split:
        return [sums]
    return [sums, _combine(out, target, problem.S, tl_acc, reduction)]


def _combine(out: Tensor, partial: Tensor, S: int, tl_acc: tl.dtype, reduction: str) -> Launch:
    return Launch(
        kernel=_sk_fuse_combine_kernel,
        programs=cdiv(out.numel(), _COMBINE_BLOCK),
        arguments={"out_ptr": out, "partial_ptr": partial, "size": out.numel(), "S": S},
        constants={
            "MEAN": reduction == "mean",
            "SPLITS": partial.shape[0],
            "ACC": tl_acc,
            "BLOCK": _COMBINE_BLOCK,
        },
        num_warps=1,
    )
