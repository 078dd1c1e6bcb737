"""moments: mean and variance of every channel of every branch, for batch normalisation."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import accumulator, configuration, small_launch, streaming_launch
from sknet_kernels.config import MOMENTS
from sknet_kernels.jit import (
    count_batch,
    known_strides,
    load_tile,
    move_towards,
    own_tiles,
    plus,
    row_starts,
    tile_masks,
    tiles_of_row,
    zero_sums,
)
from sknet_kernels.launch import launch
from sknet_kernels.norms import Running
from sknet_kernels.small import MOMENTS_FINISH

# Rows of the parts: how many values, their mean, the sum of their squared deviations from it.
COUNT = tl.constexpr(0)
MEAN = tl.constexpr(1)
M2 = tl.constexpr(2)
NUM_ROWS = tl.constexpr(3)

# Sums that are kept of a branch.
DEVIATION = tl.constexpr(0)
SQUARE = tl.constexpr(1)
NUM_SUMS = tl.constexpr(2)


@triton.jit
def _positions_before(tile, tiles_per_image, lead, S, BLOCK_S: tl.constexpr):
    """Returns how many positions [BLOCK_C] of all images lie before ``tile``.

    The tiles of an image begin ``lead`` elements before its row does.
    """
    before = (tile % tiles_per_image).to(tl.int64) * BLOCK_S - lead
    images = (tile // tiles_per_image).to(tl.int64)
    return images * S + tl.minimum(tl.maximum(before, 0), S)


@triton.jit(do_not_specialize=["B", "C", "S", "tiles", "splits"])
def _sk_moments_kernel(
    partial_ptr,
    x_ptrs,
    strides,
    B,
    C,
    S,
    tiles,
    splits,
    NUM_BRANCHES: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Size n, mean and sum of squared deviations of each part of a channel, for every branch.

    With K an element of the part: mean = K + sum(x - K) / n and
    M2 = sum((x - K)^2) - (sum(x - K))^2 / n, so that a large mean costs no digits.
    Shapes: x_i [B, C, S] of any strides; partial [splits, 3, M, C] of n, mean and M2. Sums are
    kept in ACC. Passes moved: M read. Source: Chan, Golub and LeVeque 1983.
    """
    # One program owns BLOCK_C channels over `tiles` tiles of images and positions.
    pid = tl.program_id(0)
    part = pid % splits
    pid_c = (pid // splits).to(tl.int64)
    offs_c = pid_c * TILE.block_c + tl.arange(0, TILE.block_c)
    mask_c = offs_c < C
    tiles_per_image = tiles_of_row(S, TILE)
    first, last = own_tiles(B * tiles_per_image, tiles, part)
    strides = known_strides(strides, TILE)
    # Image and place in it are carried from tile to tile: a division a turn costs as much as a sum.
    pid_b = (first // tiles_per_image).to(tl.int64)
    place = (first % tiles_per_image).to(tl.int64)
    first_s = tl.minimum(place * TILE.block_s, tl.cast(S, tl.int64) - 1)
    corner = (pid_b, pid_c * TILE.block_c, first_s)
    exists = (mask_c & (first < last))[:, None]
    POSITION: tl.constexpr = TILE.position
    shifts = ()
    for i in tl.static_range(NUM_BRANCHES):
        # Each is [BLOCK_C, 1].
        shifts = shifts + (load_tile(x_ptrs[i], strides, i, corner, exists, POSITION, ACC),)
    sums = zero_sums(NUM_SUMS * NUM_BRANCHES, ACC, TILE)
    for _ in tl.range(first, last, num_stages=TILE.num_stages):
        corner = (pid_b, pid_c * TILE.block_c, place * TILE.block_s)
        # Tiles are [BLOCK_C, BLOCK_S].
        mask, reads = tile_masks(corner, strides, C, S, TILE)
        grown = ()
        for i in tl.static_range(NUM_BRANCHES):
            x = load_tile(x_ptrs[i], strides, i, corner, reads, TILE, ACC)
            deviation = tl.where(mask, x - shifts[i], 0.0)
            grown = grown + (
                plus(sums[NUM_SUMS * i + DEVIATION], deviation),
                plus(sums[NUM_SUMS * i + SQUARE], deviation * deviation),
            )
        sums = grown
        ends_image = place + 1 == tiles_per_image
        pid_b = tl.where(ends_image, pid_b + 1, pid_b)
        place = tl.where(ends_image, 0, place + 1)
    lead = tl.zeros(offs_c.shape, tl.int64)
    if TILE.layout == "shifted":
        lead = row_starts(strides[0][1], pid_c * TILE.block_c, TILE.block_c) % TILE.align
    before = _positions_before(tl.minimum(first, last), tiles_per_image, lead, S, TILE.block_s)
    n = (_positions_before(last, tiles_per_image, lead, S, TILE.block_s) - before).to(ACC)
    for i in tl.static_range(NUM_BRANCHES):
        mean = tl.sum(sums[NUM_SUMS * i + DEVIATION], axis=1) / tl.maximum(n, 1.0)
        m2 = tl.sum(sums[NUM_SUMS * i + SQUARE], axis=1) - mean * mean * n
        row = part.to(tl.int64) * NUM_ROWS * NUM_BRANCHES + i
        ptrs = partial_ptr + row * C + offs_c
        step = tl.cast(C, tl.int64) * NUM_BRANCHES
        tl.store(ptrs + COUNT * step, n, mask=mask_c)
        tl.store(ptrs + MEAN * step, tl.reshape(shifts[i], offs_c.shape) + mean, mask=mask_c)
        tl.store(ptrs + M2 * step, tl.maximum(m2, 0.0), mask=mask_c)


@triton.jit(do_not_specialize=["C", "splits", "keep", "momentum"])
def _sk_moments_finish_kernel(
    applied_ptr,
    kept_ptr,
    running_mean_ptrs,
    running_var_ptrs,
    tracked_ptrs,
    partial_ptr,
    C,
    splits,
    keep,
    momentum,
    NUM_BRANCHES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean, biased and unbiased variance from n_p, mean_p and M2_p of the parts, in their order.

    n = sum(n_p); mean = sum(n_p mean_p) / n, taken from mean_0 on;
    M2 = sum(M2_p + n_p (mean_p - mean)^2); the variances are M2 / n and M2 / (n - 1).
    Without kept, running = keep * running + momentum * (mean, unbiased variance), and tracked
    grows by 1.
    Shapes: partial [splits, 3, M, C]; applied, mean and biased variance, and kept, mean and
    unbiased variance, both [2, M, C]; running statistics [C] and tracked [] a branch. Arithmetic in
    the dtype of partial. Passes moved: none of full size. Source: Chan, Golub and LeVeque 1983.
    """
    # One program owns BLOCK_C channels of the branches laid end to end.
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    step = tl.cast(C, tl.int64) * NUM_BRANCHES
    mask_c = offs_c < step
    pivot = tl.load(partial_ptr + MEAN * step + offs_c, mask=mask_c, other=0.0)  # [BLOCK_C]
    sizes, apart = tl.zeros([BLOCK_P, BLOCK_C], ACC), tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for first in range(0, splits, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P).to(tl.int64)
        ptrs = partial_ptr + (parts * NUM_ROWS)[:, None] * step + offs_c[None, :]
        mask = (parts < splits)[:, None] & mask_c[None, :]
        # Tiles are [BLOCK_P, BLOCK_C].
        n = tl.load(ptrs + COUNT * step, mask=mask, other=0.0)
        mean = tl.load(ptrs + MEAN * step, mask=mask, other=0.0)
        sizes += n
        apart += tl.where(mask, n * (mean - pivot[None, :]), 0.0)
    n = tl.sum(sizes, axis=0)
    mean = pivot + tl.sum(apart, axis=0) / tl.maximum(n, 1.0)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for first in range(0, splits, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P).to(tl.int64)
        ptrs = partial_ptr + (parts * NUM_ROWS)[:, None] * step + offs_c[None, :]
        mask = (parts < splits)[:, None] & mask_c[None, :]
        # Tiles are [BLOCK_P, BLOCK_C].
        distance = tl.load(ptrs + MEAN * step, mask=mask, other=0.0) - mean[None, :]
        grown = tl.load(ptrs + COUNT * step, mask=mask, other=0.0) * distance * distance
        m2 += tl.where(mask, tl.load(ptrs + M2 * step, mask=mask, other=0.0) + grown, 0.0)
    total = tl.sum(m2, axis=0)
    unbiased = total / tl.maximum(n - 1.0, 1.0)
    tl.store(applied_ptr + offs_c, mean, mask=mask_c)
    tl.store(applied_ptr + step + offs_c, total / tl.maximum(n, 1.0), mask=mask_c)
    if kept_ptr is not None:
        tl.store(kept_ptr + offs_c, mean, mask=mask_c)
        tl.store(kept_ptr + step + offs_c, unbiased, mask=mask_c)
    else:
        for i in tl.static_range(NUM_BRANCHES):
            own = offs_c - tl.cast(C, tl.int64) * i
            mask = (own >= 0) & (own < C)
            move_towards(running_mean_ptrs[i], own, mean, mask, keep, momentum, ACC)
            move_towards(running_var_ptrs[i], own, unbiased, mask, keep, momentum, ACC)
            count_batch(tracked_ptrs[i], tl.program_id(0) == 0)


def sk_moments(
    xs: tuple[Tensor, ...], running: Running | None = None
) -> tuple[Tensor, Tensor | None]:
    """Launches moments: M tensors [B, C, *spatial] -> statistics, two of [2, M, C].

    Both begin with the mean. The first are to be applied, with the biased variance; the second are
    what a running average keeps, with the unbiased one. With ``running`` the second are not
    returned: it is moved towards them.
    """
    x, splits = xs[0], configuration(MOMENTS, xs).splits
    M, C, acc = len(xs), x.shape[1], accumulator(x.dtype)[0]
    partial = x.new_empty((splits, NUM_ROWS.value, M, C), dtype=acc)
    applied = x.new_empty((2, M, C), dtype=acc)
    kept = x.new_empty((2, M, C), dtype=acc) if running is None else None
    launch(sk_moments_launch, partial, xs)
    *moved, momentum = running or (None, None, None, 0.0)
    factors = {"keep": 1 - momentum, "momentum": momentum}
    launch(sk_moments_finish_launch, applied, kept, *moved, partial, **factors)
    return applied, kept


sk_moments_launch = functools.partial(streaming_launch, _sk_moments_kernel, MOMENTS)
sk_moments_finish_launch = functools.partial(
    small_launch, _sk_moments_finish_kernel, MOMENTS_FINISH, {"partial_ptr": "k3MC"}
)
