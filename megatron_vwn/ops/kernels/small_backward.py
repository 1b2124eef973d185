"""Backward of a connection of few segments, n <= 8: of ``write``, of ``read``, or of both across a sublayer.

As in ``small_forward`` a program is one warp and one token, so nothing that only a token needs is kept in memory.

    for a chunk of channels: H' dX^T is summed, the gradient of the read's coefficients
    the next connection's gradients of coefficients are complete: those of its logits follow, and are stored for dW
    for a chunk of channels: G = dH' + A_read dX + dz W^T + shrink H', the whole gradient of H'
                             dA_carry = H G^T and dB = Y G^T are summed, dH = A_carry G and dY = B G are stored

Where n is large, G, its rows rounded, goes through the memory of dH and a third walk does the last line: a walk then
needs either the gates of the next connection or the coefficients of this one in registers, not both.
"""
# ruff: noqa: RUF005  (Triton adds tuples, but knows no starred expressions)

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.device import deviation_backward
from megatron_vwn.ops.kernels.geometry import tile
from megatron_vwn.ops.kernels.launch import launch
from megatron_vwn.ops.kernels.tables import Prepared
from megatron_vwn.ops.kernels.vectors import (
    WARP,
    add_product,
    channels_of,
    coefficients,
    combine,
    is_one,
    load_rows,
    load_scalars,
    vector_width,
    zeros,
)

# The largest n whose write and read are done in one walk.
_FUSED_SEGMENTS = 4


@triton.jit
def load_behind(h_ptr, y_ptr, place, exists, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, E: tl.constexpr):
    """Chunks of H, which an identity carry has no use for, and of Y."""
    h = load_rows(h_ptr, place, exists, N if C else 0, E)
    return h, load_rows(y_ptr, place, exists, M, E)


@triton.jit
def write_backward(
    sums, g, h, y, write, dh_ptr, dy_ptr, place, exists,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """A chunk of dH and dY, stored, from a chunk of G; the sums for dA_carry and dB^T, [N, C + M], with its part."""
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    S: tl.constexpr = C + M
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
        dh = combine(g, write, i * S, 1, N) if C else g[i]
        tl.store(dh_ptr + i * E + place, dh.to(dtype), mask=exists)
    for i in tl.static_range(M):
        tl.store(dy_ptr + i * E + place, combine(g, write, C + i, S, N).to(dtype), mask=exists)
    return more


@triton.jit
def small_backward(
    dh_ptr, h_ptr, y_ptr, z_ptr, routing_ptr, scale_ptr, out_ptr, z_next_ptr, inverse_rms_ptr, weight_next_ptr,
    routing_next_ptr, scale_next_ptr, dout_ptr, dx_ptr, dc_given_ptr, dy_ptr, dc_ptr, dz_next_ptr, dc_next_ptr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, C_NEXT: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr,
    V: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr, FUSED: tl.constexpr, DYNAMIC: tl.constexpr,
    SIGMOID: tl.constexpr, DYNAMIC_NEXT: tl.constexpr, SIGMOID_NEXT: tl.constexpr,
):  # fmt: skip
    """Of one token: dh [T, N, E], dy [T, M, E], dc, dz_next and dc_next [T, N, K].

    C and C_NEXT as in ``small_forward``. dc's read columns are not written. ``dc_given_ptr`` has the carry and write
    columns of dc_next and ``dout_ptr`` what H' got from elsewhere; None is zero.
    """
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    B: tl.constexpr = LANES * V
    S: tl.constexpr = C + M
    K: tl.constexpr = S + M
    S_NEXT: tl.constexpr = C_NEXT + M
    K_NEXT: tl.constexpr = S_NEXT + M
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)[:, None] * V + tl.arange(0, V)[None, :]
    dh_ptr += token * (N * E)
    if dout_ptr is not None:
        dout_ptr += token * (N * E)

    if READ:
        out_ptr += token * (N * E)
        dx_ptr += token * (M * E)
        dread = zeros(N * M, LANES)
        for start in tl.range(0, E, B):
            place = start + lane
            exists = place < E if E % B else None
            state = load_rows(out_ptr, place, exists, N, E)
            dx = load_rows(dx_ptr, place, exists, M, E)
            dx_channels = ()
            for i in tl.static_range(M):
                dx_channels = dx_channels + (channels_of(dx[i], LANES, V),)
            more = ()
            for j in tl.static_range(N):
                channels = channels_of(state[j], LANES, V)
                for i in tl.static_range(M):
                    more = more + (add_product(dread[j * M + i], channels, dx_channels[i], V),)
            dread = more

        PADDED_NEXT: tl.constexpr = triton.next_power_of_2(K_NEXT)
        column = tl.arange(0, PADDED_NEXT)
        dc_next_ptr += token * (N * K_NEXT)
        if DYNAMIC_NEXT:
            z_next_ptr += token * (N * K_NEXT)
            dz_next_ptr += token * (N * K_NEXT)
        shrink = ()
        for j in tl.static_range(N):
            dc = tl.zeros((PADDED_NEXT,), tl.float32)
            if dc_given_ptr is not None:
                given = dc_given_ptr + token * (N * K_NEXT) + j * K_NEXT + column
                dc = tl.load(given, mask=column < S_NEXT, other=0.0).to(tl.float32)
            for i in tl.static_range(M):
                dc = tl.where(column == S_NEXT + i, tl.sum(dread[j * M + i], axis=0), dc)
            dc = dc.to(dtype)
            in_row = column < K_NEXT
            tl.store(dc_next_ptr + j * K_NEXT + column, dc, mask=in_row)
            if DYNAMIC_NEXT:
                z = tl.load(z_next_ptr + j * K_NEXT + column, mask=in_row, other=0.0).to(tl.float32)
                dlogits = deviation_backward(
                    dc.to(tl.float32), z, routing_next_ptr, scale_next_ptr, j * K_NEXT + (column + M) % K_NEXT, in_row,
                    is_one(j, column, M, C_NEXT), SIGMOID_NEXT,
                )  # fmt: skip
                inverse_rms = tl.load(inverse_rms_ptr + token * N + j)
                # H' enters its own norm: logits = h W tau / rms.
                shrink = shrink + (tl.sum(dlogits * z, axis=0) * (inverse_rms * inverse_rms / -E),)
                dz = (dlogits * (inverse_rms * E**-0.5)).to(dtype)
                tl.store(dz_next_ptr + j * K_NEXT + column, dz, mask=in_row)
        read = coefficients(
            z_next_ptr, routing_next_ptr, scale_next_ptr, S_NEXT, M, M, N, C_NEXT, DYNAMIC_NEXT, SIGMOID_NEXT
        )
        if DYNAMIC_NEXT:
            # Each thread has stored a column, and needs all.
            tl.debug_barrier()
            dz = load_scalars(dz_next_ptr, N * K_NEXT)

    if WRITE:
        h_ptr += token * (N * E)
        y_ptr += token * (M * E)
        dy_ptr += token * (M * E)
        if DYNAMIC:
            z_ptr += token * (N * K)
        sums = zeros(N * S, LANES)
        if FUSED:
            write = coefficients(z_ptr, routing_ptr, scale_ptr, 0, S, M, N, C, DYNAMIC, SIGMOID)

    if READ:
        for start in tl.range(0, E, B):
            place = start + lane
            exists = place < E if E % B else None
            dx = load_rows(dx_ptr, place, exists, M, E)
            if dout_ptr is not None:
                dout = load_rows(dout_ptr, place, exists, N, E)
            if DYNAMIC_NEXT:
                state = load_rows(out_ptr, place, exists, N, E)
                weight = load_rows(weight_next_ptr, place, exists, K_NEXT, E)
            if FUSED:
                h, y = load_behind(h_ptr, y_ptr, place, exists, M, N, C, E)
            gradients = ()
            for j in tl.static_range(N):
                g = combine(dx, read, j * M, 1, M)
                if dout_ptr is not None:
                    g += dout[j].to(tl.float32)
                if DYNAMIC_NEXT:
                    g += combine(weight, dz, j * K_NEXT, 1, K_NEXT)
                    g += shrink[j] * state[j].to(tl.float32)
                if FUSED:
                    gradients = gradients + (g,)
                else:
                    tl.store(dh_ptr + j * E + place, g.to(dtype), mask=exists)
            if FUSED:
                sums = write_backward(sums, gradients, h, y, write, dh_ptr, dy_ptr, place, exists, M, N, C, E, LANES, V)
    if WRITE:
        if not FUSED:
            if READ:
                tl.debug_barrier()
            write = coefficients(z_ptr, routing_ptr, scale_ptr, 0, S, M, N, C, DYNAMIC, SIGMOID)
            for start in tl.range(0, E, B):
                place = start + lane
                exists = place < E if E % B else None
                g = load_rows(dh_ptr if READ else dout_ptr, place, exists, N, E)
                h, y = load_behind(h_ptr, y_ptr, place, exists, M, N, C, E)
                sums = write_backward(sums, g, h, y, write, dh_ptr, dy_ptr, place, exists, M, N, C, E, LANES, V)
        PADDED: tl.constexpr = triton.next_power_of_2(S)
        column = tl.arange(0, PADDED)
        dc_ptr += token * (N * K)
        for i in tl.static_range(N):
            row = tl.zeros((PADDED,), tl.float32)
            for k in tl.static_range(S):
                row = tl.where(column == k, tl.sum(sums[i * S + k], axis=0), row)
            tl.store(dc_ptr + i * K + column, row.to(dtype), mask=column < S)


def backward(
    h_TNE: Tensor,
    y_TME: Tensor | None,
    z_TNK: Tensor | None,
    p: Prepared | None,
    out_TNE: Tensor | None,
    z_next_TNK: Tensor | None,
    inverse_rms_TN: Tensor | None,
    q: Prepared | None,
    dout_TNE: Tensor | None,
    dx_TME: Tensor | None,
    dc_next_TNK: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dH [T, N, E], dY [T, M, E], dc, the next connection's dz, and its dc with the read columns, all [T, N, K].

    Args:
        h_TNE, y_TME, z_TNK, p: as given to ``forward``; for a read, ``h_TNE`` is the state that is read.
        out_TNE, z_next_TNK, inverse_rms_TN, q: what ``forward`` gave, and the next connection; None for a write.
        dout_TNE: the gradient of H' but for the read's part; None is zero.
        dx_TME: the gradient of X; None for a write.
        dc_next_TNK: the gradient of the next connection's carry and write coefficients; None is zero.
    """
    t, n, e = h_TNE.shape
    m = (p or q).m
    state = h_TNE if p is None else out_TNE
    dynamic_next = q is not None and q.dynamic
    dh = torch.empty_like(h_TNE)
    dy = None if p is None else torch.empty_like(y_TME)
    dc = None if p is None else h_TNE.new_empty(t, n, p.columns)
    dc_next = None if q is None else h_TNE.new_empty(t, n, q.columns)
    dz_next = h_TNE.new_empty(t, n, q.columns) if dynamic_next else None
    geometry = tile("small_backward", n, h_TNE.device)
    launch(
        small_backward, t, geometry,
        dh, h_TNE, y_TME, z_TNK, p and p.routing_NK, p and p.scale_NK, state, z_next_TNK, inverse_rms_TN,
        q and q.weight_KE, q and q.routing_NK, q and q.scale_NK, dout_TNE, dx_TME, dc_next_TNK, dy, dc, dz_next,
        dc_next,
        M=m, N=n, C=p.num_carry if p else 0, C_NEXT=q.num_carry if q else 0, E=e,
        LANES=WARP * geometry.warps, V=vector_width(geometry, h_TNE), WRITE=p is not None, READ=q is not None,
        FUSED=p is not None and q is not None and n <= _FUSED_SEGMENTS,
        DYNAMIC=p is not None and p.dynamic, SIGMOID=p is not None and p.sigmoid,
        DYNAMIC_NEXT=dynamic_next, SIGMOID_NEXT=q is not None and q.sigmoid,
    )  # fmt: skip
    return dh, dy, dc, dz_next, dc_next
