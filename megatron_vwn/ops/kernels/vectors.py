"""How the kernels for n <= 8 hold a token: one warp, rows of channels in tuples, coefficients in scalars.

A row of a chunk is [LANES, V]: a thread has V channels, 16 bytes or fewer, that follow each other, so a sum over them
stays within it. All of a token's rows are a tuple, and so are its coefficients, row after row: loops over segments and
columns are unrolled, and neither n nor m need be a power of two.
"""
# ruff: noqa: RUF005  (Triton adds tuples, but knows no starred expressions)

import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.device import deviation
from megatron_vwn.ops.kernels.geometry import Tile

WARP = 32


def vector_width(tile: Tile, stream: Tensor) -> int:
    """Channels of a thread in a chunk: what the tile says, but no more than one load brings."""
    return min(max(1, tile.channels // (WARP * tile.warps)), 16 // stream.itemsize)


def group_size(n: int, numbers: int, most: int) -> int:
    """Segments to do in one walk, where a thread keeps so many numbers of each, and in all not more than ``most``:
    nearly as many in every walk."""
    walks = -(-n // max(1, most // max(1, numbers)))
    return -(-n // walks)


@triton.jit
def zeros(COUNT: tl.constexpr, LANES: tl.constexpr):
    """So many sums, each thread's part of them."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((LANES,), tl.float32),)
    return sums


@triton.jit
def load_row(pointer, place, exists):
    """A chunk of one row; ``exists`` is None where all channels do."""
    if exists is None:
        return tl.load(pointer + place)
    else:
        return tl.load(pointer + place, mask=exists, other=0.0)


@triton.jit
def load_rows(pointer, place, exists, ROWS: tl.constexpr, E: tl.constexpr):
    """A chunk of every row of a [ROWS, E].

    Kept in their dtype, which takes fewer registers, until they are used. All that a walk needs of a chunk is loaded
    before anything is stored: a load is not moved ahead of a store by the compiler, and would be waited for alone.
    """
    rows = ()
    for row in tl.static_range(ROWS):
        rows = rows + (load_row(pointer + row * E, place, exists),)
    return rows


@triton.jit
def channels_of(row, LANES: tl.constexpr, V: tl.constexpr):
    """A row as a tuple of V channels, [LANES] each, in fp32: what a thread has anyway, now by name."""
    parts = (row.to(tl.float32),)
    for level in tl.static_range(V.bit_length() - 1):
        halves = ()
        for part in tl.static_range(2**level):
            first, second = tl.split(tl.reshape(parts[part], (LANES, V // 2 ** (level + 1), 2)))
            halves = halves + (first, second)
        parts = halves
    channels = ()
    for part in tl.static_range(V):
        channels = channels + (tl.reshape(parts[part], (LANES,)),)
    return channels


@triton.jit
def add_product(total, a, b, V: tl.constexpr):
    """total + a . b over a thread's channels, one fused multiplication and addition after the other: ``tl.sum`` adds in
    a tree, half of which cannot be fused."""
    for channel in tl.static_range(V):
        total += a[channel] * b[channel]
    return total


@triton.jit
def combine(rows, factors, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """The sum over i of factors[FIRST + i STEP] rows[i], in fp32."""
    result = rows[0].to(tl.float32) * factors[FIRST]
    for i in tl.static_range(1, COUNT):
        result += rows[i].to(tl.float32) * factors[FIRST + i * STEP]
    return result


@triton.jit
def load_scalars(pointer, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Numbers that follow each other, each of which every thread gets, in fp32."""
    scalars = ()
    for i in tl.static_range(FIRST, LAST):
        scalars = scalars + (tl.load(pointer + i).to(tl.float32),)
    return scalars


@triton.jit
def is_one(row, column, M: tl.constexpr, C: tl.constexpr):
    """Whether the initial pattern is one there: the carry's identity, B's tiling, the read of the first m segments."""
    is_carry = (column < C) & (column == row)
    is_write = (column >= C) & (column < C + M) & (column - C == row % M)
    return is_carry | is_write | (column - C - M == row)


@triton.jit
def coefficient(
    z, routing_ptr, scale_ptr, ROW: tl.constexpr, COLUMN: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """The coefficient of a logit, its pattern included, in fp32: the carry's identity, B's tiling, the read of the
    first m segments."""
    K: tl.constexpr = C + 2 * M
    ONE: tl.constexpr = (
        COLUMN == ROW if COLUMN < C else COLUMN - C == ROW % M if COLUMN < C + M else COLUMN - C - M == ROW
    )
    place: tl.constexpr = ROW * K + (COLUMN + M) % K
    value = deviation(z, routing_ptr, scale_ptr, place, True, ONE, DYNAMIC, SIGMOID)
    return value + 1.0 if ONE else value


@triton.jit
def stored_coefficient(
    z_ptr, routing_ptr, scale_ptr, ROW: tl.constexpr, COLUMN: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """The same, its logit among those of the token at ``z_ptr``."""
    z = 0.0
    if DYNAMIC:
        z = tl.load(z_ptr + ROW * (C + 2 * M) + COLUMN).to(tl.float32)
    return coefficient(z, routing_ptr, scale_ptr, ROW, COLUMN, M, C, DYNAMIC, SIGMOID)


@triton.jit
def write_coefficients(
    z_ptr, routing_ptr, scale_ptr, FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """What the segments [FIRST, LAST) of H' are made of: for each the C factors of H and the M of Y, one after the
    other."""
    result = ()
    for j in tl.static_range(FIRST, LAST):
        for i in tl.static_range(C):
            result = result + (stored_coefficient(z_ptr, routing_ptr, scale_ptr, i, j, M, C, DYNAMIC, SIGMOID),)
        for i in tl.static_range(M):
            result = result + (stored_coefficient(z_ptr, routing_ptr, scale_ptr, j, C + i, M, C, DYNAMIC, SIGMOID),)
    return result


@triton.jit
def read_coefficients(
    z_ptr, routing_ptr, scale_ptr, FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """What the segments [FIRST, LAST) give to X: for each the M factors, one after the other."""
    result = ()
    for j in tl.static_range(FIRST, LAST):
        for i in tl.static_range(M):
            c = stored_coefficient(z_ptr, routing_ptr, scale_ptr, j, C + M + i, M, C, DYNAMIC, SIGMOID)
            result = result + (c,)
    return result
