"""moments: mean and variance of every channel of every branch, for batch normalisation."""

import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import accumulator, configuration, streaming_launch
from sknet_kernels.config import MOMENTS, LaunchConfig, cdiv
from sknet_kernels.jit import known_strides, load_tile, tile_mask, zero_tiles
from sknet_kernels.launch import Launch, Pointer, launch

# A tile of parts by channels that one program of the second kernel joins at a time.
_FINISH_PARTS, _FINISH_CHANNELS = 64, 8


@triton.jit
def _positions_before(tile, S, BLOCK_S):
    """Returns how many positions lie in the tiles before ``tile``, images laid end to end."""
    tiles_per_image = tl.cdiv(S, BLOCK_S)
    images = (tile // tiles_per_image).to(tl.int64)
    return images * S + tl.minimum((tile % tiles_per_image) * BLOCK_S, S)


@triton.jit
def _part_size(part, tiles, B, S, BLOCK_S):
    """Returns how many positions of all images lie in part ``part`` of ``tiles`` tiles."""
    most = B * tl.cdiv(S, BLOCK_S)
    first = tl.minimum(part * tiles, most)
    last = tl.minimum(first + tiles, most)
    return _positions_before(last, S, BLOCK_S) - _positions_before(first, S, BLOCK_S)


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
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Mean and sum of squared deviations of each part of a channel, for every branch.

    With K the part's first element and n its size: mean = K + sum(x - K) / n and
    M2 = sum((x - K)^2) - (sum(x - K))^2 / n, so that a large mean costs no digits.
    Shapes: x_i [B, C, S] of any strides; partial [splits, 2, M, C] of mean and M2. Sums are kept
    in ACC. Passes moved: M read. Source: Chan, Golub and LeVeque 1983.
    """
    # One program owns BLOCK_C channels over `tiles` tiles of images and positions.
    pid = tl.program_id(0)
    part = pid % splits
    pid_c = (pid // splits).to(tl.int64)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    tiles_per_image = tl.cdiv(S, BLOCK_S)
    first = part * tiles
    last = tl.minimum(first + tiles, B * tiles_per_image)
    strides = known_strides(strides, ALIGN, CHANNELS_LAST)
    first_b = (first // tiles_per_image).to(tl.int64)
    start = (first_b, pid_c * BLOCK_C, (first % tiles_per_image).to(tl.int64) * BLOCK_S)
    exists = (mask_c & (first < last))[:, None]
    shifts = ()
    for i in tl.static_range(NUM_BRANCHES):
        # Each is [BLOCK_C, 1].
        shifts = shifts + (load_tile(x_ptrs[i], strides, i, start, exists, ACC),)
    sums = zero_tiles(2 * NUM_BRANCHES, ACC, BLOCK_C, BLOCK_S)
    for tile in tl.range(first, last, num_stages=NUM_STAGES):
        pid_b = (tile // tiles_per_image).to(tl.int64)
        first_s = (tile % tiles_per_image).to(tl.int64) * BLOCK_S
        corner = (pid_b, pid_c * BLOCK_C, first_s)
        # Tiles are [BLOCK_C, BLOCK_S].
        mask = tile_mask(corner, C, S, ALIGN, CHANNELS_LAST, BLOCK_C, BLOCK_S)
        grown = ()
        for i in tl.static_range(NUM_BRANCHES):
            x = load_tile(x_ptrs[i], strides, i, corner, mask, ACC)
            deviation = tl.where(mask, x - shifts[i], 0.0)
            grown = grown + (sums[2 * i] + deviation, sums[2 * i + 1] + deviation * deviation)
        sums = grown
    n = _part_size(part, tiles, B, S, BLOCK_S).to(ACC)
    for i in tl.static_range(NUM_BRANCHES):
        mean = tl.sum(sums[2 * i], axis=1) / tl.maximum(n, 1.0)
        m2 = tl.sum(sums[2 * i + 1], axis=1) - mean * mean * n
        row = part.to(tl.int64) * 2 * NUM_BRANCHES + i
        shift = tl.reshape(shifts[i], [BLOCK_C])
        tl.store(partial_ptr + row * C + offs_c, shift + mean, mask=mask_c)
        row += NUM_BRANCHES
        tl.store(partial_ptr + row * C + offs_c, tl.maximum(m2, 0.0), mask=mask_c)


@triton.jit(do_not_specialize=["B", "S", "size", "tiles", "splits", "block_s"])
def _sk_moments_finish_kernel(
    applied_ptr,
    kept_ptr,
    partial_ptr,
    B,
    S,
    size,
    tiles,
    splits,
    block_s,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean, biased and unbiased variance from the parts' mean_p and M2_p, joined in their order.

    With n_p the size of part p and n = B S: mean = sum(n_p mean_p) / n, taken from mean_0 on;
    M2 = sum(M2_p + n_p (mean_p - mean)^2); the variances are M2 / n and M2 / (n - 1).
    Shapes: partial [splits, 2, size]; applied, mean and biased variance, and kept, mean and
    unbiased variance, both [2, size], with size = M * C. Arithmetic in ACC.
    Passes moved: none of full size. Source: Chan, Golub and LeVeque 1983.
    """
    # One program owns BLOCK_C channels of the branches laid end to end.
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < size
    pivot = tl.load(partial_ptr + offs_c, mask=mask_c, other=0.0)  # [BLOCK_C]
    apart = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for first in range(0, splits, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        n = _part_size(parts, tiles, B, S, block_s).to(ACC)
        ptrs = partial_ptr + (parts.to(tl.int64) * 2)[:, None] * size + offs_c[None, :]
        mask = (parts < splits)[:, None] & mask_c[None, :]
        mean = tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_P, BLOCK_C]
        apart += tl.where(mask, n[:, None] * (mean - pivot[None, :]), 0.0)
    count = (tl.cast(B, tl.int64) * S).to(ACC)
    mean = pivot + tl.sum(apart, axis=0) / tl.maximum(count, 1.0)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for first in range(0, splits, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        n = _part_size(parts, tiles, B, S, block_s).to(ACC)
        ptrs = partial_ptr + (parts.to(tl.int64) * 2)[:, None] * size + offs_c[None, :]
        mask = (parts < splits)[:, None] & mask_c[None, :]
        own = tl.load(ptrs + size, mask=mask, other=0.0)  # [BLOCK_P, BLOCK_C]
        distance = tl.load(ptrs, mask=mask, other=0.0) - mean[None, :]  # [BLOCK_P, BLOCK_C]
        m2 += tl.where(mask, own + n[:, None] * distance * distance, 0.0)
    total = tl.sum(m2, axis=0)
    tl.store(applied_ptr + offs_c, mean, mask=mask_c)
    tl.store(kept_ptr + offs_c, mean, mask=mask_c)
    offs_c += size
    tl.store(applied_ptr + offs_c, total / tl.maximum(count, 1.0), mask=mask_c)
    tl.store(kept_ptr + offs_c, total / tl.maximum(count - 1.0, 1.0), mask=mask_c)


def sk_moments(
    xs: tuple[Tensor, ...], *, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Launches moments: M tensors [B, C, S] -> statistics to apply and to keep, [2, M, C] each.

    Both begin with the mean; the variance that is applied is biased, that which a running average
    keeps is not.
    """
    x = xs[0]
    M, (B, C, S) = len(xs), x.shape
    config = configuration(MOMENTS, xs, config)
    acc, _ = accumulator(x.dtype)
    partial = x.new_empty((config.splits, 2, M, C), dtype=acc)
    applied, kept = x.new_empty((2, M, C), dtype=acc), x.new_empty((2, M, C), dtype=acc)
    launch(sk_moments_launch, partial, xs, config=config)
    launch(sk_moments_finish_launch, applied, kept, partial, B=B, S=S, config=config)
    return applied, kept


def sk_moments_launch(*pointers: Pointer, config: LaunchConfig | None = None) -> Launch:
    """Returns the launch of partial and xs."""
    return streaming_launch(_sk_moments_kernel, pointers, stage=MOMENTS, config=config)


def sk_moments_finish_launch(
    applied: Tensor, kept: Tensor, partial: Tensor, *, B: int, S: int, config: LaunchConfig
) -> Launch:
    """Returns the launch that fills statistics [2, M, C] from ``partial`` of `sk_moments_launch`.

    ``config`` is the one of that launch.
    """
    size = applied[0].numel()
    return Launch(
        kernel=_sk_moments_finish_kernel,
        programs=cdiv(size, _FINISH_CHANNELS),
        pointers={"applied_ptr": applied, "kept_ptr": kept, "partial_ptr": partial},
        scalars={
            "B": B,
            "S": S,
            "size": size,
            "tiles": cdiv(B * cdiv(S, config.block_s), config.splits),
            "splits": config.splits,
            "block_s": config.block_s,
        },
        constants={
            "ACC": accumulator(applied.dtype)[1],
            "BLOCK_P": _FINISH_PARTS,
            "BLOCK_C": _FINISH_CHANNELS,
        },
        num_warps=2,
    )
