"""Forward for 32 < n <= 64: write, read, and both at once. ``wide_factors`` explains programs and suffixes.

Two walks over E. The first makes H' = B^T Y + A_carry^T H and the logits of the next connection, which need all
channels of a segment; the second makes X = A_read^T H' and finds H' in a cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.boundary import Boundary
from megatron_vwn.ops.kernels.geometry import tile
from megatron_vwn.ops.kernels.launch import launch
from megatron_vwn.ops.kernels.wide_factors import (
    Connection,
    carry_deviations,
    chunk,
    dot,
    store_chunk,
    with_pattern,
)


def forward(b: Boundary) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``boundary``."""
    p, q = b.p, b.q
    tokens, n, e = b.h_TNE.shape
    out_TNE, x_TME, z_next_TNK, inverse_rms_TN = b.made()
    size = tile("wide_forward", n, b.h_TNE.device).fit(e, b.h_TNE.dtype)
    launch(
        wide_forward, tokens, size,
        b.h_TNE, b.y_TME, b.z_TNK, p and p.routing_NK, p and p.scale_NK,
        q and q.weight_KE, q and q.routing_NK, q and q.scale_NK,
        out_TNE, x_TME, z_next_TNK, inverse_rms_TN, q.eps if q else 0.0, e,
        WRITE=Connection.of(p), READ=Connection.of(q), E=e, B=size.channels, B2=size.second_channels,
        STAGES=size.stages, STAGES2=size.second_stages,
    )  # fmt: skip
    return out_TNE, x_TME, z_next_TNK, inverse_rms_TN


@triton.jit(do_not_specialize=["end"])
def wide_forward(
    h_ptr, y_ptr, z_ptr, routing_ptr, scale_ptr, weight_next_ptr, routing_next_ptr, scale_next_ptr,
    out_ptr, x_ptr, z_next_ptr, inverse_rms_ptr, eps, end,
    WRITE: tl.constexpr, READ: tl.constexpr, E: tl.constexpr, B: tl.constexpr, B2: tl.constexpr,
    STAGES: tl.constexpr, STAGES2: tl.constexpr,
):  # fmt: skip
    """A program makes one token; WRITE and READ are the connections, None where there is nothing to write or read."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    C: tl.constexpr = READ if WRITE is None else WRITE
    n: tl.constexpr = C.n
    N: tl.constexpr = C.padded_n
    S: tl.constexpr = C.twice_m
    P: tl.constexpr = C.padded_m
    token = tl.program_id(0).to(tl.int64)
    h_ptr += token * (n * E)
    row = tl.arange(0, N)
    alive = row < n
    s = tl.arange(0, S)

    if WRITE is not None:
        out_ptr += token * (n * E)
        y_ptr += token * (C.m * E)
        if C.dynamic:
            z_ptr += token * (n * C.columns)
        write_NS = with_pattern(z_ptr, routing_ptr, scale_ptr, C, False).to(dtype)
        if C.num_carry:
            carry_NN = tl.trans(carry_deviations(z_ptr, routing_ptr, scale_ptr, C).to(dtype))
    if READ is not None:
        K: tl.constexpr = READ.columns
        if READ.dynamic:
            z_next_ptr += token * (n * K)
            squares_N = tl.zeros((N,), tl.float32)
            carry_logits_NN = tl.zeros((N, N), tl.float32)
            logits_NS = tl.zeros((N, S), tl.float32)

    if WRITE is not None or READ.dynamic:
        for start in tl.range(0, end, B, num_stages=STAGES):
            h_NB = chunk(h_ptr, row, alive, start, n == N, E, B)
            if WRITE is not None:
                y_SB = chunk(y_ptr, s % P, (s < 2 * P) & (s % P < C.m), start, C.m == P and S == 2 * P, E, B)
                sum_NB = h_NB.to(tl.float32)
                if C.num_carry:
                    sum_NB = dot(carry_NN, h_NB, sum_NB)
                sum_NB = dot(write_NS, y_SB.to(dtype), sum_NB)
                h_NB = sum_NB.to(dtype)
                store_chunk(out_ptr, h_NB, row, alive, start, n == N, E, B)
            if READ is not None and READ.dynamic:
                exact_NB = h_NB.to(tl.float32)
                squares_N += tl.sum(exact_NB * exact_NB, axis=1)
                if READ.num_carry:
                    weight_NB = chunk(weight_next_ptr, row, alive, start, n == N, E, B)
                    carry_logits_NN = dot(h_NB, tl.trans(weight_NB), carry_logits_NN)
                small = s < 2 * READ.m
                weight_SB = chunk(weight_next_ptr, READ.num_carry + s, small, start, 2 * READ.m == S, E, B)
                logits_NS = dot(h_NB, tl.trans(weight_SB), logits_NS)

    if READ is not None:
        if READ.dynamic:
            inverse_N = tl.rsqrt(squares_N / E + eps)
            tl.store(inverse_rms_ptr + token * n + row, inverse_N, mask=alive)
            inverse_N1 = (inverse_N * E**-0.5)[:, None]
            place = z_next_ptr + row[:, None] * K
            if READ.num_carry:
                logits = (carry_logits_NN * inverse_N1).to(dtype)
                tl.store(place + row[None, :], logits, mask=alive[:, None] & alive[None, :])
            logits = (logits_NS * inverse_N1).to(dtype)
            tl.store(place + READ.num_carry + s[None, :], logits, mask=alive[:, None] & (s < 2 * READ.m)[None, :])
        # Other threads load H' and the logits than stored them.
        tl.debug_barrier()
        read_SN = tl.trans(with_pattern(z_next_ptr, routing_next_ptr, scale_next_ptr, READ, True).to(dtype))
        x_ptr += token * (READ.m * E)
        i = tl.arange(0, P)
        for start in tl.range(0, E, B2, num_stages=STAGES2):
            h_NB = chunk(h_ptr if WRITE is None else out_ptr, row, alive, start, n == N, E, B2)
            x_SB = dot(read_SN, h_NB, tl.zeros((S, B2), tl.float32))
            x_PB = tl.sum(tl.reshape(x_SB, (S // P, P, B2)), axis=0)
            store_chunk(x_ptr, x_PB, i, i < READ.m, start, READ.m == P, E, B2)
