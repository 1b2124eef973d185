"""Coefficients of one token as factors of products, for 32 < n <= 64.

A program makes one token with four warps, and its products have the token's 64 segments as rows: two-dimensional, so
that all warps share them. Further suffixes to those of ``ops.parameters``, all powers of two:

    N   in kernels: n rounded up; what lies beyond n is zero
    P   m rounded up
    S   2 P, at least 16: the pattern's columns beside those of the deviations, because a product has 16 at least anyway
    B   channels of a chunk; E is walked in chunks

[deviations | pattern] times the rows [Y; Y] is exact where the deviation is zero: only deviations are rounded.

``end`` is E, unknown to the compiler: walks with many products, unrolled as a whole, would spill registers.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from megatron_vwn.ops.kernels.device import deviation
from megatron_vwn.ops.kernels.tables import Prepared


@dataclass(frozen=True)
class Connection:
    """What is known of a connection when a kernel is compiled; as in ``tables.Prepared``."""

    m: int
    n: int
    num_carry: int
    dynamic: bool
    sigmoid: bool
    columns: int
    padded_n: int
    padded_m: int
    twice_m: int

    @classmethod
    def of(cls, p: Prepared | None) -> "Connection | None":
        """Of a connection's tables; a read has none to write, a write none to read."""
        if p is None:
            return None
        n, m = triton.next_power_of_2(p.n), triton.next_power_of_2(p.m)
        return cls(p.m, p.n, p.num_carry, p.dynamic, p.sigmoid, 2 * p.m + p.num_carry, n, m, max(16, 2 * m))


@triton.jit
def chunk(pointer, row, exists, start, ALL: tl.constexpr, E: tl.constexpr, B: tl.constexpr):
    """Load [rows, B] of a contiguous [.., E] from channel ``start`` on; zero where a row or a channel does not exist.

    ALL: every row exists.
    """
    channel = start + tl.arange(0, B)
    place = pointer + row[:, None] * E + channel[None, :]
    if E % B != 0:
        return tl.load(place, mask=exists[:, None] & (channel < E)[None, :], other=0.0)
    elif ALL:
        return tl.load(place)
    else:
        return tl.load(place, mask=exists[:, None], other=0.0)


@triton.jit
def store_chunk(pointer, values, row, exists, start, ALL: tl.constexpr, E: tl.constexpr, B: tl.constexpr):
    """Store likewise, rounded to the dtype of what is stored to."""
    channel = start + tl.arange(0, B)
    place = pointer + row[:, None] * E + channel[None, :]
    values = values.to(pointer.dtype.element_ty)
    if E % B != 0:
        tl.store(place, values, mask=exists[:, None] & (channel < E)[None, :])
    elif ALL:
        tl.store(place, values)
    else:
        tl.store(place, values, mask=exists[:, None])


@triton.jit
def load_logits(z_ptr, row, column, exists, C: tl.constexpr):
    """Logits of some kernel columns in fp32; zero where there is none, or where the connection is static."""
    if C.dynamic:
        return tl.load(z_ptr + row * C.columns + column, mask=exists, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def carry_deviations(z_ptr, routing_ptr, scale_ptr, C: tl.constexpr):
    """A_carry minus the identity, [N, N] in fp32."""
    row = tl.arange(0, C.padded_n)[:, None]
    column = tl.arange(0, C.padded_n)[None, :]
    exists = (row < C.n) & (column < C.n)
    z = load_logits(z_ptr, row, column, exists, C)
    place = row * C.columns + C.m + column
    return deviation(z, routing_ptr, scale_ptr, place, exists, row == column, C.dynamic, C.sigmoid)


@triton.jit
def with_pattern(z_ptr, routing_ptr, scale_ptr, C: tl.constexpr, READ: tl.constexpr):
    """A_read, or else B^T, as [deviations | pattern | 0], [N, S] in fp32."""
    row = tl.arange(0, C.padded_n)[:, None]
    s = tl.arange(0, C.twice_m)[None, :]
    i = s % C.padded_m
    if READ:
        ones = row == i
        column = C.num_carry + C.m + i
        place = row * C.columns + i
    else:
        ones = row % C.m == i
        column = C.num_carry + i
        place = row * C.columns + C.m + C.num_carry + i
    alive = (row < C.n) & (i < C.m)
    exists = alive & (s < C.padded_m)
    z = load_logits(z_ptr, row, column, exists, C)
    deviations = deviation(z, routing_ptr, scale_ptr, place, exists, exists & ones, C.dynamic, C.sigmoid)
    return deviations + tl.where(alive & ones & (s >= C.padded_m) & (s < 2 * C.padded_m), 1.0, 0.0)


@triton.jit
def dot(a, b, acc):
    """acc + a b. Half precisions run on tensor cores; fp32 is multiplied as such, not as tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")
