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
from sknet_kernels.config import DeviceFacts, MLPConfig, MLPProblem, cdiv
from sknet_kernels.jit import branch_weights, branch_weights_bwd, relu, zero_tiles
from sknet_kernels.launch import Launch, launch
from sknet_kernels.norms import ChannelGradients, Norms, common_dtype

NUM_SUMS = 4


@triton.jit
def _vector(ptr, offs, mask, MISSING: tl.constexpr, ACC: tl.constexpr):
    """Returns a parameter at ``offs``, or MISSING everywhere where there is no parameter."""
    if ptr is None:
        values = tl.full(offs.shape, MISSING, ACC)
    else:
        values = tl.load(ptr + offs, mask=mask, other=0.0).to(ACC)
    return values


@triton.jit
def _joined(ptr, offs, mask, step, splits, UNROLL: tl.constexpr, ACC: tl.constexpr):
    """Returns the sum over k < splits of ptr[k * step + offs], added in the order of k.

    UNROLL loads are under way together.
    """
    total = tl.zeros(offs.shape, ACC)
    for first in range(0, splits, UNROLL):
        parts = ()
        for k in tl.static_range(UNROLL):
            part_ptrs = ptr + (first + k) * step + offs
            parts = parts + (tl.load(part_ptrs, mask=mask & (first + k < splits), other=0.0),)
        for k in tl.static_range(UNROLL):
            total += parts[k]
    return total


@triton.jit
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
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pooled[b, c] = (sum over k of partial[k, b, c]) / S;  hidden = pooled weight^T + bias.

    Shapes: partial [SPLITS, B, C], pooled [B, C] and hidden [B, d] in ACC; weight [d, C] of any
    strides, bias [d] or None. Passes moved: none of full size. Source: Li et al. 2019, eqs. 2, 3.
    """
    # One program owns BLOCK_D elements of one image's hidden layer.
    blocks_d = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    pid_b = (pid // blocks_d).to(tl.int64)
    offs_d = (pid % blocks_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    step = tl.cast(B, tl.int64) * C
    # Summed over channels at the end alone: no thread waits for another in the loop.
    products = tl.zeros([BLOCK_D, BLOCK_C], ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        offs = pid_b * C + offs_c
        pooled = _joined(partial_ptr, offs, mask_c, step, splits, UNROLL, ACC) / tl.cast(S, ACC)
        tl.store(pooled_ptr + offs, pooled, mask=mask_c & (pid % blocks_d == 0))
        weight_ptrs = weight_ptr + offs_d[:, None] * weight_stride_d + offs_c * weight_stride_c
        weight = tl.load(weight_ptrs, mask=mask_d[:, None] & mask_c[None, :], other=0.0)
        products += weight.to(ACC) * pooled[None, :]
    hidden = tl.sum(products, axis=1) + _vector(bias_ptr, offs_d, mask_d, 0.0, ACC)
    tl.store(hidden_ptr + pid_b * d + offs_d, hidden, mask=mask_d)


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
def _fc1_norm(hidden, mean, var, gamma, beta, EPS: tl.constexpr):
    """Returns rstd [BLOCK_D], the normalised hidden layer and its activation z [BLOCK_B, BLOCK_D].

    Shapes: hidden [BLOCK_B, BLOCK_D], vectors [BLOCK_D].
    """
    rstd = 1.0 / tl.sqrt(var + EPS)
    hhat = (hidden - mean[None, :]) * rstd[None, :]
    return rstd, hhat, relu(hhat * gamma[None, :] + beta[None, :])


@triton.jit
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
        hidden_ptrs = hidden_ptr + offs_b[:, None] * d + offs_d[None, :]
        hidden = tl.load(hidden_ptrs, mask=mask_b[:, None] & mask_d[None, :], other=0.0)
        weight_ptrs = weight_ptr + offs_d[:, None] * weight_stride_d + offs_n * weight_stride_n
        weight = tl.load(weight_ptrs, mask=mask_d[:, None] & mask_n[None, :], other=0.0).to(ACC)
        if mean_ptr is None:
            mean, m2 = _batch_moments(hidden_ptr, B, d, offs_d, mask_d, ACC, BLOCK_R, BLOCK_D)
            var = m2 / tl.cast(tl.maximum(B, 1), ACC)
            mask_stats = mask_d & (pid == 0)
            tl.store(stats_ptr + offs_d, mean, mask=mask_stats)
            tl.store(stats_ptr + d + offs_d, var, mask=mask_stats)
            tl.store(kept_ptr + offs_d, mean, mask=mask_stats)
            tl.store(kept_ptr + d + offs_d, m2 / tl.cast(B - 1, ACC), mask=mask_stats)
        else:
            mean = _vector(mean_ptr, offs_d, mask_d, 0.0, ACC)
            var = _vector(var_ptr, offs_d, mask_d, 1.0, ACC)
        gamma = _vector(gamma_ptr, offs_d, mask_d, 1.0, ACC)
        beta = _vector(beta_ptr, offs_d, mask_d, 0.0, ACC)
        _, _, z = _fc1_norm(hidden, mean, var, gamma, beta, EPS)
        # weight is 0 past d, but 0 * inf is NaN.
        z = tl.where(mask_d[None, :], z, 0.0)
        logits += tl.dot(z, weight, input_precision="ieee", out_dtype=ACC)
    logits += _vector(bias_ptr, offs_n, mask_n, 0.0, ACC)[None, :]
    tl.store(
        logits_ptr + offs_b[:, None] * N + offs_n[None, :],
        logits,
        mask=mask_b[:, None] & mask_n[None, :],
    )


@triton.jit
def _sk_hidden_bwd_kernel(
    sums_ptr,
    dlogits_ptr,
    dz_ptr,
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
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums[n] = sum over k of partial[k, n];  dlogits: softmax's backward;  dz = dlogits weight.

    da_i = gamma_i P3_i + beta_i P1_i, with the rows P1 to P4 of sums; a = softmax of logits.
    Shapes: partial [SPLITS, 4, B, M, C], sums [4, B, M, C], logits and dlogits [B, M, C] and
    dz [B, d] contiguous, in ACC; gamma_i and beta_i [C] or None; weight [M * C, d] of any strides.
    Passes moved: none of full size. Source: the derivative of Li et al. 2019, eqs. 3 to 6.
    """
    # One program owns one image.
    pid_b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < d
    row = tl.cast(C, tl.int64) * NUM_BRANCHES * B
    products = tl.zeros([BLOCK_C, BLOCK_D], ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        dattn = ()
        for i in tl.static_range(NUM_BRANCHES):
            offs = (pid_b * NUM_BRANCHES + i) * C + offs_c
            sums = ()
            for j in tl.static_range(4):
                total = _joined(partial_ptr + j * row, offs, mask_c, 4 * row, splits, UNROLL, ACC)
                tl.store(sums_ptr + j * row + offs, total, mask=mask_c)
                sums = sums + (total,)
            gamma = _vector(gamma_ptrs[i], offs_c, mask_c, 1.0, ACC)
            beta = _vector(beta_ptrs[i], offs_c, mask_c, 0.0, ACC)
            dattn = dattn + (gamma * sums[2] + beta * sums[0],)
        image_ptr = logits_ptr + pid_b * NUM_BRANCHES * C
        attn = branch_weights(image_ptr, C, 1, offs_c, mask_c, NUM_BRANCHES, "softmax", ACC)
        dlogits = branch_weights_bwd(attn, dattn, NUM_BRANCHES, "softmax")
        for i in tl.static_range(NUM_BRANCHES):
            offs = (pid_b * NUM_BRANCHES + i) * C + offs_c
            tl.store(dlogits_ptr + offs, dlogits[i], mask=mask_c)
            offs_n = tl.cast(C, tl.int64) * i + offs_c
            weight_ptrs = weight_ptr + offs_n[:, None] * weight_stride_n + offs_d * weight_stride_d
            weight = tl.load(weight_ptrs, mask=mask_c[:, None] & mask_d[None, :], other=0.0)
            products += weight.to(ACC) * tl.where(mask_c, dlogits[i], 0.0)[:, None]
    tl.store(dz_ptr + pid_b * d + offs_d, tl.sum(products, axis=0), mask=mask_d)


@triton.jit
def _fc1_norm_bwd_block(
    dz_ptr,
    hidden_ptr,
    first,
    B,
    d,
    offs_d,
    mask_d,
    mean,
    var,
    gamma,
    beta,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Returns dy, hhat and z of BLOCK_B images from ``first`` on, 0 past the last one."""
    offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
    mask = (offs_b < B)[:, None] & mask_d[None, :]
    offs = offs_b[:, None] * d + offs_d[None, :]
    hidden = tl.load(hidden_ptr + offs, mask=mask, other=0.0)
    dz = tl.load(dz_ptr + offs, mask=mask, other=0.0)
    _, hhat, z = _fc1_norm(hidden, mean, var, gamma, beta, EPS)
    dy = tl.where(z <= 0.0, 0.0, dz)
    return dy, tl.where(mask, hhat, 0.0), tl.where(mask, z, 0.0)


@triton.jit
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
    BLOCK_D: tl.constexpr,
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
    # One program owns BLOCK_C channels of all images and branches; the first one fc1's vectors.
    pid = tl.program_id(0)
    offs_c = pid.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_c, mask_d = offs_c < C, offs_d < d
    mean = _vector(fc1_mean_ptr, offs_d, mask_d, 0.0, ACC)
    var = _vector(fc1_var_ptr, offs_d, mask_d, 1.0, ACC)
    gamma = _vector(fc1_gamma_ptr, offs_d, mask_d, 1.0, ACC)
    beta = _vector(fc1_beta_ptr, offs_d, mask_d, 0.0, ACC)
    fc1_dbeta = tl.zeros([BLOCK_D], ACC)
    fc1_dgamma = tl.zeros([BLOCK_D], ACC)
    for first in range(0, B, BLOCK_B):
        dy, hhat, _ = _fc1_norm_bwd_block(
            dz_ptr, hidden_ptr, first, B, d, offs_d, mask_d, mean, var, gamma, beta,
            FC1_EPS, ACC, BLOCK_B,
        )  # fmt: skip
        fc1_dbeta += tl.sum(dy, axis=0)
        fc1_dgamma += tl.sum(dy * hhat, axis=0)
    weight_ptrs = (
        fc1_weight_ptr + offs_d[:, None] * fc1_weight_stride_d + offs_c * fc1_weight_stride_c
    )
    mask_weight = mask_d[:, None] & mask_c[None, :]
    weight = tl.load(weight_ptrs, mask=mask_weight, other=0.0).to(ACC)
    slope = gamma / tl.sqrt(var + FC1_EPS)
    fc1_dbias = tl.zeros([BLOCK_D], ACC)
    fc1_dweight = tl.zeros([BLOCK_D, BLOCK_C], ACC)
    fc2_dweights = zero_tiles(NUM_BRANCHES, ACC, BLOCK_D, BLOCK_C)
    fc2_dbiases, dgammas, dbetas = (), (), ()
    for _ in tl.static_range(NUM_BRANCHES):
        fc2_dbiases = fc2_dbiases + (tl.zeros([BLOCK_C], ACC),)
        dgammas = dgammas + (tl.zeros([BLOCK_C], ACC),)
        dbetas = dbetas + (tl.zeros([BLOCK_C], ACC),)
    row = tl.cast(B, tl.int64) * NUM_BRANCHES * C
    images = tl.cast(tl.maximum(B, 1), ACC)
    for first in range(0, B, BLOCK_B):
        offs_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)
        mask_b = offs_b < B
        mask = mask_b[:, None] & mask_c[None, :]
        dy, hhat, z = _fc1_norm_bwd_block(
            dz_ptr, hidden_ptr, first, B, d, offs_d, mask_d, mean, var, gamma, beta,
            FC1_EPS, ACC, BLOCK_B,
        )  # fmt: skip
        if FC1_BATCH_STATS:
            dy = dy - (fc1_dbeta / images)[None, :] - hhat * (fc1_dgamma / images)[None, :]
        dhidden = tl.where(mask_b[:, None] & mask_d[None, :], dy * slope[None, :], 0.0)
        fc1_dbias += tl.sum(dhidden, axis=0)
        offs = offs_b[:, None] * C + offs_c[None, :]
        share = tl.dot(dhidden, weight, input_precision="ieee", out_dtype=ACC) / tl.cast(S, ACC)
        tl.store(share_ptr + offs, share, mask=mask)
        pooled = tl.load(pooled_ptr + offs, mask=mask, other=0.0)
        fc1_dweight += tl.dot(tl.trans(dhidden), pooled, input_precision="ieee", out_dtype=ACC)
        offs = offs_b[:, None] * NUM_BRANCHES * C + offs_c[None, :]
        attn = branch_weights(logits_ptr, C, 1, offs, mask, NUM_BRANCHES, "softmax", ACC)
        grown, grown_biases, grown_gammas, grown_betas = (), (), (), ()
        for i in tl.static_range(NUM_BRANCHES):
            offs_i = tl.cast(C, tl.int64) * i + offs
            p1 = tl.load(sums_ptr + offs_i, mask=mask, other=0.0)
            p2 = tl.load(sums_ptr + row + offs_i, mask=mask, other=0.0)
            p3 = tl.load(sums_ptr + 2 * row + offs_i, mask=mask, other=0.0)
            p4 = tl.load(sums_ptr + 3 * row + offs_i, mask=mask, other=0.0)
            dlogits = tl.load(dlogits_ptr + offs_i, mask=mask, other=0.0)
            product = tl.dot(tl.trans(z), dlogits, input_precision="ieee", out_dtype=ACC)
            grown = grown + (fc2_dweights[i] + product,)
            grown_biases = grown_biases + (fc2_dbiases[i] + tl.sum(dlogits, axis=0),)
            grown_betas = grown_betas + (dbetas[i] + tl.sum(attn[i] * p1 + share * p2, axis=0),)
            grown_gammas = grown_gammas + (dgammas[i] + tl.sum(attn[i] * p3 + share * p4, axis=0),)
        fc2_dweights, fc2_dbiases, dgammas, dbetas = grown, grown_biases, grown_gammas, grown_betas
    _store(fc1_dweight_ptr + offs_d[:, None] * C + offs_c[None, :], fc1_dweight, mask_weight)
    for i in tl.static_range(NUM_BRANCHES):
        offs_n = tl.cast(C, tl.int64) * i + offs_c
        _store(dgamma_ptr + offs_n, dgammas[i], mask_c)
        _store(dbeta_ptr + offs_n, dbetas[i], mask_c)
        if drift_ptr is not None:
            m = images * tl.cast(S, ACC)
            _store(drift_ptr + offs_n, dbetas[i] / m, mask_c)
            _store(drift_ptr + tl.cast(C, tl.int64) * NUM_BRANCHES + offs_n, dgammas[i] / m, mask_c)
        fc2_dweight_ptrs = fc2_dweight_ptr + offs_n[None, :] * d + offs_d[:, None]
        _store(fc2_dweight_ptrs, fc2_dweights[i], mask_weight)
        if fc2_dbias_ptr is not None:
            _store(fc2_dbias_ptr + offs_n, fc2_dbiases[i], mask_c)
    mask_first = mask_d & (pid == 0)
    if fc1_dbias_ptr is not None:
        _store(fc1_dbias_ptr + offs_d, fc1_dbias, mask_first)
    if fc1_dgamma_ptr is not None:
        _store(fc1_dgamma_ptr + offs_d, fc1_dgamma, mask_first)
    if fc1_dbeta_ptr is not None:
        _store(fc1_dbeta_ptr + offs_d, fc1_dbeta, mask_first)


@triton.jit
def _store(ptrs, values, mask):
    """Stores ``values`` in the dtype of the memory."""
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=mask)


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
    sums, dlogits = partials.new_empty(partials.shape[1:]), torch.empty_like(logits)
    dz = logits.new_empty((logits.shape[0], fc2_weight.shape[1]))
    launch(
        sk_hidden_bwd_launch,
        sums, dlogits, dz, partials, logits, norms.weight, norms.bias, fc2_weight,
        config=config,
    )  # fmt: skip
    return sums, dlogits, dz


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
    config = config or MLPConfig.hidden(MLPProblem(B, C, d, 1), DeviceFacts.of(hidden.device))
    return Launch(
        kernel=_sk_hidden_kernel,
        programs=B * cdiv(d, config.block_d),
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
        programs=max(1, cdiv(B, config.block_b)) * cdiv(M * C, config.block_c),
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
            "BLOCK_N": config.block_c,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_b,
        },
        num_warps=config.num_warps,
    )


def sk_hidden_bwd_launch(
    sums: Tensor,
    dlogits: Tensor,
    dz: Tensor,
    partials: Tensor,
    logits: Tensor,
    gammas: tuple[Tensor | None, ...],
    betas: tuple[Tensor | None, ...],
    fc2_weight: Tensor,
    *,
    config: MLPConfig | None = None,
) -> Launch:
    """Returns the launch that fills ``sums`` [4, B, M, C], ``dlogits`` and ``dz`` [B, d]."""
    B, M, C = logits.shape
    d = dz.shape[1]
    config = config or MLPConfig.hidden_bwd(MLPProblem(B, C, d, M), DeviceFacts.of(dz.device))
    return Launch(
        kernel=_sk_hidden_bwd_kernel,
        programs=B,
        pointers={
            "sums_ptr": sums,
            "dlogits_ptr": dlogits,
            "dz_ptr": dz,
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
        programs=cdiv(C, config.block_c),
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
            "BLOCK_D": config.block_d,
        },
        num_warps=config.num_warps,
    )
