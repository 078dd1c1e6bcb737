"""Device functions that more than one kernel uses.

Tuples stand for lists. A kernel takes its branches as tuples with an entry a branch, such as
``x_ptrs``, and ``tl.static_range`` unrolls a loop over them, so that the index i is a constant in
``x_ptrs[i]``. What such a loop collects is a tuple that grows, ``rows = rows + (row,)``; it starts
as ``()``. A loop at run time cannot change the type of what it carries: it builds a new tuple of
the same length in every turn.
"""

import triton
import triton.language as tl


@triton.jit
def program_coordinates(C, splits, BLOCK_C: tl.constexpr):
    """Splits the program id into image, block of channels and part of the positions, all int64.

    The part changes fastest, then the block of channels, then the image.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    pid_s = pid % splits
    pid_c = (pid // splits) % blocks
    pid_b = pid // (splits * blocks)
    return pid_b.to(tl.int64), pid_c.to(tl.int64), pid_s.to(tl.int64)


@triton.jit
def own_tiles(S, tiles, pid_s, BLOCK_S: tl.constexpr):
    """Returns the first tile of a row that split pid_s owns, and the first that it does not."""
    first = pid_s * tiles
    return first, tl.minimum(first + tiles, tl.cdiv(S, BLOCK_S))


@triton.jit
def known_multiple(n, MULTIPLE: tl.constexpr):
    """Returns ``n``, a multiple of MULTIPLE, in a form that shows it to the compiler."""
    if MULTIPLE > 1:
        n = n // MULTIPLE * MULTIPLE
    return n


@triton.jit
def within(first, size, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr):
    """Tells which of the BLOCK indices from ``first`` on lie below ``size``, as a mask [BLOCK].

    ``size`` is a multiple of MULTIPLE.
    """
    left = tl.minimum(known_multiple(size, MULTIPLE) - first, BLOCK).to(tl.int32)
    return tl.arange(0, BLOCK) < left


@triton.jit
def known_strides(strides, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Returns ``strides`` as int64, in a form that shows the compiler what they are multiples of.

    ``strides`` holds (b, c, s) of every full-size tensor, or of one alone for all. ALIGN divides
    them, but for the stride along which elements lie side by side: that of c with CHANNELS_LAST,
    else that of s.
    """
    known = ()
    for i in tl.static_range(len(strides)):
        stride_b = tl.cast(known_multiple(strides[i][0], ALIGN), tl.int64)
        stride_c = tl.cast(known_multiple(strides[i][1], 1 if CHANNELS_LAST else ALIGN), tl.int64)
        stride_s = tl.cast(known_multiple(strides[i][2], ALIGN if CHANNELS_LAST else 1), tl.int64)
        known = known + ((stride_b, stride_c, stride_s),)
    return known


@triton.jit
def tile_mask(
    corner,
    C,
    S,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Tells which elements [BLOCK_C, BLOCK_S] there are of the tile whose first is ``corner``.

    ``corner`` is (b, c, s), in int64.
    """
    mask_c = within(corner[1], C, ALIGN if CHANNELS_LAST else 1, BLOCK_C)
    mask_s = within(corner[2], S, 1 if CHANNELS_LAST else ALIGN, BLOCK_S)
    return mask_c[:, None] & mask_s[None, :]


@triton.jit
def tile_pointers(
    ptr,
    strides,
    TENSOR: tl.constexpr,
    corner,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Returns the pointers [BLOCK_C, BLOCK_S] of the tile of ``ptr`` whose first is ``corner``.

    TENSOR is its place in ``strides``, those of `known_strides`.
    """
    own = strides[TENSOR if len(strides) > 1 else 0]
    start = corner[0] * own[0] + corner[1] * own[1] + corner[2] * own[2]
    # The same for every tile, and for every tensor where one triple of strides is for all.
    offs_c = tl.arange(0, BLOCK_C)[:, None] * own[1]
    offs_s = tl.arange(0, BLOCK_S)[None, :] * own[2]
    return ptr + start + (offs_c + offs_s)


@triton.jit
def load_tile(ptr, strides, TENSOR: tl.constexpr, corner, mask, ACC: tl.constexpr):
    """Returns the tile of `tile_pointers` in ACC, zero outside of ``mask`` [BLOCK_C, BLOCK_S]."""
    ptrs = tile_pointers(ptr, strides, TENSOR, corner, mask.shape[0], mask.shape[1])
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def store_tile(ptr, strides, TENSOR: tl.constexpr, corner, mask, tile):
    """Writes ``tile`` [BLOCK_C, BLOCK_S] where ``mask`` is set, in the dtype of ``ptr``."""
    ptrs = tile_pointers(ptr, strides, TENSOR, corner, mask.shape[0], mask.shape[1])
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def channel_vector(ptr, offs_c, mask_c, ACC: tl.constexpr, ABSENT: tl.constexpr):
    """Returns the [BLOCK_C] of ``ptr`` [C] at ``offs_c``; ABSENT where ``ptr`` is None."""
    if ptr is None:
        vector = tl.full(offs_c.shape, ABSENT, ACC)
    else:
        vector = tl.load(ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
    return vector


@triton.jit
def channel_vectors(ptrs, offs_c, mask_c, ACC: tl.constexpr, ABSENT: tl.constexpr):
    """Returns the `channel_vector` of every branch."""
    vectors = ()
    for i in tl.static_range(len(ptrs)):
        vectors = vectors + (channel_vector(ptrs[i], offs_c, mask_c, ACC, ABSENT),)
    return vectors


@triton.jit
def inverse_deviations(var_ptrs, offs_c, mask_c, EPS: tl.constexpr, ACC: tl.constexpr):
    """Returns rstd_i = 1 / sqrt(var_i + EPS) of every branch as vectors [BLOCK_C]."""
    rstds = ()
    for i in tl.static_range(len(var_ptrs)):
        var = channel_vector(var_ptrs[i], offs_c, mask_c, ACC, 1.0)
        rstds = rstds + (1.0 / tl.sqrt(var + EPS),)
    return rstds


@triton.jit
def norm_vectors(
    mean_ptrs,
    var_ptrs,
    gamma_ptrs,
    beta_ptrs,
    offs_c,
    mask_c,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns mean_i, scale_i = gamma_i * rstd_i and beta_i, each a tuple of vectors [BLOCK_C]."""
    means = channel_vectors(mean_ptrs, offs_c, mask_c, ACC, 0.0)
    betas = channel_vectors(beta_ptrs, offs_c, mask_c, ACC, 0.0)
    rstds = inverse_deviations(var_ptrs, offs_c, mask_c, EPS, ACC)
    scales = ()
    for i in tl.static_range(len(rstds)):
        gamma = channel_vector(gamma_ptrs[i], offs_c, mask_c, ACC, 1.0)
        scales = scales + (gamma * rstds[i],)
    return means, scales, betas


@triton.jit
def normalised(x, mean, scale, beta):
    """Returns (x - mean) * scale + beta for a tile [BLOCK_C, BLOCK_S] and vectors [BLOCK_C]."""
    return (x - mean[:, None]) * scale[:, None] + beta[:, None]


@triton.jit
def relu(y):
    """Returns max(y, 0), NaN where y is NaN."""
    return tl.where(kept_by_relu(y), y, 0.0)


@triton.jit
def kept_by_relu(y):
    """Tells where max(y, 0) is y itself: where y is above 0, or NaN."""
    return ~(y <= 0.0)


@triton.jit
def branch_weights(
    logits_ptr,
    stride_m,
    stride_c,
    offs_c,
    mask_c,
    NUM_BRANCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns the weights of the branches as NUM_BRANCHES vectors [BLOCK_C].

    ``logits_ptr`` points at one image's logits [M, C]. ACTIVATION is "softmax" over the branches,
    "sigmoid" of each logit, or "none", which takes the logits themselves.
    """
    logits = ()
    for i in tl.static_range(NUM_BRANCHES):
        offs = tl.cast(stride_m, tl.int64) * i + offs_c * stride_c
        logits = logits + (tl.load(logits_ptr + offs, mask=mask_c, other=0.0).to(ACC),)
    if ACTIVATION == "softmax":
        attn = _softmax(logits, NUM_BRANCHES)
    elif ACTIVATION == "sigmoid":
        attn = ()
        for i in tl.static_range(NUM_BRANCHES):
            attn = attn + (tl.sigmoid(logits[i]),)
    else:
        tl.static_assert(ACTIVATION == "none", "ACTIVATION: softmax, sigmoid or none")
        attn = logits
    return attn


@triton.jit
def _softmax(logits, NUM_BRANCHES: tl.constexpr):
    """The softmax over NUM_BRANCHES vectors; the maximum is subtracted, NaN stays NaN."""
    peak = logits[0]
    for i in tl.static_range(1, NUM_BRANCHES):
        peak = tl.maximum(peak, logits[i])
    weights = ()
    total = tl.zeros_like(peak)
    for i in tl.static_range(NUM_BRANCHES):
        weight = tl.exp(logits[i] - peak)
        weights = weights + (weight,)
        total += weight
    attn = ()
    for i in tl.static_range(NUM_BRANCHES):
        attn = attn + (weights[i] / total,)
    return attn


@triton.jit
def branch_weights_bwd(attn, dattn, NUM_BRANCHES: tl.constexpr, ACTIVATION: tl.constexpr):
    """Returns dlogits_i as NUM_BRANCHES vectors [BLOCK_C], from the weights a and g = dL/da.

    softmax: a_i (g_i - sum_j a_j g_j); sigmoid: a_i (1 - a_i) g_i; none: g_i.
    """
    dlogits = ()
    if ACTIVATION == "softmax":
        inner = attn[0] * dattn[0]
        for j in tl.static_range(1, NUM_BRANCHES):
            inner += attn[j] * dattn[j]
        for i in tl.static_range(NUM_BRANCHES):
            dlogits = dlogits + (attn[i] * (dattn[i] - inner),)
    elif ACTIVATION == "sigmoid":
        for i in tl.static_range(NUM_BRANCHES):
            dlogits = dlogits + (attn[i] * (1.0 - attn[i]) * dattn[i],)
    else:
        dlogits = dattn
    return dlogits


@triton.jit
def zero_tiles(
    COUNT: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Returns COUNT tiles [BLOCK_C, BLOCK_S] of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([BLOCK_C, BLOCK_S], ACC),)
    return tiles


@triton.jit
def image_weights(
    logits_ptr,
    strides,
    pid_b,
    offs_c,
    mask_c,
    NUM_BRANCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns the `branch_weights` of image pid_b; ``strides`` are those of logits [B, M, C]."""
    image_ptr = logits_ptr + pid_b * strides[0]
    return branch_weights(
        image_ptr, strides[1], strides[2], offs_c, mask_c, NUM_BRANCHES, ACTIVATION, ACC
    )
