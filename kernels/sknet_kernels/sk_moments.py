"""moments: mean and variance of every channel of every branch, for batch normalisation."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import accumulator, branch_arguments, common_alignment, problem_of
from sknet_kernels.config import DeviceFacts, LaunchConfig, cdiv
from sknet_kernels.jit import branch_pointers, known_multiple
from sknet_kernels.launch import Launch
from sknet_kernels.layout import as_bcs

_COMBINE_BLOCK = 64


@triton.jit
def _sk_moments_kernel(
    partial_ptr,
    x_ptrs,
    x_strides_b,
    x_strides_c,
    x_strides_s,
    B,
    C,
    S,
    tiles_per_part,
    NUM_BRANCHES: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Count n, mean and sum of squared deviations of each part of a channel, for every branch.

    With K the part's first element: mean = K + sum(x - K) / n and
    M2 = sum((x - K)^2) - (sum(x - K))^2 / n, so that a large mean costs no digits.
    Shapes: x_i [B, C, S] of any strides; partial [PARTS, 3, M, C] of n, mean and M2. Sums are
    kept in ACC. Passes moved: M read. Source: Chan, Golub and LeVeque 1983.
    """
    # One program owns BLOCK_C channels over tiles_per_part tiles of images and positions.
    pid = tl.program_id(0)
    part = pid % PARTS
    offs_c = (pid // PARTS).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    size = known_multiple(S, ALIGN)
    tiles_per_image = tl.cdiv(S, BLOCK_S)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, B * tiles_per_image)
    for i in tl.static_range(NUM_BRANCHES):
        start_b = (first // tiles_per_image).to(tl.int64)
        start_s = (first % tiles_per_image).to(tl.int64) * BLOCK_S
        shift_ptrs = (
            x_ptrs[i]
            + start_b * x_strides_b[i]
            + offs_c * x_strides_c[i]
            + start_s * x_strides_s[i]
        )
        shift = tl.load(shift_ptrs, mask=mask_c & (first < last), other=0.0).to(ACC)
        total = tl.zeros([BLOCK_C, BLOCK_S], ACC)
        squares = tl.zeros([BLOCK_C, BLOCK_S], ACC)
        count = tl.zeros([BLOCK_S], tl.int64)
        for tile in range(first, last):
            offs_s = (tile % tiles_per_image).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
            mask_s = offs_s < size
            mask = mask_c[:, None] & mask_s[None, :]
            ptrs = branch_pointers(
                x_ptrs,
                x_strides_b,
                x_strides_c,
                x_strides_s,
                i,
                (tile // tiles_per_image).to(tl.int64),
                offs_c,
                offs_s,
                ALIGN,
            )
            x = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
            deviation = tl.where(mask, x - shift[:, None], 0.0)
            total += deviation
            squares += deviation * deviation
            count += mask_s.to(tl.int64)
        n = tl.sum(count, axis=0).to(ACC)
        mean = tl.sum(total, axis=1) / tl.maximum(n, 1.0)
        m2 = tl.sum(squares, axis=1) - mean * mean * n
        offs = (part.to(tl.int64) * 3 * NUM_BRANCHES + i) * C + offs_c
        step = tl.cast(C, tl.int64) * NUM_BRANCHES
        tl.store(partial_ptr + offs, tl.zeros([BLOCK_C], ACC) + n, mask=mask_c)
        tl.store(partial_ptr + step + offs, shift + mean, mask=mask_c)
        tl.store(partial_ptr + 2 * step + offs, tl.maximum(m2, 0.0), mask=mask_c)


@triton.jit
def _sk_moments_combine_kernel(
    mean_ptr,
    var_ptr,
    partial_ptr,
    size,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and biased variance from the parts' n, mean and M2, joined in the order of the parts.

    Shapes: partial [PARTS, 3, size]; mean and var [size], with size = M * C. Passes moved: none of
    full size. Source: Chan, Golub and LeVeque 1983, eq. 2.1.
    """
    # One program owns BLOCK channels of the branches laid end to end.
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    n = tl.zeros([BLOCK], ACC)
    mean = tl.zeros([BLOCK], ACC)
    m2 = tl.zeros([BLOCK], ACC)
    ptrs = partial_ptr + offs
    step = tl.cast(size, tl.int64)
    for _ in range(PARTS):
        part_n = tl.load(ptrs, mask=mask, other=0.0)
        part_mean = tl.load(ptrs + step, mask=mask, other=0.0)
        part_m2 = tl.load(ptrs + 2 * step, mask=mask, other=0.0)
        joined = tl.maximum(n + part_n, 1.0)
        apart = part_mean - mean
        mean += apart * (part_n / joined)
        m2 += part_m2 + apart * apart * (n * part_n / joined)
        n += part_n
        ptrs += 3 * step
    tl.store(mean_ptr + offs, mean, mask=mask)
    tl.store(var_ptr + offs, m2 / tl.maximum(n, 1.0), mask=mask)


def sk_moments(
    branches: Sequence[Tensor], config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Launches moments: M tensors [B, C, *spatial] -> mean and biased variance [M, C]."""
    xs = [as_bcs(x) for x in branches]
    acc, _ = accumulator(xs[0].dtype)
    mean = xs[0].new_empty((len(xs), xs[0].shape[1]), dtype=acc)
    var = torch.empty_like(mean)
    for launch in sk_moments_launches(mean, var, xs, config):
        launch.run(mean.device)
    return mean, var


def sk_moments_launches(
    mean: Tensor, var: Tensor, xs: Sequence[Tensor], config: LaunchConfig | None = None
) -> list[Launch]:
    """Returns the launches that fill ``mean`` and ``var`` [M, C] from ``xs`` [B, C, S]."""
    problem = problem_of(xs)
    config = config or LaunchConfig.moments(problem, DeviceFacts.of(mean.device))
    acc, tl_acc = accumulator(xs[0].dtype)
    tiles = problem.B * cdiv(problem.S, config.block_s)
    partial = mean.new_empty((config.splits, 3, *mean.shape), dtype=acc)
    parts = Launch(
        kernel=_sk_moments_kernel,
        programs=cdiv(problem.C, config.block_c) * config.splits,
        arguments={
            "partial_ptr": partial,
            **branch_arguments("x", xs),
            "B": problem.B,
            "C": problem.C,
            "S": problem.S,
            "tiles_per_part": cdiv(tiles, config.splits),
        },
        constants={
            "NUM_BRANCHES": problem.num_branches,
            "PARTS": config.splits,
            "ACC": tl_acc,
            "ALIGN": common_alignment(xs),
            "BLOCK_C": config.block_c,
            "BLOCK_S": config.block_s,
        },
        num_warps=config.num_warps,
    )
    return [parts, _combine(mean, var, partial, tl_acc)]


def _combine(mean: Tensor, var: Tensor, partial: Tensor, tl_acc: Any) -> Launch:
    return Launch(
        kernel=_sk_moments_combine_kernel,
        programs=cdiv(mean.numel(), _COMBINE_BLOCK),
        arguments={
            "mean_ptr": mean,
            "var_ptr": var,
            "partial_ptr": partial,
            "size": mean.numel(),
        },
        constants={"PARTS": partial.shape[0], "ACC": tl_acc, "BLOCK": _COMBINE_BLOCK},
        num_warps=1,
    )
