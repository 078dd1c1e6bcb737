"""Device functions that more than one kernel uses."""

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
def known_multiple(n, ALIGN: tl.constexpr):
    """Returns ``n``, a multiple of ALIGN, in a form that shows it to the compiler.

    Triton knows by itself only which arguments are multiples of 16; a row of 14 x 14 is one of 4.
    """
    if ALIGN > 1:
        n = n // ALIGN * ALIGN
    return n


@triton.jit
def tile_pointers(ptr, stride_b, stride_c, stride_s, pid_b, offs_c, offs_s, ALIGN: tl.constexpr):
    """Returns the pointers [BLOCK_C, BLOCK_S] of a tile of image pid_b; all indices are int64."""
    row = known_multiple(stride_b, ALIGN) * pid_b
    return (
        ptr + row + offs_c[:, None] * known_multiple(stride_c, ALIGN) + offs_s[None, :] * stride_s
    )


@triton.jit
def branch_pointers(
    ptrs,
    strides_b,
    strides_c,
    strides_s,
    BRANCH: tl.constexpr,
    pid_b,
    offs_c,
    offs_s,
    ALIGN: tl.constexpr,
):
    """Returns the `tile_pointers` of one branch."""
    return tile_pointers(
        ptrs[BRANCH],
        strides_b[BRANCH],
        strides_c[BRANCH],
        strides_s[BRANCH],
        pid_b,
        offs_c,
        offs_s,
        ALIGN,
    )


@triton.jit
def channel_rows(ptr, offs_c, mask_c, C, COUNT: tl.constexpr):
    """Returns the rows of a contiguous [COUNT, C] as COUNT vectors [BLOCK_C]."""
    rows = ()
    for i in tl.static_range(COUNT):
        offs = tl.cast(C, tl.int64) * i + offs_c
        rows = rows + (tl.load(ptr + offs, mask=mask_c, other=0.0),)
    return rows


@triton.jit
def norm_rows(norm_ptr, offs_c, mask_c, C, ROW: tl.constexpr, NUM_BRANCHES: tl.constexpr):
    """Returns row ROW of norm [M, 4, C] as NUM_BRANCHES vectors [BLOCK_C].

    The rows are the batch's mean, rstd, scale = gamma * rstd, and beta.
    """
    rows = ()
    for i in tl.static_range(NUM_BRANCHES):
        offs = tl.cast(C, tl.int64) * (4 * i + ROW) + offs_c
        rows = rows + (tl.load(norm_ptr + offs, mask=mask_c, other=0.0),)
    return rows


@triton.jit
def normalised(x, mean, scale, beta):
    """Returns (x - mean) * scale + beta for a tile [BLOCK_C, BLOCK_S] and vectors [BLOCK_C]."""
    return (x - mean[:, None]) * scale[:, None] + beta[:, None]


@triton.jit
def relu(y):
    """Returns max(y, 0), NaN where y is NaN."""
    return tl.where(y <= 0.0, 0.0, y)


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
