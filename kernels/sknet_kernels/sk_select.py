"""select: the sum of the branches, each weighed by a softmax over them or by another activation."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import (
    accumulator,
    configuration,
    small_launch,
    streaming_launch,
)
from sknet_kernels.config import SELECT, SELECT_BWD
from sknet_kernels.jit import (
    branch_weights,
    branch_weights_bwd,
    known_strides,
    load_tile,
    norm_vectors,
    normalised,
    own_tiles,
    plus,
    program_coordinates,
    relu,
    store_tile,
    tile_masks,
    tiles_of_row,
    zero_sums,
)
from sknet_kernels.launch import launch
from sknet_kernels.norms import Norms
from sknet_kernels.small import SELECT_BWD_COMBINE


@triton.jit(do_not_specialize=["C", "S", "tiles", "splits"])
def _sk_select_fwd_kernel(
    out_ptr,
    x_ptrs,
    logits_ptr,
    norm_ptrs,
    strides,
    logits_strides,
    C,
    S,
    tiles,
    splits,
    NUM_BRANCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    """out[b, c, s] = sum over i of a_i[b, c] * u_i[b, c, s], with a = ACTIVATION of logits.

    u_i is x_i, or with norms max((x_i - mean_i) / sqrt(var_i + EPS) * gamma_i + beta_i, 0).
    Shapes: x_i and out [B, C, S], logits [B, M, C], all of any strides; mean_i, var_i, gamma_i
    and beta_i [C]. Arithmetic in ACC.
    Passes moved: M read, 1 written. Source: Li et al. 2019, eqs. 5 and 6.
    """
    # One program owns BLOCK_C channels of one image over `tiles` tiles of BLOCK_S positions.
    pid_b, pid_c, pid_s = program_coordinates(C, splits, TILE.block_c)
    offs_c = pid_c * TILE.block_c + tl.arange(0, TILE.block_c)
    mask_c = offs_c < C
    # Vectors are [BLOCK_C].
    attn = branch_weights(
        logits_ptr, logits_strides, pid_b, offs_c, mask_c, NUM_BRANCHES, ACTIVATION, ACC
    )
    if norm_ptrs is not None:
        means, scales, betas = norm_vectors(norm_ptrs, offs_c, mask_c, EPS, ACC)
    strides = known_strides(strides, TILE)
    first, last = own_tiles(tiles_of_row(S, TILE), tiles, pid_s)
    for tile in tl.range(first, last, num_stages=TILE.num_stages):
        corner = (pid_b, pid_c * TILE.block_c, tile * TILE.block_s)
        # Tiles are [BLOCK_C, BLOCK_S].
        mask, reads = tile_masks(corner, strides, C, S, TILE)
        out = tl.zeros(mask.shape, ACC)
        for i in tl.static_range(NUM_BRANCHES):
            u = load_tile(x_ptrs[i], strides, i, corner, reads, TILE, ACC)
            if norm_ptrs is not None:
                u = relu(normalised(u, means[i], scales[i], betas[i]))
            out += attn[i][:, None] * u
        store_tile(out_ptr, strides, NUM_BRANCHES, corner, mask, TILE, out)


@triton.jit(do_not_specialize=["B", "C", "S", "tiles", "splits"])
def _sk_select_bwd_kernel(
    dout_ptr,
    dx_ptrs,
    partial_ptr,
    x_ptrs,
    logits_ptr,
    strides,
    logits_strides,
    B,
    C,
    S,
    tiles,
    splits,
    NUM_BRANCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx_i = a_i * dout;  partial[k]_i = sum over the positions s of split k of dout * x_i.

    Shapes: dx_i, dout and x_i [B, C, S] and logits [B, M, C] of any strides; partial
    [splits, B, M, C] contiguous. Sums are kept in ACC.
    Passes moved: M + 1 read, M written. Source: the derivative of Li et al. 2019, eqs. 5 and 6.
    """
    # One program owns BLOCK_C channels of one image over `tiles` tiles of BLOCK_S positions.
    pid_b, pid_c, pid_s = program_coordinates(C, splits, TILE.block_c)
    offs_c = pid_c * TILE.block_c + tl.arange(0, TILE.block_c)
    mask_c = offs_c < C
    # Vectors are [BLOCK_C].
    attn = branch_weights(
        logits_ptr, logits_strides, pid_b, offs_c, mask_c, NUM_BRANCHES, ACTIVATION, ACC
    )
    products = zero_sums(NUM_BRANCHES, ACC, TILE)
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
            grown = grown + (plus(products[i], tl.where(mask, dout * x, 0.0)),)
            dx = attn[i][:, None] * dout
            store_tile(dx_ptrs[i], strides, NUM_BRANCHES + 1 + i, corner, mask, TILE, dx)
        products = grown
    for i in tl.static_range(NUM_BRANCHES):
        row = (pid_s * B + pid_b) * NUM_BRANCHES + i
        tl.store(partial_ptr + row * C + offs_c, tl.sum(products[i], axis=1), mask=mask_c)


@triton.jit(do_not_specialize=["B", "C", "splits"])
def _sk_select_bwd_combine_kernel(
    dlogits_ptr,
    partial_ptr,
    logits_ptr,
    logits_strides,
    B,
    C,
    splits,
    NUM_BRANCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The dlogits of `branch_weights_bwd`, with g_i the sum over k of partial[k], in order of k.

    Shapes: partial [splits, B, M, C] and dlogits [B, M, C] contiguous, logits [B, M, C] of any
    strides. Passes moved: none of full size.
    """
    # One program owns BLOCK_C channels of one image.
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    pid_b, pid_c, _ = program_coordinates(C, 1, BLOCK_C)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    # Vectors are [BLOCK_C].
    attn = branch_weights(
        logits_ptr, logits_strides, pid_b, offs_c, mask_c, NUM_BRANCHES, ACTIVATION, ACC
    )
    dattn = ()
    for i in tl.static_range(NUM_BRANCHES):
        total = tl.zeros([BLOCK_C], ACC)
        for k in range(splits):
            row = (tl.cast(B, tl.int64) * k + pid_b) * NUM_BRANCHES + i
            total += tl.load(partial_ptr + row * C + offs_c, mask=mask_c, other=0.0)  # [BLOCK_C]
        dattn = dattn + (total,)
    dlogits = branch_weights_bwd(attn, dattn, NUM_BRANCHES, ACTIVATION)
    for i in tl.static_range(NUM_BRANCHES):
        offs = (pid_b * NUM_BRANCHES + i) * C + offs_c
        tl.store(dlogits_ptr + offs, dlogits[i].to(dlogits_ptr.dtype.element_ty), mask=mask_c)


def sk_select_fwd(
    out: Tensor,
    xs: tuple[Tensor, ...],
    logits: Tensor,
    norms: Norms | None = None,
    *,
    activation: str = "softmax",
) -> None:
    """Launches select: M tensors and logits [B, M, C] -> ``out``, [B, C, *spatial].

    ``activation`` is "softmax", "sigmoid" or "none". With ``norms`` the branches are normalised
    and rectified on the fly.
    """
    pointers, eps = (out, xs, logits, norms and norms[:4]), norms and norms.eps
    launch(sk_select_fwd_launch, *pointers, ACTIVATION=activation, EPS=eps)


def sk_select_bwd(
    dxs: tuple[Tensor, ...],
    dout: Tensor,
    xs: tuple[Tensor, ...],
    logits: Tensor,
    *,
    activation: str = "softmax",
) -> Tensor:
    """Launches select's backward: fills ``dxs`` [B, C, *spatial], returns dlogits [B, M, C]."""
    splits = configuration(SELECT_BWD, xs).splits
    partial = dout.new_empty((splits, *logits.shape), dtype=accumulator(dout.dtype)[0])
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(sk_select_bwd_launch, dout, dxs, partial, xs, logits, ACTIVATION=activation)
    launch(sk_select_bwd_combine_launch, dlogits, partial, logits, ACTIVATION=activation)
    return dlogits


sk_select_fwd_launch = functools.partial(streaming_launch, _sk_select_fwd_kernel, SELECT)
sk_select_bwd_launch = functools.partial(streaming_launch, _sk_select_bwd_kernel, SELECT_BWD)
sk_select_bwd_combine_launch = functools.partial(
    small_launch, _sk_select_bwd_combine_kernel, SELECT_BWD_COMBINE, {"partial_ptr": "kBMC"}
)
