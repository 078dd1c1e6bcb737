"""fuse: the average, or the sum, over space of the sum of the branches."""

import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import (
    accumulator,
    configuration,
    norm_pointers,
    small_launch,
    streaming_launch,
)
from sknet_kernels.config import FUSE, LaunchConfig
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
from sknet_kernels.launch import Launch, Pointer, launch
from sknet_kernels.layout import positions
from sknet_kernels.norms import Norms
from sknet_kernels.small import FUSE_COMBINE, SmallConfig, SmallProblem


@triton.jit(do_not_specialize=["B", "C", "S", "tiles", "splits"])
def _sk_fuse_kernel(
    partial_ptr,
    x_ptrs,
    mean_ptrs,
    var_ptrs,
    gamma_ptrs,
    beta_ptrs,
    strides,
    B,
    C,
    S,
    tiles,
    splits,
    NUM_BRANCHES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """partial[k, b, c] = sum over i, and over the positions s of split k, of u_i[b, c, s].

    u_i is x_i, or with HAS_NORM max((x_i - mean_i) / sqrt(var_i + EPS) * gamma_i + beta_i, 0).
    Shapes: x_i [B, C, S] of any strides; mean_i, var_i, gamma_i and beta_i [C]; partial
    [splits, B, C] contiguous. Sums are kept in ACC. Passes moved: M read.
    Source: Li et al. 2019, eqs. 1 and 2.
    """
    # One program owns BLOCK_C channels of one image over `tiles` tiles of BLOCK_S positions.
    pid_b, pid_c, pid_s = program_coordinates(C, splits, BLOCK_C)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if HAS_NORM:
        # Vectors are [BLOCK_C].
        means, scales, betas = norm_vectors(
            mean_ptrs, var_ptrs, gamma_ptrs, beta_ptrs, offs_c, mask_c, EPS, ACC
        )
    (total,) = zero_sums(1, ACC, ALIGN, LAYOUT, BLOCK_C, BLOCK_S)
    strides = known_strides(strides, ALIGN, LAYOUT)
    first, last = own_tiles(tiles_of_row(S, ALIGN, LAYOUT, BLOCK_S), tiles, pid_s)
    for tile in tl.range(first, last, num_stages=NUM_STAGES):
        corner = (pid_b, pid_c * BLOCK_C, tile * BLOCK_S)
        # Tiles are [BLOCK_C, BLOCK_S].
        mask, reads = tile_masks(corner, strides, C, S, ALIGN, LAYOUT, BLOCK_C, BLOCK_S)
        u = tl.zeros([BLOCK_C, BLOCK_S], ACC)
        for i in tl.static_range(NUM_BRANCHES):
            x = load_tile(x_ptrs[i], strides, i, corner, reads, ALIGN, LAYOUT, ACC)
            if HAS_NORM:
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
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[n] = sum over k of partial[k, n], added in the order of k, divided by S with MEAN.

    Shapes: partial [splits, size], out [size], with size = B * C. Passes moved: none of full size.
    """
    # One program owns BLOCK_C elements of out, the channels of all images laid end to end.
    offs = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < size
    total = tl.zeros([BLOCK_C], ACC)  # Vectors are [BLOCK_C].
    offs_partial = offs
    for _ in range(splits):
        total += tl.load(partial_ptr + offs_partial, mask=mask, other=0.0)
        offs_partial += size
    if MEAN:
        total = total / S
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def sk_fuse_partials(
    xs: tuple[Tensor, ...], norms: Norms | None, *, config: LaunchConfig | None = None
) -> Tensor:
    """Launches fuse: M tensors [B, C, *spatial] -> partial sums [splits, B, C] in the sums' dtype.

    They are to be added in order; they are not divided by S. With ``norms`` the branches are
    normalised and rectified on the fly.
    """
    x = xs[0]
    config = configuration(FUSE, xs, config)
    partial = x.new_empty((config.splits, *x.shape[:2]), dtype=accumulator(x.dtype)[0])
    eps = 0.0 if norms is None else norms.eps
    launch(sk_fuse_launch, partial, xs, *norm_pointers(norms), eps=eps, config=config)
    return partial


def sk_fuse_fwd(
    xs: tuple[Tensor, ...],
    *,
    reduction: str = "mean",
    combine: SmallConfig | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launches fuse: M tensors [B, C, *spatial] -> [B, C] in their dtype.

    ``reduction`` over space is "mean" or "sum"; ``combine`` is how partial sums are joined.
    """
    x = xs[0]
    partial = sk_fuse_partials(xs, None, config=config)
    out = x.new_empty(x.shape[:2])
    mean = reduction == "mean"
    launch(sk_fuse_combine_launch, out, partial, S=positions(x), mean=mean, config=combine)
    return out


def sk_fuse_launch(*pointers: Pointer, eps: float, config: LaunchConfig | None = None) -> Launch:
    """Returns the launch of partial, xs, means, variances, gammas and betas."""
    return streaming_launch(_sk_fuse_kernel, pointers, kernel=FUSE, config=config, EPS=eps)


def sk_fuse_combine_launch(
    out: Tensor, partial: Tensor, *, S: int, mean: bool, config: SmallConfig | None = None
) -> Launch:
    """Returns the launch that fills ``out`` [B, C] from ``partial`` [splits, B, C]."""
    splits, B, C = partial.shape
    return small_launch(
        _sk_fuse_combine_kernel,
        (out, partial),
        kernel=FUSE_COMBINE,
        problem=SmallProblem(B, C, 1, parts=splits, itemsize=partial.itemsize),
        config=config,
        scalars={"size": B * C, "S": S},
        MEAN=mean,
        ACC=accumulator(partial.dtype)[1],
    )
