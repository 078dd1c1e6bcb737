"""The MLP between fuse and select, forward and backward: small tensors, one launch a function.

Forward: `sk_hidden`, `sk_logits`. Backward: `sk_hidden_bwd`, `sk_channels_bwd`. What a program
needs of all images, such as the statistics of fc1's norm, it computes for itself: the hidden layer
lies in the cache, and a launch of its own would cost more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import accumulator
from sknet_kernels.config import DeviceFacts, MLPConfig, MLPProblem, cdiv, next_power_of_two
from sknet_kernels.jit import (
    branch_weights,
    branch_weights_bwd,
    channel_vector,
    kept_by_relu,
    relu,
    zero_tiles,
)
from sknet_kernels.launch import Launch, launch
from sknet_kernels.norms import ChannelGradients, Norms, common_dtype

NUM_SUMS = 4


@triton.jit
def _joined(
    ptr,
    offs,
    mask,
    step,
    splits,
    outer,
    inner,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns the sum over k < splits of ptr[k * step + row + offs] for each of ROWS rows.

    Row j lies at (j // INNER) * outer + (j % INNER) * inner; ``mask`` has a mask for each. Sums
    are added in the order of k; the loads of UNROLL parts of all rows are under way together.
    """
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros(offs.shape, ACC),)
    for first in range(0, splits, UNROLL):
        parts = ()
        for k in tl.static_range(UNROLL):
            number = tl.cast(first, tl.int64) + k
            for j in tl.static_range(ROWS):
                row_ptrs = ptr + ((j // INNER) * outer + (j % INNER) * inner) + offs
                there = mask[j] & (number < splits)
                part = tl.load(row_ptrs + number * step, mask=there, other=0.0)
                parts = parts + (part,)
        for k in tl.static_range(UNROLL):
            grown = ()
            for j in tl.static_range(ROWS):
                grown = grown + (totals[j] + parts[k * ROWS + j],)
            totals = grown
    return totals


@triton.jit(do_not_specialize=["splits", "B", "S"])
def _sk_hidden_kernel(
    pooled_ptr,
    hidden_ptr,
    partial_ptr,
    weight_ptr,
    bias_ptr,
    weight_stride_d,
    weight_stride_c,
    splits,
    B,
    C,
    d,
    S,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pooled[b, c] = (sum over k of partial[k, b, c]) / S;  hidden = pooled weight^T + bias.

    Shapes: partial [SPLITS, B, C], pooled [B, C] and hidden [B, d] in ACC; weight [d, C] of any
    strides, bias [d] or None. Passes moved: none of full size. Source: Li et al. 2019, eqs. 2, 3.
    """
    # One program owns BLOCK_D elements of the hidden layer of IMAGES images.
    blocks_d = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    first_b = (pid // blocks_d).to(tl.int64) * IMAGES
    offs_d = (pid % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    step = tl.cast(B, tl.int64) * C
    # Summed over channels at the end alone: no thread waits for another in the loop.
    products = zero_tiles(IMAGES, ACC, BLOCK_D, BLOCK_C)
    for first in range(0, C, BLOCK_C):
        offs_c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        weight_ptrs = weight_ptr + offs_d[:, None] * weight_stride_d + offs_c * weight_stride_c
        weight = tl.load(weight_ptrs, mask=mask_d[:, None] & mask_c[None, :], other=0.0)
        masks = ()
        for j in tl.static_range(IMAGES):
            masks = masks + (mask_c & (first_b + j < B),)
        totals = _joined(
            partial_ptr + first_b * C, offs_c, masks, step, splits, tl.cast(C, tl.int64), 0,
            IMAGES, 1, UNROLL, ACC,
        )  # fmt: skip
        grown = ()
        for j in tl.static_range(IMAGES):
            pooled = totals[j] / tl.cast(S, ACC)
            pooled_ptrs = pooled_ptr + (first_b + j) * C + offs_c
            tl.store(pooled_ptrs, pooled, mask=masks[j] & (pid % blocks_d == 0))
            grown = grown + (products[j] + weight.to(ACC) * pooled[None, :],)
        products = grown
    bias = channel_vector(bias_ptr, offs_d, mask_d, ACC, 0.0)
    for j in tl.static_range(IMAGES):
        hidden = tl.sum(products[j], axis=1) + bias
        tl.store(hidden_ptr + (first_b + j) * d + offs_d, hidden, mask=mask_d & (first_b + j < B))


@triton.jit
def _batch_moments(
    x_ptr, B, d, offs_d, mask_d, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Returns mean and sum of squared deviations over the images of x [B, d], vectors [BLOCK_D].

    Blocks of images are joined in their order. Source: Chan, Golub and LeVeque 1983, eq. 2.1.
    """
    mean = tl.zeros([BLOCK_D], ACC)
    m2 = tl.zeros([BLOCK_D], ACC)
    for first in range(0, B, BLOCK_B):
        offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + offs_b[:, None] * d + offs_d[None, :], mask=mask, other=0.0)
        before = tl.cast(first, ACC)
        count = tl.cast(tl.minimum(B - first, BLOCK_B), ACC)
        block_mean = tl.sum(x, axis=0) / count
        deviation = tl.where(mask, x - block_mean[None, :], 0.0)
        apart = block_mean - mean
        mean += apart * (count / (before + count))
        m2 += tl.sum(deviation * deviation, axis=0)
        m2 += apart * apart * (before * count / (before + count))
    return mean, m2


@triton.jit
def _fc1_norm(norm_ptrs, offs_d, mask_d, EPS: tl.constexpr, ACC: tl.constexpr):
    """Returns mean, rstd, gamma and beta of fc1's norm, vectors [BLOCK_D]."""
    var = channel_vector(norm_ptrs[1], offs_d, mask_d, ACC, 1.0)
    return (
        channel_vector(norm_ptrs[0], offs_d, mask_d, ACC, 0.0),
        1.0 / tl.sqrt(var + EPS),
        channel_vector(norm_ptrs[2], offs_d, mask_d, ACC, 1.0),
        channel_vector(norm_ptrs[3], offs_d, mask_d, ACC, 0.0),
    )


@triton.jit
def _activated(hidden, norm):
    """Returns hidden [BLOCK_B, BLOCK_D] normalised, and its activation z; see `_fc1_norm`."""
    mean, rstd, gamma, beta = norm
    hhat = (hidden - mean[None, :]) * rstd[None, :]
    return hhat, relu(hhat * gamma[None, :] + beta[None, :])


@triton.jit(do_not_specialize=["B"])
def _sk_logits_kernel(
    logits_ptr,
    stats_ptr,
    kept_ptr,
    hidden_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    weight_ptr,
    bias_ptr,
    weight_stride_n,
    weight_stride_d,
    B,
    N,
    d,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """logits[b, n] = z weight^T + bias, with z = max((hidden - mean) * rstd * gamma + beta, 0).

    Without mean_ptr, mean and variance are those of hidden over its images, and the first program
    writes stats, mean and biased variance, and kept, mean and unbiased variance.
    Shapes: hidden [B, d], logits [B, N], stats and kept [2, d] in ACC, N = M * C; weight [N, d] of
    any strides; bias [N], gamma and beta [d] or None. Arithmetic in ACC. Passes moved: none of full
    size. Source: Li et al. 2019, eqs. 3 and 4.
    """
    # One program owns BLOCK_N logits of BLOCK_B images.
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_b = (pid // blocks_n).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = (pid % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_b, mask_n = offs_b < B, offs_n < N
    logits = tl.zeros([BLOCK_B, BLOCK_N], ACC)
    for first in range(0, d, BLOCK_D):
        offs_d = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_D)
        mask_d = offs_d < d
        weight_ptrs = weight_ptr + offs_d[:, None] * weight_stride_d + offs_n * weight_stride_n
        weight = tl.load(weight_ptrs, mask=mask_d[:, None] & mask_n[None, :], other=0.0).to(ACC)
        norm_ptrs = (mean_ptr, var_ptr, gamma_ptr, beta_ptr)
        norm = _fc1_norm(norm_ptrs, offs_d, mask_d, EPS, ACC)
        if mean_ptr is None:
            mean, m2 = _batch_moments(hidden_ptr, B, d, offs_d, mask_d, ACC, BLOCK_R, BLOCK_D)
            var = m2 / tl.cast(tl.maximum(B, 1), ACC)
            mask_stats = mask_d & (pid == 0)
            tl.store(stats_ptr + offs_d, mean, mask=mask_stats)
            tl.store(stats_ptr + d + offs_d, var, mask=mask_stats)
            tl.store(kept_ptr + offs_d, mean, mask=mask_stats)
            tl.store(kept_ptr + d + offs_d, m2 / tl.cast(B - 1, ACC), mask=mask_stats)
            norm = (mean, 1.0 / tl.sqrt(var + EPS), norm[2], norm[3])
        hidden_ptrs = hidden_ptr + offs_b[:, None] * d + offs_d[None, :]
        hidden = tl.load(hidden_ptrs, mask=mask_b[:, None] & mask_d[None, :], other=0.0)
        _, z = _activated(hidden, norm)
        # weight is 0 past d, but 0 * inf is NaN.
        z = tl.where(mask_d[None, :], z, 0.0)
        logits += tl.dot(z, weight, input_precision="ieee", out_dtype=ACC)
    logits += channel_vector(bias_ptr, offs_n, mask_n, ACC, 0.0)[None, :]
    tl.store(
        logits_ptr + offs_b[:, None] * N + offs_n[None, :],
        logits,
        mask=mask_b[:, None] & mask_n[None, :],
    )


@triton.jit
def _store_sums(ptr, offs_c, sums, masks, is_first, row, C, VECTORS: tl.constexpr):
    """Stores two of P1 to P4, two rows apart, as `_joined` returns them."""
    for j in tl.static_range(2 * VECTORS):
        offs = (j // VECTORS) * 2 * row + tl.cast(C, tl.int64) * (j % VECTORS) + offs_c
        tl.store(ptr + offs, sums[j], mask=masks[j] & is_first)


@triton.jit(do_not_specialize=["splits", "B"])
def _sk_hidden_bwd_kernel(
    dlogits_ptr,
    dz_ptr,
    sums_ptr,
    partial_ptr,
    logits_ptr,
    gamma_ptrs,
    beta_ptrs,
    weight_ptr,
    weight_stride_n,
    weight_stride_d,
    splits,
    B,
    C,
    d,
    NUM_BRANCHES: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums[n] = sum over k of partial[k, n];  dlogits: softmax's backward;  dz = dlogits weight.

    da_i = gamma_i P3_i + beta_i P1_i, with the rows P1 to P4 of sums; a = softmax of logits.
    Shapes: partial [SPLITS, 4, B, M, C], sums [4, B, M, C], None where that is partial itself,
    logits and dlogits [B, M, C] and dz [B, d] contiguous, in ACC; gamma_i and beta_i [C] or None;
    weight [M * C, d] of any strides.
    Passes moved: none of full size. Source: the derivative of Li et al. 2019, eqs. 3 to 6.
    """
    # One program owns BLOCK_D elements of dz of IMAGES images, the first of an image the rest too.
    blocks_d = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    first_b = (pid // blocks_d).to(tl.int64) * IMAGES
    offs_d = (pid % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    row = tl.cast(C, tl.int64) * NUM_BRANCHES * B
    VECTORS: tl.constexpr = IMAGES * NUM_BRANCHES
    products = zero_tiles(IMAGES, ACC, BLOCK_C, BLOCK_D)
    for first in range(0, C, BLOCK_C):
        offs_c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        masks = ()
        for j in tl.static_range(2 * VECTORS):
            masks = masks + (mask_c & (first_b + j % VECTORS // NUM_BRANCHES < B),)
        image = first_b * NUM_BRANCHES * C
        if sums_ptr is not None:
            p2_p4 = _joined(
                partial_ptr + row + image, offs_c, masks, 4 * row, splits, 2 * row,
                tl.cast(C, tl.int64), 2 * VECTORS, VECTORS, UNROLL, ACC,
            )  # fmt: skip
            _store_sums(
                sums_ptr + row + image, offs_c, p2_p4, masks, pid % blocks_d == 0, row, C, VECTORS
            )
        p1_p3 = _joined(
            partial_ptr + image, offs_c, masks, 4 * row, splits, 2 * row,
            tl.cast(C, tl.int64), 2 * VECTORS, VECTORS, UNROLL, ACC,
        )  # fmt: skip
        if sums_ptr is not None:
            _store_sums(
                sums_ptr + image, offs_c, p1_p3, masks, pid % blocks_d == 0, row, C, VECTORS
            )
        gammas, betas, dlogits = (), (), ()
        for i in tl.static_range(NUM_BRANCHES):
            gammas = gammas + (channel_vector(gamma_ptrs[i], offs_c, mask_c, ACC, 1.0),)
            betas = betas + (channel_vector(beta_ptrs[i], offs_c, mask_c, ACC, 0.0),)
        for b in tl.static_range(IMAGES):
            dattn = ()
            for i in tl.static_range(NUM_BRANCHES):
                p1, p3 = p1_p3[b * NUM_BRANCHES + i], p1_p3[VECTORS + b * NUM_BRANCHES + i]
                dattn = dattn + (gammas[i] * p3 + betas[i] * p1,)
            image_ptr = logits_ptr + (first_b + b) * NUM_BRANCHES * C
            attn = branch_weights(
                image_ptr, C, 1, offs_c, masks[b * NUM_BRANCHES], NUM_BRANCHES, "softmax", ACC
            )
            dlogits = dlogits + branch_weights_bwd(attn, dattn, NUM_BRANCHES, "softmax")
        for i in tl.static_range(NUM_BRANCHES):
            offs_n = tl.cast(C, tl.int64) * i + offs_c
            weight_ptrs = weight_ptr + offs_n[:, None] * weight_stride_n + offs_d * weight_stride_d
            weight = tl.load(weight_ptrs, mask=mask_c[:, None] & mask_d[None, :], other=0.0)
            grown = ()
            for b in tl.static_range(IMAGES):
                dlogit = tl.where(mask_c, dlogits[b * NUM_BRANCHES + i], 0.0)
                grown = grown + (products[b] + weight.to(ACC) * dlogit[:, None],)
                offs = (first_b + b) * NUM_BRANCHES * C + offs_n
                mask_first = masks[b * NUM_BRANCHES + i] & (pid % blocks_d == 0)
                tl.store(dlogits_ptr + offs, dlogit, mask=mask_first)
            products = grown
    for b in tl.static_range(IMAGES):
        dz_ptrs = dz_ptr + (first_b + b) * d + offs_d
        tl.store(dz_ptrs, tl.sum(products[b], axis=0), mask=mask_d & (first_b + b < B))


@triton.jit
def _hidden_block(hidden_ptr, dz_ptr, first, B, d, offs_d, mask_d, norm, BLOCK_B: tl.constexpr):
    """Returns dy, hhat and z [BLOCK_B, BLOCK_D] of the images from ``first`` on, 0 past the last.

    dy is the gradient of what the ReLU takes: dz where z > 0, else 0.
    """
    offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
    mask = (offs_b < B)[:, None] & mask_d[None, :]
    offs = offs_b[:, None] * d + offs_d[None, :]
    hidden = tl.load(hidden_ptr + offs, mask=mask, other=0.0)
    dz = tl.load(dz_ptr + offs, mask=mask, other=0.0)
    hhat, z = _activated(hidden, norm)
    dy = tl.where(kept_by_relu(z), dz, 0.0)
    return dy, tl.where(mask, hhat, 0.0), tl.where(mask, z, 0.0)


@triton.jit
def _fc1_norm_bwd(
    hidden_ptr,
    dz_ptr,
    B,
    d,
    offs_d,
    mask_d,
    norm,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns dbeta and dgamma of fc1's norm, the sums over images of dy and of dy hhat."""
    dbeta = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    dgamma = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    for first in range(0, B, BLOCK_B):
        dy, hhat, _ = _hidden_block(hidden_ptr, dz_ptr, first, B, d, offs_d, mask_d, norm, BLOCK_B)
        dbeta += dy
        dgamma += dy * hhat
    return tl.sum(dbeta, axis=0), tl.sum(dgamma, axis=0)


@triton.jit
def _dhidden_block(
    hidden_ptr,
    dz_ptr,
    first,
    B,
    d,
    offs_d,
    mask_d,
    norm,
    sums,
    BATCH_STATS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Returns the gradient [BLOCK_B, BLOCK_D] of fc1's output; sums as of `_fc1_norm_bwd`."""
    dy, hhat, _ = _hidden_block(hidden_ptr, dz_ptr, first, B, d, offs_d, mask_d, norm, BLOCK_B)
    if BATCH_STATS:
        dbeta, dgamma = sums
        images = tl.cast(B, dy.dtype)
        dy = dy - (dbeta / images)[None, :] - hhat * (dgamma / images)[None, :]
    there = (first + tl.arange(0, BLOCK_B) < B)[:, None] & mask_d[None, :]
    return tl.where(there, dy * (norm[2] * norm[1])[None, :], 0.0)


@triton.jit
def _norms_bwd(
    share_ptr,
    drift_ptr,
    dgamma_ptr,
    dbeta_ptr,
    sums_ptr,
    dz_ptr,
    logits_ptr,
    hidden_ptr,
    fc1_norm_ptrs,
    weight_ptr,
    weight_stride_d,
    weight_stride_c,
    pid,
    B,
    C,
    d,
    S,
    NUM_BRANCHES: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fills share, drift, dgamma and dbeta of block ``pid`` of the channels."""
    offs_c = pid.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_c, mask_d = offs_c < C, offs_d < d
    weight_ptrs = weight_ptr + offs_d[:, None] * weight_stride_d + offs_c * weight_stride_c
    weight = tl.load(weight_ptrs, mask=mask_d[:, None] & mask_c[None, :], other=0.0).to(ACC)
    norm = _fc1_norm(fc1_norm_ptrs, offs_d, mask_d, EPS, ACC)
    sums = _fc1_norm_bwd(hidden_ptr, dz_ptr, B, d, offs_d, mask_d, norm, ACC, BLOCK_B, BLOCK_D)
    positions = tl.cast(S, ACC)
    row = tl.cast(B, tl.int64) * NUM_BRANCHES * C
    # The terms of a_i and those of share apart: a product has a layout of its own, and what meets
    # it is laid out anew, a wait for memory each time.
    tiles = zero_tiles(4 * NUM_BRANCHES, ACC, BLOCK_B, BLOCK_C)
    for first in range(0, B, BLOCK_B):
        offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & mask_c[None, :]
        offs = offs_b[:, None] * NUM_BRANCHES * C + offs_c[None, :]
        dhidden = _dhidden_block(
            hidden_ptr, dz_ptr, first, B, d, offs_d, mask_d, norm, sums, BATCH_STATS, BLOCK_B
        )
        share = tl.dot(dhidden, weight, input_precision="ieee", out_dtype=ACC) / positions
        tl.store(share_ptr + offs_b[:, None] * C + offs_c[None, :], share, mask=mask)
        attn = branch_weights(logits_ptr, C, 1, offs, mask, NUM_BRANCHES, "softmax", ACC)
        grown = ()
        for i in tl.static_range(NUM_BRANCHES):
            ptrs = sums_ptr + tl.cast(C, tl.int64) * i + offs
            p1 = tl.load(ptrs, mask=mask, other=0.0)
            p3 = tl.load(ptrs + 2 * row, mask=mask, other=0.0)
            p2 = tl.load(ptrs + row, mask=mask, other=0.0)
            p4 = tl.load(ptrs + 3 * row, mask=mask, other=0.0)
            grown = grown + (
                tiles[4 * i] + attn[i] * p1,
                tiles[4 * i + 1] + share * p2,
                tiles[4 * i + 2] + attn[i] * p3,
                tiles[4 * i + 3] + share * p4,
            )
        tiles = grown
    m = tl.maximum(tl.cast(B, ACC), 1.0) * positions
    for i in tl.static_range(NUM_BRANCHES):
        offs_n = tl.cast(C, tl.int64) * i + offs_c
        dbeta = tl.sum(tiles[4 * i], axis=0) + tl.sum(tiles[4 * i + 1], axis=0)
        dgamma = tl.sum(tiles[4 * i + 2], axis=0) + tl.sum(tiles[4 * i + 3], axis=0)
        _store(dbeta_ptr, offs_n, dbeta, mask_c)
        _store(dgamma_ptr, offs_n, dgamma, mask_c)
        _store(drift_ptr, offs_n, dbeta / m, mask_c)
        _store(drift_ptr, tl.cast(C, tl.int64) * NUM_BRANCHES + offs_n, dgamma / m, mask_c)


@triton.jit
def _fc1_bwd(
    dweight_ptr,
    dbias_ptr,
    dgamma_ptr,
    dbeta_ptr,
    dz_ptr,
    pooled_ptr,
    hidden_ptr,
    norm_ptrs,
    pid,
    B,
    C,
    d,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fills block ``pid`` of fc1's dweight; the first of its channels fills the vectors [d]."""
    blocks_d = tl.cdiv(d, BLOCK_D)
    offs_c = (pid // blocks_d).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = (pid % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_c, mask_d = offs_c < C, offs_d < d
    norm = _fc1_norm(norm_ptrs, offs_d, mask_d, EPS, ACC)
    sums = _fc1_norm_bwd(hidden_ptr, dz_ptr, B, d, offs_d, mask_d, norm, ACC, BLOCK_B, BLOCK_D)
    dbias = tl.zeros([BLOCK_D], ACC)
    dweight = tl.zeros([BLOCK_D, BLOCK_C], ACC)
    for first in range(0, B, BLOCK_B):
        offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & mask_c[None, :]
        pooled_ptrs = pooled_ptr + offs_b[:, None] * C + offs_c[None, :]
        pooled = tl.load(pooled_ptrs, mask=mask, other=0.0)
        dhidden = _dhidden_block(
            hidden_ptr, dz_ptr, first, B, d, offs_d, mask_d, norm, sums, BATCH_STATS, BLOCK_B
        )
        dbias += tl.sum(dhidden, axis=0)
        dweight += tl.dot(tl.trans(dhidden), pooled, input_precision="ieee", out_dtype=ACC)
    offs = offs_d[:, None] * C + offs_c[None, :]
    _store(dweight_ptr, offs, dweight, mask_d[:, None] & mask_c[None, :])
    mask_first = mask_d & (pid < blocks_d)
    _store(dbias_ptr, offs_d, dbias, mask_first)
    _store(dbeta_ptr, offs_d, sums[0], mask_first)
    _store(dgamma_ptr, offs_d, sums[1], mask_first)


@triton.jit
def _fc2_bwd(
    dweight_ptr,
    dbias_ptr,
    dlogits_ptr,
    hidden_ptr,
    norm_ptrs,
    pid,
    B,
    N,
    d,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fills block ``pid`` of fc2's dweight [N, d], and dbias [N]; dlogits is read as [B, N]."""
    blocks_d = tl.cdiv(d, BLOCK_D)
    offs_n = (pid // blocks_d).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = (pid % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < N, offs_d < d
    norm = _fc1_norm(norm_ptrs, offs_d, mask_d, EPS, ACC)
    dbias = tl.zeros([BLOCK_N], ACC)
    dweight = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for first in range(0, B, BLOCK_B):
        offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & mask_n[None, :]
        dlogits_ptrs = dlogits_ptr + offs_b[:, None] * N + offs_n[None, :]
        dlogits = tl.load(dlogits_ptrs, mask=mask, other=0.0)
        # Only z is used; what else the block would load is never loaded.
        _, _, z = _hidden_block(hidden_ptr, hidden_ptr, first, B, d, offs_d, mask_d, norm, BLOCK_B)
        dbias += tl.sum(dlogits, axis=0)
        dweight += tl.dot(tl.trans(dlogits), z, input_precision="ieee", out_dtype=ACC)
    offs = offs_n[:, None] * d + offs_d[None, :]
    _store(dweight_ptr, offs, dweight, mask_n[:, None] & mask_d[None, :])
    _store(dbias_ptr, offs_n, dbias, mask_n & (pid % blocks_d == 0))


@triton.jit(do_not_specialize=["B", "S"])
def _sk_channels_bwd_kernel(
    share_ptr,
    drift_ptr,
    dgamma_ptr,
    dbeta_ptr,
    fc1_dweight_ptr,
    fc1_dbias_ptr,
    fc1_dgamma_ptr,
    fc1_dbeta_ptr,
    fc2_dweight_ptr,
    fc2_dbias_ptr,
    sums_ptr,
    dlogits_ptr,
    dz_ptr,
    logits_ptr,
    pooled_ptr,
    hidden_ptr,
    fc1_mean_ptr,
    fc1_var_ptr,
    fc1_gamma_ptr,
    fc1_beta_ptr,
    fc1_weight_ptr,
    fc1_weight_stride_d,
    fc1_weight_stride_c,
    B,
    C,
    d,
    S,
    NUM_BRANCHES: tl.constexpr,
    FC1_BATCH_STATS: tl.constexpr,
    FC1_EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
):
    """share[b, c] = dhidden fc1_weight / S;  gradients of the parameters of norms, fc1 and fc2.

    dy = dz where z > 0, else 0; dhidden = gamma1 rstd1 (dy - drift1_0 - hhat drift1_1), the drifts
    of fc1's norm being 0 for constant statistics, else the means over images of dy and dy hhat;
    dbeta_i = sum over b of (a_i P1 + share P2), dgamma_i = sum over b of (a_i P3 + share P4);
    drift = (dbeta, dgamma) / (B S); dfc1 = dhidden^T pooled, dfc2_i = dlogits_i^T z.
    Shapes: sums [4, B, M, C], dlogits and logits [B, M, C], dz and hidden [B, d], pooled and share
    [B, C], drift [2, M, C] or None, contiguous, in ACC; fc1_weight [d, C] of any strides;
    gradients contiguous, each in its parameter's dtype: dgamma and dbeta [M, C], fc1's weight
    [d, C], fc2's [M * C, d]. Sums are kept in ACC, over images in their order. Passes moved: none
    of full size. Source: the derivative of Li et al. 2019, eqs. 2 to 6, through batch norm.
    """
    # One program owns BLOCK_C channels of the branches' norms, or a block of fc1's or fc2's weight,
    # and all images.
    pid = tl.program_id(0)
    norm_ptrs = (fc1_mean_ptr, fc1_var_ptr, fc1_gamma_ptr, fc1_beta_ptr)
    channels = tl.cast(C, tl.int64)
    first_fc1 = tl.cdiv(channels, BLOCK_C)
    first_fc2 = first_fc1 + tl.cdiv(channels, BLOCK_N) * tl.cdiv(d, BLOCK_D)
    if pid < first_fc1:
        _norms_bwd(
            share_ptr, drift_ptr, dgamma_ptr, dbeta_ptr, sums_ptr, dz_ptr, logits_ptr, hidden_ptr,
            norm_ptrs, fc1_weight_ptr, fc1_weight_stride_d, fc1_weight_stride_c, pid, B, C, d, S,
            NUM_BRANCHES, FC1_BATCH_STATS, FC1_EPS, ACC, BLOCK_B, BLOCK_C, WHOLE_D,
        )  # fmt: skip
    elif pid < first_fc2:
        _fc1_bwd(
            fc1_dweight_ptr, fc1_dbias_ptr, fc1_dgamma_ptr, fc1_dbeta_ptr, dz_ptr, pooled_ptr,
            hidden_ptr, norm_ptrs, (pid - first_fc1).to(tl.int32), B, C, d,
            FC1_BATCH_STATS, FC1_EPS, ACC, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _fc2_bwd(
            fc2_dweight_ptr, fc2_dbias_ptr, dlogits_ptr, hidden_ptr, norm_ptrs,
            (pid - first_fc2).to(tl.int32), B, channels * NUM_BRANCHES, d,
            FC1_EPS, ACC, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _store(ptr, offs, values, mask):
    """Stores ``values`` in the dtype of the memory, unless there is none."""
    if ptr is not None:
        tl.store(ptr + offs, values.to(ptr.dtype.element_ty), mask=mask)


def sk_hidden(
    partials: Tensor,
    S: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    *,
    config: MLPConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches the pooled average and fc1: partial sums [SPLITS, B, C] -> [B, C] and [B, d]."""
    _, B, C = partials.shape
    pooled, hidden = partials.new_empty((B, C)), partials.new_empty((B, fc1_weight.shape[0]))
    launch(sk_hidden_launch, pooled, hidden, partials, fc1_weight, fc1_bias, S=S, config=config)
    return pooled, hidden


def sk_logits(
    hidden: Tensor,
    fc1_norm: Norms,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    M: int,
    *,
    config: MLPConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launches fc1's norm, ReLU and fc2: hidden [B, d] -> logits [B, M, C] and statistics.

    The statistics of the batch are mean and biased variance [2, d], and in memory of their own
    mean and unbiased variance [2, d]; None where ``fc1_norm`` says what to apply.
    """
    B, d = hidden.shape
    logits = hidden.new_empty((B, M, fc2_weight.shape[0] // M))
    (mean,), (var,), (gamma,), (beta,), eps = fc1_norm
    stats = hidden.new_empty((2, d)) if mean is None else None
    kept = hidden.new_empty((2, d)) if mean is None else None
    launch(
        sk_logits_launch,
        logits, stats, kept, hidden, mean, var, gamma, beta, fc2_weight, fc2_bias,
        eps=eps, config=config,
    )  # fmt: skip
    return logits, stats, kept


def sk_hidden_bwd(
    partials: Tensor,
    logits: Tensor,
    norms: Norms,
    fc2_weight: Tensor,
    *,
    config: MLPConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward to z: [SPLITS, 4, B, M, C] -> sums [4, B, M, C], dlogits, dz [B, d]."""
    sums = None if partials.shape[0] == 1 else partials.new_empty(partials.shape[1:])
    dlogits = torch.empty_like(logits)
    dz = logits.new_empty((logits.shape[0], fc2_weight.shape[1]))
    launch(
        sk_hidden_bwd_launch,
        dlogits, dz, sums, partials, logits, norms.weight, norms.bias, fc2_weight,
        config=config,
    )  # fmt: skip
    return partials[0] if sums is None else sums, dlogits, dz


def sk_channels_bwd(
    sums: Tensor,
    dlogits: Tensor,
    dz: Tensor,
    logits: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    norms: Norms,
    fc1_norm: Norms,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    S: int,
    batch_stats: bool,
    fc1_batch_stats: bool,
    *,
    config: MLPConfig | None = None,
) -> ChannelGradients:
    """Launches what is left of the backward but the branches' gradients.

    ``fc1_norm`` holds the statistics that were applied; the flags say whether those of fc1's norm
    and of the branches' norms are the batch's.
    """
    (mean,), (var,), (gamma,), (beta,), eps = fc1_norm
    _, M, C = logits.shape
    gradients = ChannelGradients(
        share=torch.empty_like(pooled),
        drift=pooled.new_empty((2, M, C)) if batch_stats else None,
        gamma=pooled.new_empty((M, C), dtype=common_dtype(norms.weight, pooled)),
        beta=pooled.new_empty((M, C), dtype=common_dtype(norms.bias, pooled)),
        fc1_weight=fc1_weight.new_empty(fc1_weight.shape),
        fc1_bias=_empty(fc1_bias),
        fc1_gamma=_empty(gamma),
        fc1_beta=_empty(beta),
        fc2_weight=fc2_weight.new_empty(fc2_weight.shape),
        fc2_bias=_empty(fc2_bias),
    )
    launch(
        sk_channels_bwd_launch,
        *gradients, sums, dlogits, dz, logits, pooled, hidden, mean, var, gamma, beta, fc1_weight,
        S=S, fc1_eps=eps, fc1_batch_stats=fc1_batch_stats, config=config,
    )  # fmt: skip
    return gradients


def _empty(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else torch.empty_like(parameter)


def sk_hidden_launch(
    pooled: Tensor,
    hidden: Tensor,
    partials: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    *,
    S: int,
    config: MLPConfig | None = None,
) -> Launch:
    """Returns the launch that fills ``pooled`` [B, C] and ``hidden`` [B, d]."""
    splits, B, C = partials.shape
    d = fc1_weight.shape[0]
    config = config or MLPConfig.hidden(
        MLPProblem(B, C, d, 1, splits), DeviceFacts.of(hidden.device)
    )
    return Launch(
        kernel=_sk_hidden_kernel,
        programs=cdiv(B, config.block_b) * cdiv(d, config.block_d),
        pointers={
            "pooled_ptr": pooled,
            "hidden_ptr": hidden,
            "partial_ptr": partials,
            "weight_ptr": fc1_weight,
            "bias_ptr": fc1_bias,
        },
        scalars={
            "weight_stride_d": fc1_weight.stride(0),
            "weight_stride_c": fc1_weight.stride(1),
            "splits": splits,
            "B": B,
            "C": C,
            "d": d,
            "S": S,
        },
        constants={
            "UNROLL": config.unroll,
            "ACC": accumulator(partials.dtype)[1],
            "IMAGES": config.block_b,
            "BLOCK_C": config.block_c,
            "BLOCK_D": config.block_d,
        },
        num_warps=config.num_warps,
    )


def sk_logits_launch(
    logits: Tensor,
    stats: Tensor | None,
    kept: Tensor | None,
    hidden: Tensor,
    fc1_mean: Tensor | None,
    fc1_var: Tensor | None,
    fc1_gamma: Tensor | None,
    fc1_beta: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float,
    config: MLPConfig | None = None,
) -> Launch:
    """Returns the launch that fills ``logits`` [B, M, C], ``stats`` and ``kept`` [2, d]."""
    B, M, C = logits.shape
    d = hidden.shape[1]
    config = config or MLPConfig.logits(MLPProblem(B, C, d, M), DeviceFacts.of(hidden.device))
    return Launch(
        kernel=_sk_logits_kernel,
        # An empty batch has statistics, of nothing, to be written.
        programs=max(1, cdiv(B, config.block_b)) * cdiv(M * C, config.block_n),
        pointers={
            "logits_ptr": logits,
            "stats_ptr": stats,
            "kept_ptr": kept,
            "hidden_ptr": hidden,
            "mean_ptr": fc1_mean,
            "var_ptr": fc1_var,
            "gamma_ptr": fc1_gamma,
            "beta_ptr": fc1_beta,
            "weight_ptr": fc2_weight,
            "bias_ptr": fc2_bias,
        },
        scalars={
            "weight_stride_n": fc2_weight.stride(0),
            "weight_stride_d": fc2_weight.stride(1),
            "B": B,
            "N": M * C,
            "d": d,
        },
        constants={
            "EPS": eps,
            "ACC": accumulator(hidden.dtype)[1],
            "BLOCK_B": config.block_b,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
        },
        num_warps=config.num_warps,
    )


def sk_hidden_bwd_launch(
    dlogits: Tensor,
    dz: Tensor,
    sums: Tensor | None,
    partials: Tensor,
    logits: Tensor,
    gammas: tuple[Tensor | None, ...],
    betas: tuple[Tensor | None, ...],
    fc2_weight: Tensor,
    *,
    config: MLPConfig | None = None,
) -> Launch:
    """Returns the launch that fills ``dlogits``, ``dz`` [B, d] and, unless None, ``sums``."""
    B, M, C = logits.shape
    d = dz.shape[1]
    config = config or MLPConfig.hidden_bwd(
        MLPProblem(B, C, d, M, partials.shape[0]), DeviceFacts.of(dz.device)
    )
    return Launch(
        kernel=_sk_hidden_bwd_kernel,
        programs=cdiv(B, config.block_b) * cdiv(d, config.block_d),
        pointers={
            "dlogits_ptr": dlogits,
            "dz_ptr": dz,
            "sums_ptr": sums,
            "partial_ptr": partials,
            "logits_ptr": logits,
            "gamma_ptrs": gammas,
            "beta_ptrs": betas,
            "weight_ptr": fc2_weight,
        },
        scalars={
            "weight_stride_n": fc2_weight.stride(0),
            "weight_stride_d": fc2_weight.stride(1),
            "splits": partials.shape[0],
            "B": B,
            "C": C,
            "d": d,
        },
        constants={
            "NUM_BRANCHES": M,
            "UNROLL": config.unroll,
            "ACC": accumulator(partials.dtype)[1],
            "IMAGES": config.block_b,
            "BLOCK_C": config.block_c,
            "BLOCK_D": config.block_d,
        },
        num_warps=config.num_warps,
    )


def sk_channels_bwd_launch(
    share: Tensor,
    drift: Tensor | None,
    dgamma: Tensor,
    dbeta: Tensor,
    fc1_dweight: Tensor,
    fc1_dbias: Tensor | None,
    fc1_dgamma: Tensor | None,
    fc1_dbeta: Tensor | None,
    fc2_dweight: Tensor,
    fc2_dbias: Tensor | None,
    sums: Tensor,
    dlogits: Tensor,
    dz: Tensor,
    logits: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    fc1_mean: Tensor,
    fc1_var: Tensor,
    fc1_gamma: Tensor | None,
    fc1_beta: Tensor | None,
    fc1_weight: Tensor,
    *,
    S: int,
    fc1_eps: float,
    fc1_batch_stats: bool,
    config: MLPConfig | None = None,
) -> Launch:
    """Returns the launch that fills the fields of `ChannelGradients`."""
    B, M, C = logits.shape
    d = hidden.shape[1]
    config = config or MLPConfig.channels_bwd(MLPProblem(B, C, d, M), DeviceFacts.of(share.device))
    return Launch(
        kernel=_sk_channels_bwd_kernel,
        programs=cdiv(C, config.block_c)
        + (cdiv(C, config.block_n) + cdiv(M * C, config.block_n)) * cdiv(d, config.block_d),
        pointers={
            "share_ptr": share,
            "drift_ptr": drift,
            "dgamma_ptr": dgamma,
            "dbeta_ptr": dbeta,
            "fc1_dweight_ptr": fc1_dweight,
            "fc1_dbias_ptr": fc1_dbias,
            "fc1_dgamma_ptr": fc1_dgamma,
            "fc1_dbeta_ptr": fc1_dbeta,
            "fc2_dweight_ptr": fc2_dweight,
            "fc2_dbias_ptr": fc2_dbias,
            "sums_ptr": sums,
            "dlogits_ptr": dlogits,
            "dz_ptr": dz,
            "logits_ptr": logits,
            "pooled_ptr": pooled,
            "hidden_ptr": hidden,
            "fc1_mean_ptr": fc1_mean,
            "fc1_var_ptr": fc1_var,
            "fc1_gamma_ptr": fc1_gamma,
            "fc1_beta_ptr": fc1_beta,
            "fc1_weight_ptr": fc1_weight,
        },
        scalars={
            "fc1_weight_stride_d": fc1_weight.stride(0),
            "fc1_weight_stride_c": fc1_weight.stride(1),
            "B": B,
            "C": C,
            "d": d,
            "S": S,
        },
        constants={
            "NUM_BRANCHES": M,
            "FC1_BATCH_STATS": fc1_batch_stats,
            "FC1_EPS": fc1_eps,
            "ACC": accumulator(hidden.dtype)[1],
            "BLOCK_B": config.block_b,
            "BLOCK_C": config.block_c,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "WHOLE_D": max(16, next_power_of_two(d)),
        },
        num_warps=config.num_warps,
    )
