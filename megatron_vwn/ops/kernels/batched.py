"""What the kernels for 8 < n <= 32 share. A program works on several tokens, one warp each.

Products of a token's own matrices are 3-D dots whose first axis is the token: each warp multiplies what it holds, on
tensor cores, and nothing is computed between different tokens. Only W is common to them, so the logits are ONE product
of all their rows. Suffixes of tiles beside those of ``ops.parameters``, all powers of two:

    N   segments, at least 16
    C   some columns of coefficients
    S   [m | m] columns or rows, each padded to a power of two, at least 16 together: a coefficient's deviation beside
        its pattern, against Y twice: the pattern's part is exact
    B   channels of a chunk
"""

import triton
import triton.language as tl

from megatron_vwn.ops.kernels.device import deviation
from megatron_vwn.ops.kernels.geometry import Tile
from megatron_vwn.ops.kernels.tables import Prepared

# Of a tensor core: rows of a left factor, columns of a right one.
_MIN_ROWS, _MIN_COLUMNS = 16, 8


def constants(p: Prepared | None, q: Prepared | None, segment_size: int, tile: Tile) -> dict[str, int | bool]:
    """Compile-time constants of a kernel between the connections p, which is written, and q, which is read."""
    one = p or q
    padded_m = triton.next_power_of_2(one.m)
    return {
        "TOKENS": tile.tokens,
        "SEGMENTS": one.n,
        "M": one.m,
        "E": segment_size,
        "N": max(_MIN_ROWS, triton.next_power_of_2(one.n)),
        "PADDED_M": padded_m,
        "S": max(_MIN_ROWS, 2 * padded_m),
        "SMALL": max(_MIN_COLUMNS, triton.next_power_of_2(2 * one.m)),
        "B": tile.channels,
        "STAGES": tile.stages,
        "WRITE": p is not None,
        "READ": q is not None,
        "CARRY": p.num_carry if p else 0,
        "DYNAMIC": p is not None and p.dynamic,
        "SIGMOID": p is not None and p.sigmoid,
        "NEXT_CARRY": q.num_carry if q else 0,
        "NEXT_DYNAMIC": q is not None and q.dynamic,
        "NEXT_SIGMOID": q is not None and q.sigmoid,
    }


@triton.jit
def to_rows(x_TNC, TOKENS: tl.constexpr, N: tl.constexpr):
    """[TOKENS, N, C] -> [TOKENS * N, C] in the order (N // 16, token, 16): where wgmma wants a warp's rows, so that
    they stay in the warp's registers."""
    C: tl.constexpr = x_TNC.shape[2]
    if N == 16:
        return tl.reshape(x_TNC, (TOKENS * N, C))
    else:
        halves = tl.permute(tl.reshape(x_TNC, (TOKENS, N // 16, 16, C)), (1, 0, 2, 3))
        return tl.reshape(halves, (TOKENS * N, C))


@triton.jit
def from_rows(x_RC, TOKENS: tl.constexpr, N: tl.constexpr):
    """The inverse of ``to_rows``."""
    C: tl.constexpr = x_RC.shape[1]
    if N == 16:
        return tl.reshape(x_RC, (TOKENS, N, C))
    else:
        return tl.reshape(tl.permute(tl.reshape(x_RC, (N // 16, TOKENS, 16, C)), (1, 0, 2, 3)), (TOKENS, N, C))


@triton.jit
def coefficients(
    z_ptr, routing_ptr, scale_ptr, alive, column, exists, ones,
    TOKENS: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Deviations [TOKENS, N, C] of the columns ``column`` [1, 1, C], which are there where ``exists`` [1, 1, C] and
    whose pattern is one where ``ones`` [1, N, C]; zero elsewhere."""
    token = tl.arange(0, TOKENS)[:, None, None]
    row = tl.arange(0, N)[None, :, None]
    exists = exists & (row < SEGMENTS)
    place = row * K + (column + M) % K
    if DYNAMIC:
        z = tl.load(z_ptr + token * (SEGMENTS * K) + (row * K + column), mask=alive & exists, other=0.0)
        return deviation(z.to(tl.float32), routing_ptr, scale_ptr, place, exists, ones, True, SIGMOID)
    else:
        same = deviation(0.0, routing_ptr, scale_ptr, place, exists, ones, False, SIGMOID)
        return tl.broadcast_to(same, (TOKENS, N, column.shape[2]))


@triton.jit
def carry_coefficients(
    z_ptr, routing_ptr, scale_ptr, alive,
    TOKENS: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr, M: tl.constexpr, CARRY: tl.constexpr,
    DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Deviations of A_carry, [TOKENS, N, N]."""
    K: tl.constexpr = CARRY + 2 * M
    column = tl.arange(0, N)[None, None, :]
    ones = tl.arange(0, N)[None, :, None] == column
    return coefficients(
        z_ptr, routing_ptr, scale_ptr, alive, column, column < CARRY, ones,
        TOKENS, N, SEGMENTS, M, K, DYNAMIC, SIGMOID,
    )  # fmt: skip


@triton.jit
def with_pattern(
    z_ptr, routing_ptr, scale_ptr, alive, FIRST: tl.constexpr, REPEATS: tl.constexpr,
    TOKENS: tl.constexpr, N: tl.constexpr, SEGMENTS: tl.constexpr, M: tl.constexpr, PADDED_M: tl.constexpr,
    S: tl.constexpr, CARRY: tl.constexpr, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """[deviations | pattern] of the M columns from FIRST on, [TOKENS, N, S]: B^T, whose pattern repeats down the
    segments, or A_read, whose does not."""
    K: tl.constexpr = CARRY + 2 * M
    row = tl.arange(0, N)[None, :, None]
    s = tl.arange(0, S)[None, None, :]
    i = s % PADDED_M
    ones = (row % M == i) & (row < SEGMENTS) if REPEATS else row == i
    exists = (s < PADDED_M) & (i < M)
    c = coefficients(
        z_ptr, routing_ptr, scale_ptr, alive, FIRST + tl.where(exists, i, 0), exists, ones,
        TOKENS, N, SEGMENTS, M, K, DYNAMIC, SIGMOID,
    )  # fmt: skip
    return c + tl.where(ones & (s >= PADDED_M) & (s < 2 * PADDED_M) & (i < M), 1.0, 0.0)
