"""fuse: the average, or the sum, over space of the sum of the branches."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import (
    accumulator,
    configuration,
    small_launch,
    streaming_launch,
)
from sknet_kernels.config import FUSE
from sknet_kernels.jit import (
    known_strides,
    load_tile,
    norm_vectors,
    normalised,
    own_tiles,
    plus,
    program_coordinates,
    relu,
    tile_masks,
    tiles_of_row,
    zero_sums,
)
from sknet_kernels.launch import launch
from sknet_kernels.layout import positions
from sknet_kernels.norms import Norms
from sknet_kernels.small import FUSE_COMBINE


@triton.jit(do_not_specialize=["B", "C", "S", "tiles", "splits"])
def _sk_fuse_kernel(
    partial_ptr,
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
    """partial[k, b, c] = sum over i, and over the positions s of split k, of u_i[b, c, s].

    u_i is x_i, or with norms max((x_i - mean_i) / sqrt(var_i + EPS) * gamma_i + beta_i, 0).
    Shapes: x_i [B, C, S] of any strides; mean_i, var_i, gamma_i and beta_i [C]; partial
    [splits, B, C] contiguous. Sums are kept in ACC. Passes moved: M read.
    Source: Li et al. 2019, eqs. 1 and 2.
    """
    # One program owns BLOCK_C channels of one image over `tiles` tiles of BLOCK_S positions.
    pid_b, pid_c, pid_s = program_coordinates(C, splits, TILE.block_c)
    offs_c = pid_c * TILE.block_c + tl.arange(0, TILE.block_c)
    mask_c = offs_c < C
    if norm_ptrs is not None:
        # Vectors are [BLOCK_C].
        means, scales, betas = norm_vectors(norm_ptrs, offs_c, mask_c, EPS, ACC)
    (total,) = zero_sums(1, ACC, TILE)
    strides = known_strides(strides, TILE)
    first, last = own_tiles(tiles_of_row(S, TILE), tiles, pid_s)
    for tile in tl.range(first, last, num_stages=TILE.num_stages):
        corner = (pid_b, pid_c * TILE.block_c, tile * TILE.block_s)
        # Tiles are [BLOCK_C, BLOCK_S].
        mask, reads = tile_masks(corner, strides, C, S, TILE)
        u = tl.zeros(mask.shape, ACC)
        for i in tl.static_range(NUM_BRANCHES):
            x = load_tile(x_ptrs[i], strides, i, corner, reads, TILE, ACC)
            if norm_ptrs is not None:
                x = relu(normalised(x, means[i], scales[i], betas[i]))
            u += tl.where(mask, x, 0.0)
        total = plus(total, u)
    row = pid_s * B + pid_b
    tl.store(partial_ptr + row * C + offs_c, tl.sum(total, axis=1), mask=mask_c)


@triton.jit(do_not_specialize=["size", "S", "splits"])
def _sk_fuse_combine_kernel(
    out_ptr,
    partial_ptr,
    size,
    S,
    splits,
    MEAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[n] = sum over k of partial[k, n], added in the order of k, divided by S with MEAN.

    Shapes: partial [splits, size], out [size], with size = B * C. Passes moved: none of full size.
    """
    # One program owns BLOCK_C elements of out, the channels of all images laid end to end.
    offs = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < size
    total = tl.zeros([BLOCK_C], partial_ptr.dtype.element_ty)  # Vectors are [BLOCK_C].
    offs_partial = offs
    for _ in range(splits):
        total += tl.load(partial_ptr + offs_partial, mask=mask, other=0.0)
        offs_partial += size
    if MEAN:
        total = total / S
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def sk_fuse_partials(xs: tuple[Tensor, ...], norms: Norms | None) -> Tensor:
    """Launches fuse: M tensors [B, C, *spatial] -> partial sums [splits, B, C] in the sums' dtype.

    They are to be added in order; they are not divided by S. With ``norms`` the branches are
    normalised and rectified on the fly.
    """
    x, splits = xs[0], configuration(FUSE, xs).splits
    partial = x.new_empty((splits, *x.shape[:2]), dtype=accumulator(x.dtype)[0])
    launch(sk_fuse_launch, partial, xs, norms and norms[:4], EPS=norms and norms.eps)
    return partial


def sk_fuse_fwd(xs: tuple[Tensor, ...], reduction: str = "mean") -> Tensor:
    """Launches fuse: M tensors [B, C, *spatial] -> [B, C] in their dtype.

    ``reduction`` over space is "mean" or "sum".
    """
    x = xs[0]
    partial, out = sk_fuse_partials(xs, None), x.new_empty(x.shape[:2])
    launch(sk_fuse_combine_launch, out, partial, S=positions(x), MEAN=reduction == "mean")
    return out


sk_fuse_launch = functools.partial(streaming_launch, _sk_fuse_kernel, FUSE)
sk_fuse_combine_launch = functools.partial(
    small_launch, _sk_fuse_combine_kernel, FUSE_COMBINE, {"partial_ptr": "kBC"}
)
