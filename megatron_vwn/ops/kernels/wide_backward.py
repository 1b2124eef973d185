"""Backward for 32 < n <= 64: write, read, and both at once. ``wide_factors`` explains programs and suffixes.

With G the whole gradient of H':

    wide_gates    dA_read = H' dX^T; with the gradients of the other coefficients, those of the logits of q
    wide_stream   G = dH' + A_read dX + dZ W^T + shrink o H', from it dH = A_carry G, dY = B G and the gradients of p's
                  coefficients, dA_carry = H G^T and dB^T = G Y^T

They are two kernels because G needs the first one's sums over all channels, and as one they need more registers than
there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.boundary import Boundary
from megatron_vwn.ops.kernels.device import deviation_backward
from megatron_vwn.ops.kernels.geometry import tile
from megatron_vwn.ops.kernels.launch import launch
from megatron_vwn.ops.kernels.wide_factors import (
    Connection,
    carry_deviations,
    chunk,
    dot,
    load_logits,
    store_chunk,
    with_pattern,
)


def backward(b: Boundary) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``boundary``."""
    p, q, dc_next_TNK, shrink_TN = b.p, b.q, b.dc_next_TNK, None
    tokens, n, e = b.h_TNE.shape
    dh_TNE, dy_TME, dc_TNK, dz_next_TNK = b.gradients()
    if q:
        if dc_next_TNK is None:
            dc_next_TNK = b.h_TNE.new_zeros(tokens, n, q.columns)
        if q.dynamic:
            shrink_TN = torch.empty_like(b.inverse_rms_TN)
        size = tile("wide_gates", n, b.h_TNE.device).fit(e, b.h_TNE.dtype)
        launch(
            wide_gates, tokens, size,
            b.read_TNE, b.dx_TME, b.z_next_TNK, b.inverse_rms_TN, q.routing_NK, q.scale_NK,
            dc_next_TNK, dz_next_TNK, shrink_TN,
            READ=Connection.of(q), E=e, B=size.channels, STAGES=size.stages,
        )  # fmt: skip
    size = tile("wide_stream", n, b.h_TNE.device).fit(e, b.h_TNE.dtype)
    launch(
        wide_stream, tokens, size,
        b.h_TNE, b.y_TME, b.z_TNK, p and p.routing_NK, p and p.scale_NK,
        b.z_next_TNK, q and q.weight_KE, q and q.routing_NK, q and q.scale_NK, dz_next_TNK, shrink_TN,
        b.dx_TME, b.dout_TNE, dh_TNE, dy_TME, dc_TNK, e,
        WRITE=Connection.of(p), READ=Connection.of(q), E=e, B=size.channels, STAGES=size.stages,
    )  # fmt: skip
    return dh_TNE, dy_TME, dc_TNK, dz_next_TNK, dc_next_TNK


@triton.jit
def logits_backward(
    dc, row, column, parameter, exists, ones, z_ptr, dz_ptr, routing_ptr, scale_ptr, inverse_N1, READ: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """Store dZ of some columns; their part of the sum of dlogits o logits over columns, [N]."""
    z = load_logits(z_ptr, row, column, exists, READ)
    place = row * READ.columns + parameter + column
    dlogits = deviation_backward(dc, z, routing_ptr, scale_ptr, place, exists, ones, READ.sigmoid)
    dz = (dlogits * (inverse_N1 * E**-0.5)).to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + row * READ.columns + column, dz, mask=exists)
    return tl.sum(dlogits * z, axis=1)


@triton.jit
def wide_gates(
    out_ptr, dx_ptr, z_ptr, inverse_rms_ptr, routing_ptr, scale_ptr, dc_ptr, dz_ptr, shrink_ptr,
    READ: tl.constexpr, E: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one token: the read columns of dC, dZ = dlogits / (rms sqrt(E)), and shrink: what a segment of H' gets
    of itself because it enters its own norm: -sum(dlogits o logits) / (rms^2 E)."""
    m: tl.constexpr = READ.m
    n: tl.constexpr = READ.n
    K: tl.constexpr = READ.columns
    N: tl.constexpr = READ.padded_n
    P: tl.constexpr = max(16, READ.padded_m)
    token = tl.program_id(0).to(tl.int64)
    out_ptr += token * (n * E)
    dx_ptr += token * (m * E)
    dc_ptr += token * (n * K)
    row_N = tl.arange(0, N)
    i_P = tl.arange(0, P)
    row, i = row_N[:, None], i_P[None, :]

    dread_NP = tl.zeros((N, P), tl.float32)
    for start in tl.range(0, E, B, num_stages=STAGES):
        out_NB = chunk(out_ptr, row_N, row_N < n, start, n == N, E, B)
        dx_PB = chunk(dx_ptr, i_P, i_P < m, start, m == P, E, B)
        dread_NP = dot(out_NB, tl.trans(dx_PB), dread_NP)
    exists = (row < n) & (i < m)
    dread_NP = dread_NP.to(dc_ptr.dtype.element_ty)
    tl.store(dc_ptr + row * K + (K - m) + i, dread_NP, mask=exists)

    if READ.dynamic:
        z_ptr += token * (n * K)
        dz_ptr += token * (n * K)
        inverse_N1 = tl.load(inverse_rms_ptr + token * n + row, mask=row < n, other=0.0)
        sums_N = logits_backward(
            dread_NP.to(tl.float32), row, K - m + i, m - K, exists, row == i,
            z_ptr, dz_ptr, routing_ptr, scale_ptr, inverse_N1, READ, E,
        )  # fmt: skip
        column = READ.num_carry + i
        dc = tl.load(dc_ptr + row * K + column, mask=exists, other=0.0).to(tl.float32)
        sums_N += logits_backward(
            dc, row, column, m, exists, row % m == i, z_ptr, dz_ptr, routing_ptr, scale_ptr, inverse_N1, READ, E
        )
        if READ.num_carry:
            column = row_N[None, :]
            exists = (row < n) & (column < n)
            dc = tl.load(dc_ptr + row * K + column, mask=exists, other=0.0).to(tl.float32)
            sums_N += logits_backward(
                dc, row, column, m, exists, row == column, z_ptr, dz_ptr, routing_ptr, scale_ptr, inverse_N1, READ, E
            )
        shrink_N1 = -sums_N[:, None] * inverse_N1 * inverse_N1 / E
        tl.store(shrink_ptr + token * n + row, shrink_N1, mask=row < n)


@triton.jit(do_not_specialize=["end"])
def wide_stream(
    h_ptr, y_ptr, z_ptr, routing_ptr, scale_ptr,
    z_next_ptr, weight_next_ptr, routing_next_ptr, scale_next_ptr, dz_next_ptr, shrink_ptr,
    dx_ptr, dout_ptr, dh_ptr, dy_ptr, dc_ptr, end,
    WRITE: tl.constexpr, READ: tl.constexpr, E: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one token, in one walk over E. h is H', and dh its gradient, where nothing is written.

    Else H' is not loaded: shrink o H' is made of H and Y, with coefficients that are shrunk before.
    """
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    C: tl.constexpr = READ if WRITE is None else WRITE
    m: tl.constexpr = C.m
    n: tl.constexpr = C.n
    N: tl.constexpr = C.padded_n
    P: tl.constexpr = C.padded_m
    S: tl.constexpr = C.twice_m
    token = tl.program_id(0).to(tl.int64)
    h_ptr += token * (n * E)
    dh_ptr += token * (n * E)
    if dout_ptr is not None:
        dout_ptr += token * (n * E)
    row = tl.arange(0, N)
    alive = row < n
    s = tl.arange(0, S)
    i = tl.arange(0, P)
    # Rows of Y and dX beside deviations and pattern.
    twice = (s < 2 * P) & (s % P < m)
    whole: tl.constexpr = m == P and S == 2 * P

    if READ is not None:
        K: tl.constexpr = READ.columns
        dx_ptr += token * (m * E)
        if READ.dynamic:
            z_next_ptr += token * (n * K)
            dz_next_ptr += token * (n * K)
            small = s < 2 * m
            place = dz_next_ptr + row[:, None] * K
            dz_NS = tl.load(place + READ.num_carry + s[None, :], mask=alive[:, None] & small[None, :], other=0.0)
            if READ.num_carry:
                dz_NN = tl.load(place + row[None, :], mask=alive[:, None] & alive[None, :], other=0.0)
            shrink_N1 = tl.load(shrink_ptr + token * n + row, mask=alive, other=0.0)[:, None]
        read_NS = with_pattern(z_next_ptr, routing_next_ptr, scale_next_ptr, READ, True).to(dtype)
    if WRITE is not None:
        y_ptr += token * (m * E)
        dy_ptr += token * (m * E)
        dc_ptr += token * (n * C.columns)
        if C.dynamic:
            z_ptr += token * (n * C.columns)
        write_NS = with_pattern(z_ptr, routing_ptr, scale_ptr, C, False)
        write_SN = tl.trans(write_NS.to(dtype))
        dwrite_NS = tl.zeros((N, S), tl.float32)
        if C.num_carry:
            carry_NN = carry_deviations(z_ptr, routing_ptr, scale_ptr, C).to(dtype)
            dcarry_NN = tl.zeros((N, N), tl.float32)
        if READ is not None and READ.dynamic:
            shrunk_NS = (shrink_N1 * write_NS).to(dtype)
            shrunk_NN = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
            if C.num_carry:
                shrunk_NN += tl.trans(carry_NN).to(tl.float32)
            shrunk_NN = (shrink_N1 * shrunk_NN).to(dtype)

    for start in tl.range(0, end, B, num_stages=STAGES):
        g_NB = tl.zeros((N, B), tl.float32)
        if WRITE is not None:
            h_NB = chunk(h_ptr, row, alive, start, n == N, E, B)
            y_SB = chunk(y_ptr, s % P, twice, start, whole, E, B).to(dtype)
        if READ is not None:
            if READ.dynamic:
                if READ.num_carry:
                    g_NB = dot(dz_NN, chunk(weight_next_ptr, row, alive, start, n == N, E, B), g_NB)
                weight_SB = chunk(weight_next_ptr, READ.num_carry + s, small, start, 2 * m == S, E, B)
                g_NB = dot(dz_NS, weight_SB, g_NB)
                if WRITE is not None:
                    g_NB = dot(shrunk_NN, h_NB, g_NB)
                    g_NB = dot(shrunk_NS, y_SB, g_NB)
                else:
                    g_NB += shrink_N1 * chunk(h_ptr, row, alive, start, n == N, E, B).to(tl.float32)
            g_NB = dot(read_NS, chunk(dx_ptr, s % P, twice, start, whole, E, B), g_NB)
        if dout_ptr is not None:
            g_NB += chunk(dout_ptr, row, alive, start, n == N, E, B).to(tl.float32)
        if WRITE is not None:
            rounded_NB = g_NB.to(dtype)
            dwrite_NS = dot(rounded_NB, tl.trans(y_SB), dwrite_NS)
            dy_SB = dot(write_SN, rounded_NB, tl.zeros((S, B), tl.float32))
            dy_PB = tl.sum(tl.reshape(dy_SB, (S // P, P, B)), axis=0)
            store_chunk(dy_ptr, dy_PB, i, i < m, start, m == P, E, B)
            if C.num_carry:
                dcarry_NN = dot(h_NB, tl.trans(rounded_NB), dcarry_NN)
                g_NB = dot(carry_NN, rounded_NB, g_NB)
        store_chunk(dh_ptr, g_NB, row, alive, start, n == N, E, B)

    if WRITE is not None:
        place = dc_ptr + row[:, None] * C.columns
        if C.num_carry:
            tl.store(place + row[None, :], dcarry_NN.to(dtype), mask=alive[:, None] & alive[None, :])
        # Columns of Y; those beside are the same again.
        tl.store(place + C.num_carry + s[None, :], dwrite_NS.to(dtype), mask=alive[:, None] & (s < m)[None, :])
