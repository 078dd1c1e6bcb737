"""The backward of fuse and select with batch norm and ReLU inside, in the fewest passes.

The forward is `sk_moments`, then `sk_fuse_partials` and `sk_select_fwd` with norms. Here are the
two kernels of the backward that read the branches: four sums that carry all that parameters and
attention need of the data, and the branches' gradients.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import accumulator, configuration, streaming_launch
from sknet_kernels.config import DX, SUMS
from sknet_kernels.jit import (
    DBETA,
    DGAMMA,
    DOUT_KEEP,
    DOUT_KEEP_XHAT,
    KEEP,
    KEEP_XHAT,
    NUM_SUMS,
    branch_weights,
    channel_vector,
    inverse_deviations,
    kept_by_relu,
    known_strides,
    load_tile,
    norm_vectors,
    normalised,
    own_tiles,
    plus,
    program_coordinates,
    store_tile,
    tile_masks,
    tiles_of_row,
    zero_sums,
)
from sknet_kernels.launch import launch
from sknet_kernels.norms import Norms


@triton.jit(do_not_specialize=["B", "C", "S", "tiles", "splits"])
def _sk_fuse_select_sums_kernel(
    partial_ptr,
    dout_ptr,
    x_ptrs,
    norm_ptrs,
    strides,
    B,
    C,
    S,
    tiles,
    splits,
    NUM_BRANCHES: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    """P1 = sum dout keep;  P2 = sum keep;  P3 = sum dout keep xhat_i;  P4 = sum keep xhat_i.

    All over the positions s of one split. xhat_i = (x_i - mean_i) / sqrt(var_i + EPS), and keep is
    0 where xhat_i * gamma_i + beta_i <= 0, else 1.
    Shapes: dout and x_i [B, C, S] of any strides; mean_i, var_i, gamma_i and beta_i [C]; partial
    [splits, 4, B, M, C] contiguous. Sums are kept in ACC. Passes moved: M + 1 read.
    Source: the derivative of Li et al. 2019, eqs. 1 to 6, through batch norm and ReLU.
    """
    # One program owns BLOCK_C channels of one image over `tiles` tiles of BLOCK_S positions.
    pid_b, pid_c, pid_s = program_coordinates(C, splits, TILE.block_c)
    offs_c = pid_c * TILE.block_c + tl.arange(0, TILE.block_c)
    mask_c = offs_c < C
    # Vectors are [BLOCK_C].
    means, scales, betas = norm_vectors(norm_ptrs, offs_c, mask_c, EPS, ACC)
    sums = zero_sums(NUM_SUMS * NUM_BRANCHES, ACC, TILE)
    strides = known_strides(strides, TILE)
    first, last = own_tiles(tiles_of_row(S, TILE), tiles, pid_s)
    for tile in tl.range(first, last, num_stages=TILE.num_stages):
        corner = (pid_b, pid_c * TILE.block_c, tile * TILE.block_s)
        # Tiles are [BLOCK_C, BLOCK_S].
        mask, reads = tile_masks(corner, strides, C, S, TILE)
        dout = load_tile(dout_ptr, strides, NUM_BRANCHES, corner, reads, TILE, ACC)
        grown = ()
        for i in tl.static_range(NUM_BRANCHES):
            x = load_tile(x_ptrs[i], strides, i, corner, reads, TILE, ACC)
            keep = kept_by_relu(normalised(x, means[i], scales[i], betas[i])) & mask
            kept = tl.where(keep, dout, 0.0)
            centred = tl.where(keep, x - means[i][:, None], 0.0)
            grown = grown + (
                plus(sums[NUM_SUMS * i + DOUT_KEEP], kept),
                plus(sums[NUM_SUMS * i + KEEP], tl.where(keep, 1.0, 0.0).to(ACC)),
                plus(sums[NUM_SUMS * i + DOUT_KEEP_XHAT], kept * centred),
                plus(sums[NUM_SUMS * i + KEEP_XHAT], centred),
            )
        sums = grown
    # rstd is applied to the sums rather than to every xhat: one register a channel less.
    rstds = inverse_deviations(norm_ptrs[1], offs_c, mask_c, EPS, ACC)  # Vectors are [BLOCK_C].
    for i in tl.static_range(NUM_BRANCHES):
        for row in tl.static_range(NUM_SUMS):
            total = tl.sum(sums[NUM_SUMS * i + row], axis=1)
            if row >= DOUT_KEEP_XHAT:
                total *= rstds[i]
            offs = ((pid_s * NUM_SUMS + row) * B + pid_b) * NUM_BRANCHES + i
            tl.store(partial_ptr + offs * C + offs_c, total, mask=mask_c)


@triton.jit(do_not_specialize=["C", "S", "tiles", "splits"])
def _sk_fuse_select_dx_kernel(
    dout_ptr,
    dx_ptrs,
    x_ptrs,
    norm_ptrs,
    logits_ptr,
    share_ptr,
    drift_ptr,
    strides,
    logits_strides,
    C,
    S,
    tiles,
    splits,
    NUM_BRANCHES: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx_i = scale_i * (keep * (a_i * dout + share) - dbeta_i - xhat_i * dgamma_i).

    a is the softmax of logits over the branches; share = ds / S; dbeta_i and dgamma_i, the rows of
    drift, are divided by m = B S. Without drift, where the statistics are constants, both are zero.
    scale_i = gamma_i / sqrt(var_i + EPS); keep and xhat_i as in the kernel of the sums.
    Shapes: dx_i, dout and x_i [B, C, S] and logits [B, M, C] of any strides; mean_i, var_i, gamma_i
    and beta_i [C]; share [B, C] and drift [2, M, C] contiguous, in ACC. Passes moved: M + 1 read, M
    written. Source: the derivative of Li et al. 2019, eqs. 1 to 6, through batch norm and ReLU.
    """
    # One program owns BLOCK_C channels of one image over `tiles` tiles of BLOCK_S positions.
    pid_b, pid_c, pid_s = program_coordinates(C, splits, TILE.block_c)
    offs_c = pid_c * TILE.block_c + tl.arange(0, TILE.block_c)
    mask_c = offs_c < C
    # Vectors are [BLOCK_C].
    means, scales, betas = norm_vectors(norm_ptrs, offs_c, mask_c, EPS, ACC)
    share = tl.load(share_ptr + pid_b * C + offs_c, mask=mask_c, other=0.0)
    attn = branch_weights(
        logits_ptr, logits_strides, pid_b, offs_c, mask_c, NUM_BRANCHES, "softmax", ACC
    )
    dbetas, slopes = (), ()
    if drift_ptr is not None:
        rstds = inverse_deviations(norm_ptrs[1], offs_c, mask_c, EPS, ACC)
        for i in tl.static_range(NUM_BRANCHES):
            dbeta_ptr = drift_ptr + (DBETA * NUM_BRANCHES + i) * tl.cast(C, tl.int64)
            dgamma_ptr = drift_ptr + (DGAMMA * NUM_BRANCHES + i) * tl.cast(C, tl.int64)
            dbetas = dbetas + (channel_vector(dbeta_ptr, offs_c, mask_c, ACC, 0.0),)
            dgamma = channel_vector(dgamma_ptr, offs_c, mask_c, ACC, 0.0)
            slopes = slopes + (rstds[i] * dgamma,)
    strides = known_strides(strides, TILE)
    first, last = own_tiles(tiles_of_row(S, TILE), tiles, pid_s)
    for tile in tl.range(first, last, num_stages=TILE.num_stages):
        corner = (pid_b, pid_c * TILE.block_c, tile * TILE.block_s)
        # Tiles are [BLOCK_C, BLOCK_S].
        mask, reads = tile_masks(corner, strides, C, S, TILE)
        dout = load_tile(dout_ptr, strides, NUM_BRANCHES, corner, reads, TILE, ACC)
        for i in tl.static_range(NUM_BRANCHES):
            x = load_tile(x_ptrs[i], strides, i, corner, reads, TILE, ACC)
            keep = kept_by_relu(normalised(x, means[i], scales[i], betas[i]))
            dy = tl.where(keep, attn[i][:, None] * dout + share[:, None], 0.0)
            if drift_ptr is not None:
                dy = dy - dbetas[i][:, None] - (x - means[i][:, None]) * slopes[i][:, None]
            dx = scales[i][:, None] * dy
            store_tile(dx_ptrs[i], strides, NUM_BRANCHES + 1 + i, corner, mask, TILE, dx)


def sk_fuse_select_sums(dout: Tensor, xs: tuple[Tensor, ...], norms: Norms) -> Tensor:
    """Launches the sums: dout and M tensors [B, C, *spatial] -> partial sums [splits, 4, B, M, C].

    They are to be added in order; the four are `DOUT_KEEP`, `KEEP`, `DOUT_KEEP_XHAT`, `KEEP_XHAT`.
    """
    B, C = dout.shape[:2]
    shape = (configuration(SUMS, xs).splits, NUM_SUMS.value, B, len(xs), C)
    partial = dout.new_empty(shape, dtype=accumulator(dout.dtype)[0])
    launch(sk_fuse_select_sums_launch, partial, dout, xs, norms[:4], EPS=norms.eps)
    return partial


def sk_fuse_select_dx(
    dxs: tuple[Tensor, ...],
    dout: Tensor,
    xs: tuple[Tensor, ...],
    norms: Norms,
    logits: Tensor,
    share: Tensor,
    drift: Tensor | None,
) -> None:
    """Launches the gradients of the branches: fills ``dxs`` [B, C, *spatial].

    ``share`` [B, C] and ``drift`` [2, M, C], of `DBETA` and `DGAMMA`, are contiguous, in the dtype
    of the sums; ``drift`` is None where the statistics are constants.
    """
    pointers = (dout, dxs, xs, norms[:4], logits, share, drift)
    launch(sk_fuse_select_dx_launch, *pointers, EPS=norms.eps)


sk_fuse_select_sums_launch = functools.partial(streaming_launch, _sk_fuse_select_sums_kernel, SUMS)
sk_fuse_select_dx_launch = functools.partial(streaming_launch, _sk_fuse_select_dx_kernel, DX)
