"""Backward of a connection of few segments, n <= 8: of ``write``, of ``read``, or of both across a sublayer.

As in ``small_forward`` a program is one warp and one token, so nothing that only a token needs is kept in memory.

    for a chunk of channels: H' dX^T is summed, the gradient of the read's coefficients
    the next connection's gradients of coefficients are complete: those of its logits follow, and are stored for dW
    for a chunk of channels: G = dH' + A_read dX + dz W^T + shrink H', the whole gradient of H'
                             dA_carry = H G^T and dB = Y G^T are summed, dH = A_carry G and dY = B G are stored

Where n is large, G, its rows rounded, goes through the memory of dH, for some segments at a time, and one or two more
walks do the last line: a thread then keeps either the gates of the next connection, or the sums or coefficients of
this one.
"""
# ruff: noqa: RUF005  (Triton adds tuples, but knows no starred expressions)

import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.boundary import Boundary
from megatron_vwn.ops.kernels.device import deviation_backward
from megatron_vwn.ops.kernels.geometry import tile
from megatron_vwn.ops.kernels.launch import launch
from megatron_vwn.ops.kernels.vectors import (
    WARP,
    add_product,
    channels_of,
    combine,
    group_size,
    is_one,
    load_rows,
    load_scalars,
    read_coefficients,
    vector_width,
    write_coefficients,
    zeros,
)

# The most coefficients, gates and sums that are kept by a walk which does the write's and the read's part at once, by
# one which does the read's, and by one which makes both sums and gradients of the write's.
_FUSED_NUMBERS = 96
_READ_NUMBERS = 72
_WRITE_NUMBERS = 128


@triton.jit
def sum_products(
    sums, g, h_ptr, y_ptr, place, exists,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The sums for dA_carry and dB^T, [N, C + M], a thread's part of them, with those of a chunk."""
    S: tl.constexpr = C + M
    h = load_rows(h_ptr, place, exists, N if C else 0, E)
    y = load_rows(y_ptr, place, exists, M, E)
    y_channels = ()
    for i in tl.static_range(M):
        y_channels = y_channels + (channels_of(y[i], LANES, V),)
    g_channels = ()
    for j in tl.static_range(N):
        g_channels = g_channels + (channels_of(g[j], LANES, V),)
    more = ()
    for i in tl.static_range(N):
        if C:
            h_channels = channels_of(h[i], LANES, V)
            for j in tl.static_range(N):
                more = more + (add_product(sums[i * S + j], h_channels, g_channels[j], V),)
        for k in tl.static_range(M):
            more = more + (add_product(sums[i * S + C + k], g_channels[i], y_channels[k], V),)
    return more


@triton.jit
def store_gradients(
    g, write, dh_ptr, dy_ptr, place, exists, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, E: tl.constexpr
):
    """A chunk of dH = A_carry G and of dY = B G."""
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    S: tl.constexpr = C + M
    for i in tl.static_range(N):
        dh = combine(g, write, i, S, N) if C else g[i]
        tl.store(dh_ptr + i * E + place, dh.to(dtype), mask=exists)
    for i in tl.static_range(M):
        tl.store(dy_ptr + i * E + place, combine(g, write, C + i, S, N).to(dtype), mask=exists)


@triton.jit
def read_sums(
    out_ptr, dx_ptr, lane, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr
):
    """H' dX^T, [N, M], a thread's part of it."""
    B: tl.constexpr = LANES * V
    sums = zeros(N * M, LANES)
    for start in tl.range(0, E, B):
        place = start + lane
        exists = place < E if E % B else None
        out = load_rows(out_ptr, place, exists, N, E)
        dx = load_rows(dx_ptr, place, exists, M, E)
        dx_channels = ()
        for i in tl.static_range(M):
            dx_channels = dx_channels + (channels_of(dx[i], LANES, V),)
        more = ()
        for j in tl.static_range(N):
            channels = channels_of(out[j], LANES, V)
            for i in tl.static_range(M):
                more = more + (add_product(sums[j * M + i], channels, dx_channels[i], V),)
        sums = more
    return sums


@triton.jit
def gates_backward(
    dread, z_ptr, inverse_rms_ptr, routing_ptr, scale_ptr, dc_given_ptr, dc_ptr, dz_ptr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """dc of all columns and, if DYNAMIC, dz, both stored; the factors of H' in its own gradient."""
    K: tl.constexpr = C + 2 * M
    PADDED: tl.constexpr = triton.next_power_of_2(K)
    dtype: tl.constexpr = dc_ptr.dtype.element_ty
    column = tl.arange(0, PADDED)
    shrink = ()
    for j in tl.static_range(N):
        place = j * K + column
        dc = tl.zeros((PADDED,), tl.float32)
        if dc_given_ptr is not None:
            dc = tl.load(dc_given_ptr + place, mask=column < C + M, other=0.0).to(tl.float32)
        for i in tl.static_range(M):
            dc = tl.where(column == C + M + i, tl.sum(dread[j * M + i], axis=0), dc)
        dc = dc.to(dtype)
        tl.store(dc_ptr + place, dc, mask=column < K)
        if DYNAMIC:
            z = tl.load(z_ptr + place, mask=column < K, other=0.0).to(tl.float32)
            inverse_rms = tl.load(inverse_rms_ptr + j)
            parameter = j * K + (column + M) % K
            dlogits = deviation_backward(
                dc.to(tl.float32), z, routing_ptr, scale_ptr, parameter, column < K, is_one(j, column, M, C), SIGMOID
            )
            # H' enters its own norm: logits = h W tau / rms.
            shrink = shrink + (tl.sum(dlogits * z, axis=0) * (inverse_rms * inverse_rms / -E),)
            tl.store(dz_ptr + place, (dlogits * (inverse_rms * E**-0.5)).to(dtype), mask=column < K)
    return shrink


@triton.jit
def state_gradient(
    out_ptr, dout_ptr, dx_ptr, weight_ptr, shrink, read, dz, place, exists,
    FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """A chunk of the segments [FIRST, LAST) of G in fp32; K is 0 for a static connection."""
    dx = load_rows(dx_ptr, place, exists, M, E)
    if dout_ptr is not None:
        dout = load_rows(dout_ptr + FIRST * E, place, exists, LAST - FIRST, E)
    if K:
        out = load_rows(out_ptr + FIRST * E, place, exists, LAST - FIRST, E)
        weight = load_rows(weight_ptr, place, exists, K, E)
    gradients = ()
    for j in tl.static_range(LAST - FIRST):
        g = combine(dx, read, j * M, 1, M)
        if dout_ptr is not None:
            g += dout[j].to(tl.float32)
        if K:
            g += combine(weight, dz, j * K, 1, K)
            g += shrink[FIRST + j] * out[j].to(tl.float32)
        gradients = gradients + (g,)
    return gradients


@triton.jit
def store_state_gradient(
    g_ptr, out_ptr, dout_ptr, dx_ptr, weight_ptr, z_ptr, routing_ptr, scale_ptr, dz_ptr, shrink, lane,
    FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, C: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """The segments [FIRST, LAST) of G, stored."""
    B: tl.constexpr = LANES * V
    read = read_coefficients(z_ptr, routing_ptr, scale_ptr, FIRST, LAST, M, C, DYNAMIC, SIGMOID)
    dz = load_scalars(dz_ptr, FIRST * K, LAST * K)
    for start in tl.range(0, E, B):
        place = start + lane
        exists = place < E if E % B else None
        g = state_gradient(
            out_ptr, dout_ptr, dx_ptr, weight_ptr, shrink, read, dz, place, exists, FIRST, LAST, M, K, E
        )  # fmt: skip
        for j in tl.static_range(LAST - FIRST):
            tl.store(g_ptr + (FIRST + j) * E + place, g[j].to(g_ptr.dtype.element_ty), mask=exists)


@triton.jit
def small_backward(
    dh_ptr, h_ptr, y_ptr, z_ptr, routing_ptr, scale_ptr, out_ptr, z_next_ptr, inverse_rms_ptr, weight_next_ptr,
    routing_next_ptr, scale_next_ptr, dout_ptr, dx_ptr, dc_given_ptr, dy_ptr, dc_ptr, dz_next_ptr, dc_next_ptr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, C_NEXT: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr,
    V: tl.constexpr, GROUP: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr, FUSED: tl.constexpr,
    SPLIT: tl.constexpr, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr, DYNAMIC_NEXT: tl.constexpr,
    SIGMOID_NEXT: tl.constexpr,
):  # fmt: skip
    """Of one token: dh [T, N, E], dy [T, M, E], dc, dz_next and dc_next [T, N, K].

    C and C_NEXT as in ``small_forward``. dc's read columns are not written. ``dc_given_ptr`` has the carry and write
    columns of dc_next and ``dout_ptr`` what H' got from elsewhere; None is zero.
    """
    B: tl.constexpr = LANES * V
    S: tl.constexpr = C + M
    K: tl.constexpr = S + M
    ALL_NEXT: tl.constexpr = C_NEXT + 2 * M
    K_NEXT: tl.constexpr = ALL_NEXT if DYNAMIC_NEXT else 0
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)[:, None] * V + tl.arange(0, V)[None, :]
    dh_ptr += token * (N * E)
    if dout_ptr is not None:
        dout_ptr += token * (N * E)
    if WRITE:
        h_ptr += token * (N * E)
        y_ptr += token * (M * E)
        dy_ptr += token * (M * E)
        dc_ptr += token * (N * K)
        if DYNAMIC:
            z_ptr += token * (N * K)

    if READ:
        out_ptr += token * (N * E)
        dx_ptr += token * (M * E)
        dc_next_ptr += token * (N * ALL_NEXT)
        if dc_given_ptr is not None:
            dc_given_ptr += token * (N * ALL_NEXT)
        if DYNAMIC_NEXT:
            z_next_ptr += token * (N * ALL_NEXT)
            dz_next_ptr += token * (N * ALL_NEXT)
            inverse_rms_ptr += token * N
        dread = read_sums(out_ptr, dx_ptr, lane, M, N, E, LANES, V)
        shrink = gates_backward(
            dread, z_next_ptr, inverse_rms_ptr, routing_next_ptr, scale_next_ptr, dc_given_ptr, dc_next_ptr,
            dz_next_ptr, M, N, C_NEXT, E, DYNAMIC_NEXT, SIGMOID_NEXT,
        )  # fmt: skip
        # A thread has stored one column of dz, and needs all.
        tl.debug_barrier()
        if not FUSED:
            for first in tl.static_range(0, N, GROUP):
                store_state_gradient(
                    dh_ptr, out_ptr, dout_ptr, dx_ptr, weight_next_ptr, z_next_ptr, routing_next_ptr, scale_next_ptr,
                    dz_next_ptr, shrink, lane, first, min(first + GROUP, N), M, C_NEXT, K_NEXT, E, LANES, V,
                    DYNAMIC_NEXT, SIGMOID_NEXT,
                )  # fmt: skip
            tl.debug_barrier()

    if WRITE:
        g_ptr = dh_ptr if READ else dout_ptr
        sums = zeros(N * S, LANES)
        if SPLIT:
            for start in tl.range(0, E, B):
                place = start + lane
                exists = place < E if E % B else None
                g = load_rows(g_ptr, place, exists, N, E)
                sums = sum_products(sums, g, h_ptr, y_ptr, place, exists, M, N, C, E, LANES, V)
        write = write_coefficients(z_ptr, routing_ptr, scale_ptr, 0, N, M, N, C, DYNAMIC, SIGMOID)
        if FUSED:
            read = read_coefficients(
                z_next_ptr, routing_next_ptr, scale_next_ptr, 0, N, M, C_NEXT, DYNAMIC_NEXT, SIGMOID_NEXT
            )
            dz = load_scalars(dz_next_ptr, 0, N * K_NEXT)
        for start in tl.range(0, E, B):
            place = start + lane
            exists = place < E if E % B else None
            if FUSED:
                g = state_gradient(
                    out_ptr, dout_ptr, dx_ptr, weight_next_ptr, shrink, read, dz, place, exists, 0, N, M, K_NEXT, E
                )  # fmt: skip
            else:
                g = load_rows(g_ptr, place, exists, N, E)
            if not SPLIT:
                sums = sum_products(sums, g, h_ptr, y_ptr, place, exists, M, N, C, E, LANES, V)
            store_gradients(g, write, dh_ptr, dy_ptr, place, exists, M, N, C, E)
        PADDED: tl.constexpr = triton.next_power_of_2(S)
        column = tl.arange(0, PADDED)
        for i in tl.static_range(N):
            row = tl.zeros((PADDED,), tl.float32)
            for k in tl.static_range(S):
                row = tl.where(column == k, tl.sum(sums[i * S + k], axis=0), row)
            tl.store(dc_ptr + i * K + column, row.to(dc_ptr.dtype.element_ty), mask=column < S)


def backward(b: Boundary) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``boundary``."""
    p, q = b.p, b.q
    tokens, n, e = b.h_TNE.shape
    m = (p or q).m
    dynamic_next = q is not None and q.dynamic
    dh_TNE, dy_TME, dc_TNK, dz_next_TNK = b.gradients()
    dc_next_TNK = b.h_TNE.new_empty(tokens, n, q.columns) if q else None
    columns = q.columns if dynamic_next else 0
    written = 2 * n * (p.columns - m) if p else 0
    fused = p is not None and q is not None and written + n * (m + columns + 1) <= _FUSED_NUMBERS
    geometry = tile("small_backward", n, b.h_TNE.device)
    launch(
        small_backward, tokens, geometry,
        dh_TNE, b.h_TNE, b.y_TME, b.z_TNK, p and p.routing_NK, p and p.scale_NK, b.read_TNE if q else None,
        b.z_next_TNK, b.inverse_rms_TN, q and q.weight_KE, q and q.routing_NK, q and q.scale_NK, b.dout_TNE, b.dx_TME,
        b.dc_next_TNK, dy_TME, dc_TNK, dz_next_TNK, dc_next_TNK,
        M=m, N=n, C=p.num_carry if p else 0, C_NEXT=q.num_carry if q else 0, E=e,
        LANES=WARP * geometry.warps, V=vector_width(geometry, b.h_TNE),
        GROUP=group_size(n, m + columns + 1, _READ_NUMBERS), WRITE=p is not None, READ=q is not None,
        FUSED=fused, SPLIT=written > _WRITE_NUMBERS,
        DYNAMIC=p is not None and p.dynamic, SIGMOID=p is not None and p.sigmoid,
        DYNAMIC_NEXT=dynamic_next, SIGMOID_NEXT=q is not None and q.sigmoid,
    )  # fmt: skip
    return dh_TNE, dy_TME, dc_TNK, dz_next_TNK, dc_next_TNK
