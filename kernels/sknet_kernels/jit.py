"""Device functions that more than one kernel uses.

TILE, of the kernels that read branches, is a `sknet_kernels.config.Tile`: in shapes BLOCK_C stands
for its block_c and BLOCK_S for its block_s.

Tuples stand for lists. A kernel takes its branches as tuples with an entry a branch, such as
``x_ptrs``, and ``tl.static_range`` unrolls a loop over them, so that the index i is a constant in
``x_ptrs[i]``. What such a loop collects is a tuple that grows, ``rows = rows + (row,)``; it starts
as ``()``. A loop at run time cannot change the type of what it carries: it builds a new tuple of
the same length in every turn.
"""

import triton
import triton.language as tl

# Rows of the sums of the backward over positions, named after what is summed; P1 to P4 in formulas.
DOUT_KEEP = tl.constexpr(0)
KEEP = tl.constexpr(1)
DOUT_KEEP_XHAT = tl.constexpr(2)
KEEP_XHAT = tl.constexpr(3)
NUM_SUMS = tl.constexpr(4)

# Rows of the drift.
DBETA = tl.constexpr(0)
DGAMMA = tl.constexpr(1)


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
def tiles_of_row(S, TILE: tl.constexpr):
    """Returns how many tiles cover the S positions of a row."""
    if TILE.layout == "shifted":
        S += TILE.align - 1
    return tl.cdiv(S, TILE.block_s)


@triton.jit
def own_tiles(tiles_per_row, tiles, pid_s):
    """Returns the first of the tiles that split pid_s owns, and the first that it does not."""
    first = pid_s * tiles
    return first, tl.minimum(first + tiles, tiles_per_row)


@triton.jit
def known_multiple(n, MULTIPLE: tl.constexpr):
    """Returns ``n`` rounded down to a multiple of MULTIPLE, which the compiler then knows."""
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
def known_strides(strides, TILE: tl.constexpr):
    """Returns ``strides`` as int64, in a form that shows the compiler what they are multiples of.

    ``strides`` holds (b, c, s) of every full-size tensor, or of one alone for all.
    """
    known = ()
    for i in tl.static_range(len(strides)):
        stride_b, stride_c, stride_s = strides[i]
        stride_b = known_multiple(stride_b, TILE.align)
        stride_c = known_multiple(stride_c, TILE.align if TILE.layout == "rows" else 1)
        stride_s = known_multiple(stride_s, TILE.align if TILE.layout == "channels_last" else 1)
        triple = (
            tl.cast(stride_b, tl.int64),
            tl.cast(stride_c, tl.int64),
            tl.cast(stride_s, tl.int64),
        )
        known = known + (triple,)
    return known


@triton.jit
def row_starts(stride_c, first_c, BLOCK_C: tl.constexpr):
    """Returns where in an image the rows of BLOCK_C channels start, [BLOCK_C]."""
    return (first_c + tl.arange(0, BLOCK_C)) * stride_c


@triton.jit
def tile_masks(corner, strides, C, S, TILE: tl.constexpr):
    """Tells which elements [BLOCK_C, BLOCK_S] of the tile at ``corner`` there are, and are read.

    Where the two differ, with the layout "shifted", neighbouring rows are read along. The rest is
    as in `tile_pointers`.
    """
    _, first_c, first_s = corner
    along_c = TILE.align if TILE.layout == "channels_last" else 1
    mask_c = within(first_c, C, along_c, TILE.block_c)[:, None]
    if TILE.layout == "shifted":
        _, stride_c, _ = strides[0]
        lead = (row_starts(stride_c, first_c, TILE.block_c) % TILE.align).to(tl.int32)[:, None]
        lanes = tl.arange(0, TILE.block_s)[None, :]
        before = tl.minimum(first_s, TILE.align).to(tl.int32)
        left = tl.minimum(S - first_s, TILE.block_s).to(tl.int32)
        mask = mask_c & (lanes + before >= lead) & (lanes - lead < left)
        reads = mask_c & (lanes // TILE.align * TILE.align - lead < left)
    else:
        along_s = TILE.align if TILE.layout == "rows" else 1
        mask = mask_c & within(first_s, S, along_s, TILE.block_s)[None, :]
        reads = mask
    return mask, reads


@triton.jit
def tile_pointers(ptr, strides, TENSOR: tl.constexpr, corner, TILE: tl.constexpr):
    """Returns the pointers [BLOCK_C, BLOCK_S] of the tile of ``ptr`` whose first is ``corner``.

    ``corner`` is (b, c, s) in int64, TENSOR the place of the tensor in ``strides``, those of
    `known_strides`. TILE.align elements can be read at once. TILE.layout says where:
    "channels_last": along C, where every stride but that of c is a multiple of as many;
    "rows": along S, where every stride but that of s is one;
    "shifted": along S, in images of C times S elements without gaps that are such multiples, as
    their rows are not. A tile's row then begins up to align - 1 elements before the tensor's.
    """
    b, first_c, first_s = corner
    stride_b, stride_c, stride_s = strides[TENSOR if len(strides) > 1 else 0]
    offs_s = tl.arange(0, TILE.block_s)[None, :] * stride_s
    # What does not depend on the tile stays together: it is the same in every turn of a loop, and
    # for every tensor where one triple of strides is for all.
    if TILE.layout == "shifted":
        starts = known_multiple(row_starts(stride_c, first_c, TILE.block_c), TILE.align)
        ptrs = ptr + (b * stride_b + first_s * stride_s) + (starts[:, None] + offs_s)
    else:
        offs_c = tl.arange(0, TILE.block_c)[:, None] * stride_c
        start = b * stride_b + first_c * stride_c + first_s * stride_s
        ptrs = ptr + start + (offs_c + offs_s)
    return ptrs


@triton.jit
def load_tile(
    ptr, strides, TENSOR: tl.constexpr, corner, reads, TILE: tl.constexpr, ACC: tl.constexpr
):
    """Returns the tile of `tile_pointers` in ACC, zero outside of ``reads`` [BLOCK_C, BLOCK_S]."""
    ptrs = tile_pointers(ptr, strides, TENSOR, corner, TILE)
    return tl.load(ptrs, mask=reads, other=0.0).to(ACC)


@triton.jit
def store_tile(ptr, strides, TENSOR: tl.constexpr, corner, mask, TILE: tl.constexpr, tile):
    """Writes ``tile`` [BLOCK_C, BLOCK_S] where ``mask`` is set, in the dtype of ``ptr``."""
    ptrs = tile_pointers(ptr, strides, TENSOR, corner, TILE)
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
def move_towards(running_ptr, offs_c, batch, mask_c, keep, momentum, ACC: tl.constexpr):
    """Running = keep * running + momentum * batch in place, for vectors [BLOCK_C]."""
    running = tl.load(running_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
    moved = running * keep + batch * momentum
    tl.store(running_ptr + offs_c, moved.to(running_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def count_batch(tracked_ptr, is_first):
    """Adds 1 to the one element of ``tracked_ptr``, in one program."""
    tl.store(tracked_ptr, tl.load(tracked_ptr) + 1, mask=is_first)


@triton.jit
def inverse_deviations(var_ptrs, offs_c, mask_c, EPS: tl.constexpr, ACC: tl.constexpr):
    """Returns rstd_i = 1 / sqrt(var_i + EPS) of every branch as vectors [BLOCK_C]."""
    rstds = ()
    for i in tl.static_range(len(var_ptrs)):
        var = channel_vector(var_ptrs[i], offs_c, mask_c, ACC, 1.0)
        rstds = rstds + (1.0 / tl.sqrt(var + EPS),)
    return rstds


@triton.jit
def norm_vectors(norm_ptrs, offs_c, mask_c, EPS: tl.constexpr, ACC: tl.constexpr):
    """Returns mean_i, scale_i = gamma_i * rstd_i and beta_i, each a tuple of vectors [BLOCK_C].

    ``norm_ptrs`` are mean, var, gamma and beta of every branch, in four tuples.
    """
    mean_ptrs, var_ptrs, gamma_ptrs, beta_ptrs = norm_ptrs
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
    strides,
    pid_b,
    offs_c,
    mask_c,
    NUM_BRANCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Returns the weights of the branches of image pid_b as NUM_BRANCHES vectors [BLOCK_C].

    ``strides`` are those of the logits [B, M, C]. ACTIVATION is "softmax" over the branches,
    "sigmoid" of each logit, or "none", which takes the logits themselves.
    """
    stride_b, stride_m, stride_c = strides
    image_ptr = logits_ptr + pid_b * stride_b
    logits = ()
    for i in tl.static_range(NUM_BRANCHES):
        offs = tl.cast(stride_m, tl.int64) * i + offs_c * stride_c
        logits = logits + (tl.load(image_ptr + offs, mask=mask_c, other=0.0).to(ACC),)
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
def zero_sums(COUNT: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr):
    """Returns COUNT sums of no tile, as `plus` adds to them."""
    one_by_one: tl.constexpr = TILE.layout == "channels_last" or TILE.align > TILE.block_s
    return zero_tiles(COUNT, ACC, TILE.block_c, TILE.block_s // (1 if one_by_one else TILE.align))


@triton.jit
def plus(total, tile):
    """Returns ``total`` [BLOCK_C, LANES] plus ``tile`` [BLOCK_C, BLOCK_S], the sum of each lane.

    A lane's positions lie side by side. Where they are those that a thread reads at once, it keeps
    one number of them and asks no other thread.
    """
    BLOCK_C: tl.constexpr = total.shape[0]
    LANES: tl.constexpr = total.shape[1]
    if tile.shape[1] > LANES:
        tile = tl.sum(tl.reshape(tile, [BLOCK_C, LANES, tile.shape[1] // LANES]), axis=2)
    return total + tile
