"""The MLP between fuse and select, forward and backward: small tensors, one launch a function.

Forward: `sk_hidden`, `sk_logits`. Backward: `sk_hidden_bwd`, `sk_channels_bwd`. What a program
needs of all images, such as the statistics of fc1's norm, it computes for itself: the hidden layer
lies in the cache, and a launch of its own would cost more.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sknet_kernels.arguments import small_launch
from sknet_kernels.config import next_power_of_two
from sknet_kernels.jit import (
    DBETA,
    DGAMMA,
    DOUT_KEEP,
    DOUT_KEEP_XHAT,
    KEEP,
    KEEP_XHAT,
    NUM_SUMS,
    branch_weights,
    branch_weights_bwd,
    channel_vector,
    channel_vectors,
    count_batch,
    kept_by_relu,
    move_towards,
    relu,
    zero_tiles,
)
from sknet_kernels.launch import launch
from sknet_kernels.norms import ChannelGradients, Norms, Running, common_dtype
from sknet_kernels.small import CHANNELS_BWD, HIDDEN, HIDDEN_BWD, LOGITS

# Terms of dbeta_i and dgamma_i that are summed over images, those of a_i and those of share apart.
DBETA_ATTN = tl.constexpr(0)
DBETA_SHARE = tl.constexpr(1)
DGAMMA_ATTN = tl.constexpr(2)
DGAMMA_SHARE = tl.constexpr(3)
NUM_TERMS = tl.constexpr(4)


@triton.jit
def _joined(ptr, rows, offs, masks, step, splits, BLOCK_P: tl.constexpr):
    """Returns the sum over k < splits of ptr[k * step + row + offs] for each of ``rows``.

    ``masks`` has a mask for each. Sums are added in the order of k; the loads of BLOCK_P parts of
    all rows are under way together.
    """
    # Vectors are [BLOCK_C].
    totals = ()
    for _ in tl.static_range(len(rows)):
        totals = totals + (tl.zeros(offs.shape, ptr.dtype.element_ty),)
    for first in range(0, splits, BLOCK_P):
        parts = ()
        for k in tl.static_range(BLOCK_P):
            part = tl.cast(first, tl.int64) + k
            for j in tl.static_range(len(rows)):
                there = masks[j] & (part < splits)
                part_ptrs = ptr + (rows[j] + offs + part * step)
                parts = parts + (tl.load(part_ptrs, mask=there, other=0.0),)
        for k in tl.static_range(BLOCK_P):
            grown = ()
            for j in tl.static_range(len(rows)):
                grown = grown + (totals[j] + parts[k * len(rows) + j],)
            totals = grown
    return totals


@triton.jit
def _store_each(ptr, rows, offs, vectors, masks, is_first):
    """Stores each of ``vectors`` at its row, where its mask and ``is_first`` are set."""
    for j in tl.static_range(len(rows)):
        tl.store(ptr + (rows[j] + offs), vectors[j], mask=masks[j] & is_first)


@triton.jit
def _store(ptr, offs, values, mask):
    """Stores ``values`` in the dtype of the memory, unless there is none."""
    if ptr is not None:
        tl.store(ptr + offs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits", "B", "S"])
def _sk_hidden_kernel(
    pooled_ptr,
    hidden_ptr,
    partial_ptr,
    weight_ptr,
    bias_ptr,
    weight_strides,
    splits,
    B,
    C,
    d,
    S,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pooled[b, c] = (sum over k of partial[k, b, c]) / S;  hidden = pooled weight^T + bias.

    Shapes: partial [splits, B, C], pooled [B, C] and hidden [B, d] in the dtype of sums; weight
    [d, C] of any strides, bias [d] or None. Passes moved: none of full size.
    Source: Li et al. 2019, eqs. 2 and 3.
    """
    # One program owns BLOCK_D elements of the hidden layer of BLOCK_B images.
    ACC: tl.constexpr = hidden_ptr.dtype.element_ty
    blocks_d = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    first_b = (pid // blocks_d).to(tl.int64) * BLOCK_B
    offs_d = (pid % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    rows = ()
    for j in tl.static_range(BLOCK_B):
        rows = rows + ((first_b + j) * C,)
    stride_d, stride_c = weight_strides
    # Summed over channels at the end alone: no thread waits for another in the loop.
    products = zero_tiles(BLOCK_B, ACC, BLOCK_D, BLOCK_C)
    for first in range(0, C, BLOCK_C):
        offs_c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        offs = offs_d[:, None] * stride_d + offs_c[None, :] * stride_c
        # A tile [BLOCK_D, BLOCK_C].
        weight = tl.load(weight_ptr + offs, mask=mask_d[:, None] & mask_c[None, :], other=0.0)
        masks = ()
        for j in tl.static_range(BLOCK_B):
            masks = masks + (mask_c & (first_b + j < B),)
        step = tl.cast(B, tl.int64) * C
        totals = _joined(partial_ptr, rows, offs_c, masks, step, splits, BLOCK_P)
        grown = ()
        for j in tl.static_range(BLOCK_B):
            pooled = totals[j] / tl.cast(S, ACC)
            mask = masks[j] & (pid % blocks_d == 0)
            tl.store(pooled_ptr + (rows[j] + offs_c), pooled, mask=mask)
            grown = grown + (products[j] + weight.to(ACC) * pooled[None, :],)
        products = grown
    bias = channel_vector(bias_ptr, offs_d, mask_d, ACC, 0.0)
    for j in tl.static_range(BLOCK_B):
        hidden = tl.sum(products[j], axis=1) + bias
        tl.store(hidden_ptr + (first_b + j) * d + offs_d, hidden, mask=mask_d & (first_b + j < B))


@triton.jit
def _batch_moments(x_ptr, B, d, offs_d, BLOCK_B: tl.constexpr):
    """Returns mean and sum of squared deviations over the images of x [B, d], vectors [BLOCK_D].

    Blocks of images are joined in their order. Source: Chan, Golub and LeVeque 1983, eq. 2.1.
    """
    ACC: tl.constexpr = x_ptr.dtype.element_ty
    mean = tl.zeros(offs_d.shape, ACC)
    m2 = tl.zeros(offs_d.shape, ACC)
    for first in range(0, B, BLOCK_B):
        offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & (offs_d < d)[None, :]
        # Tiles are [BLOCK_B, BLOCK_D].
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
def _fc1_norm(ptrs, offs_d, d, EPS: tl.constexpr, ACC: tl.constexpr):
    """Returns mean, rstd, gamma and beta of fc1's norm, vectors [BLOCK_D]."""
    mean_ptr, var_ptr, gamma_ptr, beta_ptr = ptrs
    mask_d = offs_d < d
    var = channel_vector(var_ptr, offs_d, mask_d, ACC, 1.0)
    return (
        channel_vector(mean_ptr, offs_d, mask_d, ACC, 0.0),
        1.0 / tl.sqrt(var + EPS),
        channel_vector(gamma_ptr, offs_d, mask_d, ACC, 1.0),
        channel_vector(beta_ptr, offs_d, mask_d, ACC, 0.0),
    )


@triton.jit
def _activated(hidden, norm):
    """Returns hidden [BLOCK_B, BLOCK_D] normalised, and its activation z; see `_fc1_norm`."""
    mean, rstd, gamma, beta = norm
    hhat = (hidden - mean[None, :]) * rstd[None, :]
    return hhat, relu(hhat * gamma[None, :] + beta[None, :])


@triton.jit(do_not_specialize=["B", "keep", "momentum"])
def _sk_logits_kernel(
    logits_ptr,
    stats_ptr,
    kept_ptr,
    running_ptrs,
    hidden_ptr,
    fc1_norm_ptrs,
    weight_ptr,
    bias_ptr,
    weight_strides,
    B,
    N,
    d,
    keep,
    momentum,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """logits[b, n] = z weight^T + bias, with z = max((hidden - mean) * rstd * gamma + beta, 0).

    Where the norm has no mean, mean and variance are those of hidden over its images, and the first
    program writes stats, mean and biased variance, and kept, mean and unbiased variance; without
    kept it sets running = keep * running + momentum * (mean, unbiased variance), and counts.
    Shapes: hidden [B, d], logits [B, N], stats and kept [2, d] in the dtype of sums, N = M * C;
    weight [N, d] of any strides; bias [N], gamma and beta [d] or None. Passes moved: none of full
    size. Source: Li et al. 2019, eqs. 3 and 4.
    """
    # One program owns BLOCK_N logits of BLOCK_B images.
    ACC: tl.constexpr = hidden_ptr.dtype.element_ty
    blocks_n = tl.cdiv(tl.maximum(N, 1), BLOCK_N)  # fc1's statistics are there without channels
    pid = tl.program_id(0)
    offs_b = (pid // blocks_n).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = (pid % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_b, mask_n = offs_b < B, offs_n < N
    stride_n, stride_d = weight_strides
    logits = tl.zeros([BLOCK_B, BLOCK_N], ACC)
    for first in range(0, d, BLOCK_D):
        offs_d = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_D)
        mask_d = offs_d < d
        offs = offs_d[:, None] * stride_d + offs_n[None, :] * stride_n
        mask = mask_d[:, None] & mask_n[None, :]
        # A tile [BLOCK_D, BLOCK_N], vectors [BLOCK_D].
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)
        mean, rstd, gamma, beta = _fc1_norm(fc1_norm_ptrs, offs_d, d, EPS, ACC)
        if fc1_norm_ptrs[0] is None:
            mean, m2 = _batch_moments(hidden_ptr, B, d, offs_d, BLOCK_R)
            var = m2 / tl.cast(tl.maximum(B, 1), ACC)
            rstd = 1.0 / tl.sqrt(var + EPS)
            mask_stats = mask_d & (pid == 0)
            tl.store(stats_ptr + offs_d, mean, mask=mask_stats)
            tl.store(stats_ptr + d + offs_d, var, mask=mask_stats)
            unbiased = m2 / tl.cast(B - 1, ACC)
            if kept_ptr is not None:
                tl.store(kept_ptr + offs_d, mean, mask=mask_stats)
                tl.store(kept_ptr + d + offs_d, unbiased, mask=mask_stats)
            else:
                running_mean_ptr, running_var_ptr, _ = running_ptrs
                move_towards(running_mean_ptr, offs_d, mean, mask_stats, keep, momentum, ACC)
                move_towards(running_var_ptr, offs_d, unbiased, mask_stats, keep, momentum, ACC)
        hidden_ptrs = hidden_ptr + offs_b[:, None] * d + offs_d[None, :]
        # Tiles are [BLOCK_B, BLOCK_D].
        hidden = tl.load(hidden_ptrs, mask=mask_b[:, None] & mask_d[None, :], other=0.0)
        _, z = _activated(hidden, (mean, rstd, gamma, beta))
        # weight is 0 past d, but 0 * inf is NaN.
        z = tl.where(mask_d[None, :], z, 0.0)
        logits += tl.dot(z, weight, input_precision="ieee", out_dtype=ACC)
    if running_ptrs is not None:
        _, _, tracked_ptr = running_ptrs
        count_batch(tracked_ptr, pid == 0)
    logits += channel_vector(bias_ptr, offs_n, mask_n, ACC, 0.0)[None, :]
    offs = offs_b[:, None] * N + offs_n[None, :]
    tl.store(logits_ptr + offs, logits, mask=mask_b[:, None] & mask_n[None, :])


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
    weight_strides,
    splits,
    B,
    C,
    d,
    NUM_BRANCHES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums[n] = sum over k of partial[k, n];  dlogits: softmax's backward;  dz = dlogits weight.

    da_i = gamma_i P3_i + beta_i P1_i, with the rows P1 to P4 of sums; a = softmax of logits.
    Shapes: partial [splits, 4, B, M, C], sums [4, B, M, C], None where that is partial itself,
    logits and dlogits [B, M, C] and dz [B, d] contiguous, in the dtype of sums; gamma_i and beta_i
    [C] or None; weight [M * C, d] of any strides.
    Passes moved: none of full size. Source: the derivative of Li et al. 2019, eqs. 3 to 6.
    """
    # One program owns BLOCK_D elements of dz of BLOCK_B images, the first of an image the rest too.
    ACC: tl.constexpr = dz_ptr.dtype.element_ty
    VECTORS: tl.constexpr = BLOCK_B * NUM_BRANCHES
    blocks_d = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    first_b = (pid // blocks_d).to(tl.int64) * BLOCK_B
    offs_d = (pid % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d, is_first = offs_d < d, pid % blocks_d == 0
    image, channels = first_b * NUM_BRANCHES * C, tl.cast(C, tl.int64)
    step = channels * NUM_BRANCHES * B
    stride_n, stride_d = weight_strides
    # Where the images' and branches' vectors of DOUT_KEEP and DOUT_KEEP_XHAT begin, and from KEEP
    # on those of KEEP and KEEP_XHAT.
    tl.static_assert(KEEP_XHAT - KEEP == DOUT_KEEP_XHAT - DOUT_KEEP)
    rows = ()
    for n in tl.static_range(2 * VECTORS):
        row = DOUT_KEEP_XHAT if n >= VECTORS else DOUT_KEEP
        rows = rows + (step * row + channels * (n % VECTORS),)
    products = zero_tiles(BLOCK_B, ACC, BLOCK_C, BLOCK_D)
    for first in range(0, C, BLOCK_C):
        offs_c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        masks = ()
        for j in tl.static_range(2 * VECTORS):
            masks = masks + (mask_c & (first_b + j % VECTORS // NUM_BRANCHES < B),)
        part_step = NUM_SUMS * step
        # These first, since they are only written: no register holds them while others are joined.
        if sums_ptr is not None:
            keep_start = image + KEEP * step
            keep_sums = _joined(
                partial_ptr + keep_start, rows, offs_c, masks, part_step, splits, BLOCK_P
            )
            _store_each(sums_ptr + keep_start, rows, offs_c, keep_sums, masks, is_first)
        dout_sums = _joined(partial_ptr + image, rows, offs_c, masks, part_step, splits, BLOCK_P)
        if sums_ptr is not None:
            _store_each(sums_ptr + image, rows, offs_c, dout_sums, masks, is_first)
        gammas = channel_vectors(gamma_ptrs, offs_c, mask_c, ACC, 1.0)
        betas = channel_vectors(beta_ptrs, offs_c, mask_c, ACC, 0.0)
        dlogits = ()
        for b in tl.static_range(BLOCK_B):
            dattn = ()
            for i in tl.static_range(NUM_BRANCHES):
                p1, p3 = dout_sums[b * NUM_BRANCHES + i], dout_sums[VECTORS + b * NUM_BRANCHES + i]
                dattn = dattn + (gammas[i] * p3 + betas[i] * p1,)
            first_row, there = (first_b + b) * NUM_BRANCHES, mask_c & (first_b + b < B)
            attn = branch_weights(
                logits_ptr, (C, C, 1), first_row, offs_c, there, NUM_BRANCHES, "softmax", ACC
            )
            dlogits = dlogits + branch_weights_bwd(attn, dattn, NUM_BRANCHES, "softmax")
        for i in tl.static_range(NUM_BRANCHES):
            offs_n = channels * i + offs_c
            offs = offs_n[:, None] * stride_n + offs_d[None, :] * stride_d
            # A tile [BLOCK_C, BLOCK_D].
            weight = tl.load(weight_ptr + offs, mask=mask_c[:, None] & mask_d[None, :], other=0.0)
            grown = ()
            for b in tl.static_range(BLOCK_B):
                dlogit = tl.where(mask_c, dlogits[b * NUM_BRANCHES + i], 0.0)
                grown = grown + (products[b] + weight.to(ACC) * dlogit[:, None],)
                dlogit_ptrs = dlogits_ptr + image + (rows[b * NUM_BRANCHES + i] + offs_c)
                tl.store(dlogit_ptrs, dlogit, mask=masks[b * NUM_BRANCHES + i] & is_first)
            products = grown
    for b in tl.static_range(BLOCK_B):
        dz_ptrs = dz_ptr + (first_b + b) * d + offs_d
        tl.store(dz_ptrs, tl.sum(products[b], axis=0), mask=mask_d & (first_b + b < B))


@triton.jit
def _hidden_block(mlp, first, offs_d, norm, BLOCK_B: tl.constexpr):
    """Returns dy, hhat and z [BLOCK_B, BLOCK_D] of the images from ``first`` on, 0 past the last.

    dy is the gradient of what the ReLU takes: dz where z > 0, else 0. ``mlp`` is hidden and dz
    [B, d], their sizes and the pointers of fc1's norm.
    """
    hidden_ptr, dz_ptr, B, d, _norm = mlp
    offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
    mask = (offs_b < B)[:, None] & (offs_d < d)[None, :]
    offs = offs_b[:, None] * d + offs_d[None, :]
    # Tiles are [BLOCK_B, BLOCK_D].
    hidden = tl.load(hidden_ptr + offs, mask=mask, other=0.0)
    dz = tl.load(dz_ptr + offs, mask=mask, other=0.0)
    hhat, z = _activated(hidden, norm)
    dy = tl.where(kept_by_relu(z), dz, 0.0)
    return dy, tl.where(mask, hhat, 0.0), tl.where(mask, z, 0.0)


@triton.jit
def _fc1_norm_bwd(mlp, offs_d, norm, BLOCK_B: tl.constexpr):
    """Returns dbeta and dgamma of fc1's norm, the sums over images of dy and of dy hhat."""
    _hidden, dz_ptr, B, _d, _norm = mlp
    dbeta = tl.zeros([BLOCK_B, offs_d.shape[0]], dz_ptr.dtype.element_ty)
    dgamma = tl.zeros_like(dbeta)
    for first in range(0, B, BLOCK_B):
        dy, hhat, _ = _hidden_block(mlp, first, offs_d, norm, BLOCK_B)
        dbeta += dy
        dgamma += dy * hhat
    return tl.sum(dbeta, axis=0), tl.sum(dgamma, axis=0)


@triton.jit
def _dhidden_block(
    mlp, first, offs_d, norm, sums, BATCH_STATS: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Returns the gradient [BLOCK_B, BLOCK_D] of fc1's output; sums as of `_fc1_norm_bwd`."""
    _hidden, _dz, B, d, _norm = mlp
    dy, hhat, _ = _hidden_block(mlp, first, offs_d, norm, BLOCK_B)
    if BATCH_STATS:
        dbeta, dgamma = sums
        images = tl.cast(B, dy.dtype)
        dy = dy - (dbeta / images)[None, :] - hhat * (dgamma / images)[None, :]
    there = (first + tl.arange(0, BLOCK_B) < B)[:, None] & (offs_d < d)[None, :]
    _, rstd, gamma, _ = norm
    return tl.where(there, dy * (gamma * rstd)[None, :], 0.0)


@triton.jit
def _norms_bwd(
    gradients,
    mlp,
    sums_ptr,
    logits_ptr,
    weight_ptr,
    weight_strides,
    pid,
    C,
    S,
    NUM_BRANCHES: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fills share, drift, gamma and beta of block ``pid`` of the channels."""
    hidden_ptr, _dz, B, d, fc1_norm_ptrs = mlp
    ACC: tl.constexpr = hidden_ptr.dtype.element_ty
    offs_c = pid.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_c = offs_c < C
    stride_d, stride_c = weight_strides
    offs_weight = offs_d[:, None] * stride_d + offs_c[None, :] * stride_c
    mask_weight = (offs_d < d)[:, None] & mask_c[None, :]
    # A tile [BLOCK_D, BLOCK_C].
    weight = tl.load(weight_ptr + offs_weight, mask=mask_weight, other=0.0).to(ACC)
    norm = _fc1_norm(fc1_norm_ptrs, offs_d, d, EPS, ACC)
    sums = _fc1_norm_bwd(mlp, offs_d, norm, BLOCK_B)
    positions = tl.cast(S, ACC)
    row = tl.cast(B, tl.int64) * NUM_BRANCHES * C
    # The terms of a_i and those of share apart: a product has a layout of its own, and what meets
    # it is laid out anew, a wait for memory each time.
    tiles = zero_tiles(NUM_TERMS * NUM_BRANCHES, ACC, BLOCK_B, BLOCK_C)
    for first in range(0, B, BLOCK_B):
        offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & mask_c[None, :]
        offs = offs_b[:, None] * NUM_BRANCHES * C + offs_c[None, :]
        dhidden = _dhidden_block(mlp, first, offs_d, norm, sums, BATCH_STATS, BLOCK_B)
        share = tl.dot(dhidden, weight, input_precision="ieee", out_dtype=ACC) / positions
        _store(gradients.share, offs_b[:, None] * C + offs_c[None, :], share, mask)
        attn = branch_weights(logits_ptr, (0, C, 1), 0, offs, mask, NUM_BRANCHES, "softmax", ACC)
        grown = ()
        for i in tl.static_range(NUM_BRANCHES):
            # Tiles are [BLOCK_B, BLOCK_C].
            offs_i = tl.cast(C, tl.int64) * i + offs
            p1 = tl.load(sums_ptr + (offs_i + DOUT_KEEP * row), mask=mask, other=0.0)
            p3 = tl.load(sums_ptr + (offs_i + DOUT_KEEP_XHAT * row), mask=mask, other=0.0)
            p2 = tl.load(sums_ptr + (offs_i + KEEP * row), mask=mask, other=0.0)
            p4 = tl.load(sums_ptr + (offs_i + KEEP_XHAT * row), mask=mask, other=0.0)
            grown = grown + (
                tiles[NUM_TERMS * i + DBETA_ATTN] + attn[i] * p1,
                tiles[NUM_TERMS * i + DBETA_SHARE] + share * p2,
                tiles[NUM_TERMS * i + DGAMMA_ATTN] + attn[i] * p3,
                tiles[NUM_TERMS * i + DGAMMA_SHARE] + share * p4,
            )
        tiles = grown
    m = tl.maximum(tl.cast(B, ACC), 1.0) * positions
    drift_row = tl.cast(C, tl.int64) * NUM_BRANCHES
    for i in tl.static_range(NUM_BRANCHES):
        offs_n = tl.cast(C, tl.int64) * i + offs_c
        dbeta = tl.sum(tiles[NUM_TERMS * i + DBETA_ATTN], axis=0)
        dbeta += tl.sum(tiles[NUM_TERMS * i + DBETA_SHARE], axis=0)
        dgamma = tl.sum(tiles[NUM_TERMS * i + DGAMMA_ATTN], axis=0)
        dgamma += tl.sum(tiles[NUM_TERMS * i + DGAMMA_SHARE], axis=0)
        _store(gradients.beta, offs_n, dbeta, mask_c)
        _store(gradients.gamma, offs_n, dgamma, mask_c)
        _store(gradients.drift, DBETA * drift_row + offs_n, dbeta / m, mask_c)
        _store(gradients.drift, DGAMMA * drift_row + offs_n, dgamma / m, mask_c)


@triton.jit
def _weight_bwd(
    LAYER: tl.constexpr,
    gradients,
    mlp,
    columns_ptr,
    pid,
    N,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fills block ``pid`` of the gradients of the parameters of ``LAYER``, "fc1" or "fc2".

    fc1: dweight [d, N] = dhidden^T columns, columns being pooled [B, N], and the vectors [d] of its
    bias and norm. fc2: dweight [N, d] = columns^T z, columns being dlogits [B, N], and dbias [N].
    """
    hidden_ptr, _dz, B, d, fc1_norm_ptrs = mlp
    ACC: tl.constexpr = hidden_ptr.dtype.element_ty
    blocks_d = tl.cdiv(d, BLOCK_D)
    offs_n = (pid // blocks_d).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = (pid % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < N, offs_d < d
    norm = _fc1_norm(fc1_norm_ptrs, offs_d, d, EPS, ACC)
    if LAYER == "fc1":
        sums = _fc1_norm_bwd(mlp, offs_d, norm, BLOCK_B)
    dbias = tl.zeros([BLOCK_D if LAYER == "fc1" else BLOCK_N], ACC)
    dweight = tl.zeros([BLOCK_D, BLOCK_N], ACC)
    for first in range(0, B, BLOCK_B):
        offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        offs = offs_b[:, None] * N + offs_n[None, :]
        # Tiles are [BLOCK_B, BLOCK_N] and [BLOCK_B, BLOCK_D].
        mask = (offs_b < B)[:, None] & mask_n[None, :]
        columns = tl.load(columns_ptr + offs, mask=mask, other=0.0)
        if LAYER == "fc1":
            rows = _dhidden_block(mlp, first, offs_d, norm, sums, BATCH_STATS, BLOCK_B)
            dbias += tl.sum(rows, axis=0)
        else:
            _, _, rows = _hidden_block(mlp, first, offs_d, norm, BLOCK_B)
            dbias += tl.sum(columns, axis=0)
        dweight += tl.dot(tl.trans(rows), columns, input_precision="ieee", out_dtype=ACC)
    mask = mask_d[:, None] & mask_n[None, :]
    if LAYER == "fc1":
        _store(gradients.fc1_weight, offs_d[:, None] * N + offs_n[None, :], dweight, mask)
        mask_d = mask_d & (pid < blocks_d)
        _store(gradients.fc1_bias, offs_d, dbias, mask_d)
        _store(gradients.fc1_beta, offs_d, sums[0], mask_d)
        _store(gradients.fc1_gamma, offs_d, sums[1], mask_d)
    else:
        _store(gradients.fc2_weight, offs_n[None, :] * d + offs_d[:, None], dweight, mask)
        _store(gradients.fc2_bias, offs_n, dbias, mask_n & (pid % blocks_d == 0))


@triton.jit(do_not_specialize=["B", "S"])
def _sk_channels_bwd_kernel(
    sums_ptr,
    dlogits_ptr,
    dz_ptr,
    logits_ptr,
    pooled_ptr,
    hidden_ptr,
    fc1_norm_ptrs,
    weight_ptr,
    gradients,
    weight_strides,
    B,
    C,
    d,
    S,
    NUM_BRANCHES: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
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
    Shapes: gradients as `ChannelGradients` has them, contiguous; sums [4, B, M, C], dlogits and
    logits [B, M, C], dz and hidden [B, d], pooled [B, C] contiguous, in the dtype of sums; fc1's
    weight [d, C] of any strides, and its norm's mean, var, gamma and beta [d]. Sums over images are
    added in their order. Passes moved: none of full size.
    Source: the derivative of Li et al. 2019, eqs. 2 to 6, through batch norm.
    """
    # One program owns BLOCK_C channels of the branches' norms, or a block of fc1's or fc2's weight,
    # and all images.
    pid, channels = tl.program_id(0), tl.cast(C, tl.int64)
    first_fc1 = tl.cdiv(channels, BLOCK_C)
    # The vectors of fc1 have their blocks without channels, too.
    first_fc2 = first_fc1 + tl.cdiv(tl.maximum(channels, 1), BLOCK_N) * tl.cdiv(d, BLOCK_D)
    mlp = (hidden_ptr, dz_ptr, B, d, fc1_norm_ptrs)
    if pid < first_fc1:
        _norms_bwd(
            gradients, mlp, sums_ptr, logits_ptr, weight_ptr, weight_strides, pid, C, S,
            NUM_BRANCHES, BATCH_STATS, EPS, BLOCK_B, BLOCK_C, WHOLE_D,
        )  # fmt: skip
    elif pid < first_fc2:
        block = (pid - first_fc1).to(tl.int32)
        _weight_bwd(
            "fc1", gradients, mlp, pooled_ptr, block, channels,
            BATCH_STATS, EPS, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        block = (pid - first_fc2).to(tl.int32)
        _weight_bwd(
            "fc2", gradients, mlp, dlogits_ptr, block, channels * NUM_BRANCHES,
            BATCH_STATS, EPS, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip


def sk_hidden(
    partials: Tensor, S: int, fc1_weight: Tensor, fc1_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launches the pooled average and fc1: partial sums [splits, B, C] -> [B, C] and [B, d]."""
    _, B, C = partials.shape
    pooled, hidden = partials.new_empty((B, C)), partials.new_empty((B, fc1_weight.shape[0]))
    launch(sk_hidden_launch, pooled, hidden, partials, fc1_weight, fc1_bias, S=S)
    return pooled, hidden


def sk_logits(
    hidden: Tensor,
    fc1_norm: Norms,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    M: int,
    running: Running | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launches fc1's norm, ReLU and fc2: hidden [B, d] -> logits [B, M, C] and statistics.

    The statistics of the batch are mean and biased variance [2, d], and in memory of their own
    mean and unbiased variance [2, d]; None where ``fc1_norm`` says what to apply. With ``running``,
    of one norm, the latter are not returned: it is moved towards them.
    """
    B, d = hidden.shape
    logits = hidden.new_empty((B, M, fc2_weight.shape[0] // M))
    vectors = _vectors(fc1_norm)
    stats = hidden.new_empty((2, d)) if vectors[0] is None else None
    kept = hidden.new_empty((2, d)) if vectors[0] is None and running is None else None
    moved, momentum = _moved(running)
    pointers = (logits, stats, kept, moved, hidden, vectors, fc2_weight, fc2_bias)
    factors = {"keep": 1 - momentum, "momentum": momentum}
    launch(sk_logits_launch, *pointers, EPS=fc1_norm.eps, **factors)
    return logits, stats, kept


def sk_hidden_bwd(
    partials: Tensor, logits: Tensor, norms: Norms, fc2_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward to z: [splits, 4, B, M, C] -> sums [4, B, M, C], dlogits, dz [B, d]."""
    sums = None if partials.shape[0] == 1 else partials.new_empty(partials.shape[1:])
    dlogits = torch.empty_like(logits)
    dz = logits.new_empty((logits.shape[0], fc2_weight.shape[1]))
    pointers = (dlogits, dz, sums, partials, logits, norms.weight, norms.bias, fc2_weight)
    launch(sk_hidden_bwd_launch, *pointers)
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
) -> ChannelGradients:
    """Launches what is left of the backward but the branches' gradients.

    ``fc1_norm`` holds the statistics that were applied; the flags say whether those of fc1's norm
    and of the branches' norms are the batch's.
    """
    vectors = _vectors(fc1_norm)
    _, M, C = logits.shape
    gradients = ChannelGradients(
        share=torch.empty_like(pooled),
        drift=pooled.new_empty((2, M, C)) if batch_stats else None,
        gamma=pooled.new_empty((M, C), dtype=common_dtype(norms.weight, pooled)),
        beta=pooled.new_empty((M, C), dtype=common_dtype(norms.bias, pooled)),
        fc1_weight=fc1_weight.new_empty(fc1_weight.shape),
        fc1_bias=_empty(fc1_bias),
        fc1_gamma=_empty(vectors[2]),
        fc1_beta=_empty(vectors[3]),
        fc2_weight=fc2_weight.new_empty(fc2_weight.shape),
        fc2_bias=_empty(fc2_bias),
    )
    pointers = (sums, dlogits, dz, logits, pooled, hidden, vectors, fc1_weight, gradients)
    whole_d = max(16, next_power_of_two(hidden.shape[1]))
    options = {"EPS": fc1_norm.eps, "BATCH_STATS": fc1_batch_stats, "WHOLE_D": whole_d}
    launch(sk_channels_bwd_launch, *pointers, S=S, **options)
    return gradients


def _vectors(norm: Norms) -> tuple[Tensor | None, ...]:
    """Returns mean, var, gamma and beta [d] of fc1's norm, each None where there is none."""
    (mean,), (var,), (gamma,), (beta,), _ = norm
    return mean, var, gamma, beta


def _moved(running: Running | None) -> tuple[tuple[Tensor, ...] | None, float]:
    """Returns mean, var and tracked of one norm, and their momentum."""
    if running is None:
        return None, 0.0
    (mean,), (var,), (tracked,), momentum = running
    return (mean, var, tracked), momentum


def _empty(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else torch.empty_like(parameter)


_OF_LOGITS = {"logits_ptr": "BMC", "hidden_ptr": "Bd"}
sk_hidden_launch = functools.partial(
    small_launch, _sk_hidden_kernel, HIDDEN, {"partial_ptr": "kBC", "hidden_ptr": "Bd"}
)
sk_logits_launch = functools.partial(small_launch, _sk_logits_kernel, LOGITS, _OF_LOGITS)
sk_hidden_bwd_launch = functools.partial(
    small_launch, _sk_hidden_bwd_kernel, HIDDEN_BWD, {"partial_ptr": "k4BMC", "dz_ptr": "Bd"}
)
sk_channels_bwd_launch = functools.partial(
    small_launch, _sk_channels_bwd_kernel, CHANNELS_BWD, _OF_LOGITS
)
