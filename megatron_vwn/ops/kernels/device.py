"""What all connection kernels share: how a program sees the stream, and the gates on a tile of coefficients.

A program works on a tile of tokens at a time, and its matrix products have the segments of ALL these tokens as rows, so
that small n fill a tensor core too. Further suffixes to those of ``ops.parameters``, all powers of two:

    R   rows of H: (token of the tile, segment), the segments padded to the next power of two of n
    S   rows of X and Y: (token of the tile, segment of the backbone), likewise
    C   columns of a matrix of coefficients: R for the carry, S for read and write
    B   channels of a chunk; E is walked in chunks, because a token's segments may not fit in registers

A matrix of coefficients [R, C] is block-diagonal: zero between different tokens. Its logits come from one product,
H [R, B] times W^T [B, C] whose columns repeat for every token of the tile; the mask of ``block`` keeps the diagonal.

``G`` is the kernel's ``Geometry``. ``zero`` is ``opaque_zero``: whatever is derived from it is computed where it is
used. Known to be the same everywhere, dozens of offsets and masks would be moved out of the loops, stay alive and be
spilled; ``disable_licm`` of the loops alone does not prevent it.
"""

import triton
import triton.language as tl


@triton.jit
def opaque_zero(first, T, number):
    """0, for a tile's first token, which is below T, and any number of at least 0: the compiler cannot know it.

    It is another value to the compiler for each number: nothing is kept from one use to the next with another number.
    """
    return tl.minimum(T - 1 - first + number, 0)


@triton.jit
def split_rows(ROWS: tl.constexpr, PADDED: tl.constexpr, zero):
    """Token of the tile and segment of each row."""
    row = tl.arange(0, ROWS) + zero
    if ROWS == PADDED:
        return tl.zeros_like(row), row
    else:
        return row // PADDED, row % PADDED


@triton.jit
def address(
    pointer, first, T, start, zero, G: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, SEGMENTS: tl.constexpr
):
    """Addresses and mask of a chunk of a contiguous [T, SEGMENTS, E], from the tile's first token and the chunk's first
    channel. A stream has more than 2^31 elements, a tile fewer: 64 bits for the tile, 32 for offsets from it."""
    E: tl.constexpr = G.segment_size
    B: tl.constexpr = G.channels
    token, segment = split_rows(ROWS, PADDED, zero)
    channel = start + tl.arange(0, B)
    exists = ((token < G.tokens) & (first + token < T) & (segment < SEGMENTS))[:, None]
    if E % B != 0:
        exists = exists & (channel < E)[None, :]
    tile = pointer + first.to(tl.int64) * (SEGMENTS * E)
    return tile + ((token * SEGMENTS + segment) * E)[:, None] + channel[None, :], exists


@triton.jit
def load_state(pointer, first, T, start, G: tl.constexpr):
    """A chunk [R, B] of [T, N, E]; zero where a token, segment or channel does not exist."""
    zero = opaque_zero(first, T, start)
    place, exists = address(pointer, first, T, start, zero, G, G.rows, G.padded_n, G.n)
    return tl.load(place, mask=exists, other=0.0)


@triton.jit
def load_backbone(pointer, first, T, start, G: tl.constexpr):
    """A chunk [S, B] of [T, M, E], likewise."""
    zero = opaque_zero(first, T, start)
    place, exists = address(pointer, first, T, start, zero, G, G.backbone_rows, G.padded_m, G.m)
    return tl.load(place, mask=exists, other=0.0)


@triton.jit
def store_state(pointer, chunk_RB, first, T, start, G: tl.constexpr):
    """Store a chunk of [T, N, E], rounded to its dtype."""
    # Another zero than a load's, whose offsets would otherwise be kept for this.
    zero = opaque_zero(first, T, start + 1)
    place, exists = address(pointer, first, T, start, zero, G, G.rows, G.padded_n, G.n)
    tl.store(place, chunk_RB.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def store_backbone(pointer, chunk_SB, first, T, start, G: tl.constexpr):
    """Store a chunk of [T, M, E], rounded to its dtype."""
    zero = opaque_zero(first, T, start + 1)
    place, exists = address(pointer, first, T, start, zero, G, G.backbone_rows, G.padded_m, G.m)
    tl.store(place, chunk_SB.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def load_weight(
    pointer, column, first, T, start, G: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, COUNT: tl.constexpr
):
    """A chunk [C, B] of (g o W)^T [K, E]: COUNT columns of W from ``column`` on, repeated for every token."""
    E: tl.constexpr = G.segment_size
    B: tl.constexpr = G.channels
    _, segment = split_rows(ROWS, PADDED, opaque_zero(first, T, start))
    channel = start + tl.arange(0, B)
    exists = (segment < COUNT)[:, None]
    if E % B != 0:
        exists = exists & (channel < E)[None, :]
    return tl.load(pointer + ((column + segment) * E)[:, None] + channel[None, :], mask=exists, other=0.0)


@triton.jit
def carry_weight(pointer, first, T, start, G: tl.constexpr):
    """The carry's columns, [R, B]."""
    return load_weight(pointer, 0, first, T, start, G, G.rows, G.padded_n, G.n)


@triton.jit
def write_weight(pointer, first, T, start, G: tl.constexpr):
    """The write's columns, behind those of the carry: [S, B]."""
    return load_weight(pointer, G.carry, first, T, start, G, G.backbone_rows, G.padded_m, G.m)


@triton.jit
def read_weight(pointer, first, T, start, G: tl.constexpr):
    """The read's columns, a set of their own: [S, B]."""
    return load_weight(pointer, 0, first, T, start, G, G.backbone_rows, G.padded_m, G.m)


@triton.jit
def add_weight(
    pointer, row, chunk_CB, first, T, start,
    G: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Add a chunk of a gradient of W to a program's own fp32 sums [.., E] from ``row`` on, summed over the tokens."""
    E: tl.constexpr = G.segment_size
    B: tl.constexpr = G.channels
    sums = tl.sum(tl.reshape(chunk_CB, (ROWS // PADDED, PADDED, B)), axis=0)
    segment = tl.arange(0, PADDED) + opaque_zero(first, T, start + 1)
    channel = start + tl.arange(0, B)
    exists = (segment < COUNT)[:, None]
    if E % B != 0:
        exists = exists & (channel < E)[None, :]
    place = pointer + ((row + segment) * E)[:, None] + channel[None, :]
    tl.store(place, tl.load(place, mask=exists, other=0.0) + sums, mask=exists)


@triton.jit
def add_state_weight(pointer, row, chunk_RB, first, T, start, G: tl.constexpr):
    """``add_weight`` for the columns of a carry."""
    add_weight(pointer, row, chunk_RB, first, T, start, G, G.rows, G.padded_n, G.n)


@triton.jit
def add_backbone_weight(pointer, row, chunk_SB, first, T, start, G: tl.constexpr):
    """``add_weight`` for the columns of a read or a write."""
    add_weight(pointer, row, chunk_SB, first, T, start, G, G.backbone_rows, G.padded_m, G.m)


@triton.jit
def matrix_place(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr, zero):
    """Addresses of a contiguous [ROWS, COLUMNS]."""
    row = tl.arange(0, ROWS) + zero
    return pointer + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def add_matrix(pointer, matrix_RC, zero):
    """Add to a program's own contiguous fp32 [R, C]; kept in memory, because registers are what a backward lacks."""
    place = matrix_place(pointer, matrix_RC.shape[0], matrix_RC.shape[1], zero)
    tl.store(place, tl.load(place) + matrix_RC)


@triton.jit
def keep_matrix(pointer, matrix_RC, zero):
    """Put a matrix into a program's own scratch memory. A barrier must come before it is taken back, because other
    threads take it back than put it there."""
    tl.store(matrix_place(pointer, matrix_RC.shape[0], matrix_RC.shape[1], zero), matrix_RC)


@triton.jit
def kept_matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr, zero):
    """Take a matrix back from a program's own scratch memory."""
    return tl.load(matrix_place(pointer, ROWS, COLUMNS, zero))


@triton.jit
def dot(a, b, acc):
    """acc + a b. Half precisions run on tensor cores; fp32 is multiplied as such, not as tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_coefficients(a, b, acc, dtype: tl.constexpr):
    """acc + a b of fp32 coefficients of a stream of some dtype, on tensor cores, which need the fewest registers: tf32
    has the mantissa of fp16, three of its products are as exact as fp32."""
    if dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc, input_precision="tf32")


@triton.jit
def block(KIND: tl.constexpr, zero, G: tl.constexpr):
    """One kind of coefficients, "carry" [R, R], "write" [R, S] or "read" [R, S]: where it exists, where its initial
    pattern is one, and where its learned values are, relative to a contiguous [N, K]."""
    token_R, segment_R = split_rows(G.rows, G.padded_n, zero)
    if KIND == "carry":
        token_C, segment_C = split_rows(G.rows, G.padded_n, zero)
        COUNT: tl.constexpr = G.n
    else:
        token_C, segment_C = split_rows(G.backbone_rows, G.padded_m, zero)
        COUNT: tl.constexpr = G.m
    exists = (token_R[:, None] == token_C[None, :]) & (segment_R < G.n)[:, None] & (segment_C < COUNT)[None, :]
    if KIND == "write":
        pattern = exists & (segment_R[:, None] % G.m == segment_C[None, :])
        place = segment_R[:, None] * (G.carry + G.m) + G.carry + segment_C[None, :]
    elif KIND == "carry":
        pattern = exists & (segment_R[:, None] == segment_C[None, :])
        place = segment_R[:, None] * (G.carry + G.m) + segment_C[None, :]
    else:
        pattern = exists & (segment_R[:, None] == segment_C[None, :])
        place = segment_R[:, None] * G.m + segment_C[None, :]
    return exists, pattern, place


@triton.jit
def pattern(KIND: tl.constexpr, zero, dtype: tl.constexpr, G: tl.constexpr):
    """The initial pattern as a factor of a product, which is then exact in every dtype."""
    _, ones, _ = block(KIND, zero, G)
    return tl.where(ones, 1.0, 0.0).to(dtype)


@triton.jit
def keep_tokens(matrix_SS, zero, G: tl.constexpr):
    """A product of rows of X, Y or W with each other: zero between different tokens."""
    token_S, _ = split_rows(G.backbone_rows, G.padded_m, zero)
    return tl.where(token_S[:, None] == token_S[None, :], matrix_SS, 0.0)


@triton.jit
def keep_block(matrix_RC, KIND: tl.constexpr, zero, G: tl.constexpr):
    """Zero between different tokens, and where there is no segment."""
    exists, _, _ = block(KIND, zero, G)
    return tl.where(exists, matrix_RC, 0.0)


@triton.jit
def tanh(x):
    """Absolute error 1e-7, which is what a deviation is added to."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def deviation(logits_RC, KIND: tl.constexpr, routing_ptr, scale_ptr, zero, G: tl.constexpr):
    """Coefficients minus their initial pattern (``ops.eager.deviations``), zero between different tokens."""
    exists, ones, place = block(KIND, zero, G)
    routing = tl.load(routing_ptr + place, mask=exists, other=0.0)
    if G.dynamic:
        scale = tl.load(scale_ptr + place, mask=exists, other=0.0)
        if G.sigmoid:
            gate = tanh(0.5 * scale * logits_RC)
            routing += tl.where(ones, gate, 0.0) + routing * gate
        else:
            routing += scale * tanh(logits_RC)
    return routing


@triton.jit
def deviation_backward(gradient_RC, logits_RC, KIND: tl.constexpr, routing_ptr, scale_ptr, zero, G: tl.constexpr):
    """Gradients of logits, routing and scale of a dynamic connection for a gradient of the deviations."""
    # Computed again: seen to be equal to those of ``deviation``, the gates would be kept since then.
    logits_RC += zero.to(tl.float32)
    exists, ones, place = block(KIND, zero, G)
    gradient = tl.where(exists, gradient_RC, 0.0)
    scale = tl.load(scale_ptr + place, mask=exists, other=0.0)
    if G.sigmoid:
        routing = tl.load(routing_ptr + place, mask=exists, other=0.0)
        gate = tanh(0.5 * scale * logits_RC)
        inner = gradient * (tl.where(ones, 1.0, 0.0) + routing) * 0.5 * (1.0 - gate * gate)
        return inner * scale, gradient * (1.0 + gate), inner * logits_RC
    else:
        gate = tanh(logits_RC)
        return gradient * scale * (1.0 - gate * gate), gradient, gradient * gate


@triton.jit
def squares(chunk_RB):
    """Sum of squares of each row of a chunk, in fp32."""
    chunk = chunk_RB.to(tl.float32)
    return tl.sum(chunk * chunk, axis=1)
