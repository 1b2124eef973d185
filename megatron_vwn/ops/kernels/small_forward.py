"""Forward of a connection of few segments, n <= 8: ``write``, ``read``, or both across a sublayer, in one kernel.

Too few rows for a tensor core, so all is vector arithmetic. A program is one warp and one token: a sum over channels
ends in five shuffles without shared memory or a barrier, and coefficients are scalars that every thread has.

    for a chunk of channels: H' = A_carry^T H + B^T Y is stored, its squares and its products with W are summed
    the sums are the logits of the next connection, stored; their read columns become coefficients
    for a chunk of channels: X = A_read^T H', which this very warp has just stored

Where n is large, the first walk is done for some segments of H' at a time, so that what a thread keeps stays in
registers. ``device`` has the order of columns, ``vectors`` how a token lies in a warp.
"""
# ruff: noqa: RUF005  (Triton adds tuples, but knows no starred expressions)

import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.boundary import Boundary
from megatron_vwn.ops.kernels.geometry import tile
from megatron_vwn.ops.kernels.launch import launch
from megatron_vwn.ops.kernels.vectors import (
    WARP,
    add_product,
    channels_of,
    coefficient,
    combine,
    group_size,
    load_rows,
    read_coefficients,
    vector_width,
    write_coefficients,
    zeros,
)

# Registers for coefficients, sums and chunks of the columns of W, beside the rows of a chunk.
_NUMBERS = 190


@triton.jit
def write_and_project(
    h_ptr, y_ptr, out_ptr, weight_next_ptr, write, lane,
    FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, K_NEXT: tl.constexpr,
    E: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Segments [FIRST, LAST) of H', stored, if WRITE, else of H as they are; of each, if K_NEXT, the sums over E of its
    squares and of its products with the K_NEXT columns of W, a thread's part of them."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    S: tl.constexpr = C + M
    B: tl.constexpr = LANES * V
    sums = zeros((LAST - FIRST) * (K_NEXT + 1), LANES)
    for start in tl.range(0, E, B):
        place = start + lane
        exists = place < E if E % B else None
        weight = load_rows(weight_next_ptr, place, exists, K_NEXT, E)
        if WRITE:
            state = load_rows(h_ptr, place, exists, N, E)
            y = load_rows(y_ptr, place, exists, M, E)
            rows = ()
            for j in tl.static_range(FIRST, LAST):
                value = combine(y, write, (j - FIRST) * S + C, 1, M)
                value += combine(state, write, (j - FIRST) * S, 1, N) if C else state[j].to(tl.float32)
                value = value.to(dtype)
                tl.store(out_ptr + j * E + place, value, mask=exists)
                rows = rows + (value,)
        else:
            rows = load_rows(h_ptr + FIRST * E, place, exists, LAST - FIRST, E)
        if K_NEXT:
            columns = ()
            for k in tl.static_range(K_NEXT):
                columns = columns + (channels_of(weight[k], LANES, V),)
            more = ()
            for j in tl.static_range(LAST - FIRST):
                row = channels_of(rows[j], LANES, V)
                more = more + (add_product(sums[j * (K_NEXT + 1)], row, row, V),)
                for k in tl.static_range(K_NEXT):
                    more = more + (add_product(sums[j * (K_NEXT + 1) + 1 + k], row, columns[k], V),)
            sums = more
    return sums


@triton.jit
def gates(
    sums, routing_ptr, scale_ptr, z_ptr, inverse_rms_ptr, eps,
    FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, C: tl.constexpr, E: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Logits and 1 / rms of some segments from their sums, stored; the read coefficients of the logits as stored."""
    K: tl.constexpr = C + 2 * M
    PADDED: tl.constexpr = triton.next_power_of_2(K)
    column = tl.arange(0, PADDED)
    read = ()
    for j in tl.static_range(FIRST, LAST):
        inverse_rms = tl.rsqrt(tl.sum(sums[(j - FIRST) * (K + 1)], axis=0) / E + eps)
        tl.store(inverse_rms_ptr + j, inverse_rms)
        row = tl.zeros((PADDED,), tl.float32)
        for k in tl.static_range(K):
            z = tl.sum(sums[(j - FIRST) * (K + 1) + 1 + k], axis=0) * (inverse_rms * E**-0.5)
            row = tl.where(column == k, z, row)
            if k >= C + M:
                z = z.to(z_ptr.dtype.element_ty).to(tl.float32)
                read = read + (coefficient(z, routing_ptr, scale_ptr, j, k, M, C, True, SIGMOID),)
        tl.store(z_ptr + j * K + column, row.to(z_ptr.dtype.element_ty), mask=column < K)
    return read


@triton.jit
def small_forward(
    h_ptr, y_ptr, z_ptr, routing_ptr, scale_ptr, weight_next_ptr, routing_next_ptr, scale_next_ptr, out_ptr, x_ptr,
    z_next_ptr, inverse_rms_ptr, eps,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, C_NEXT: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr,
    V: tl.constexpr, GROUP: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr, DYNAMIC: tl.constexpr,
    SIGMOID: tl.constexpr, DYNAMIC_NEXT: tl.constexpr, SIGMOID_NEXT: tl.constexpr,
):  # fmt: skip
    """out [T, N, E], x [T, M, E], z_next [T, N, K] and inverse_rms [T, N], of one token.

    C and C_NEXT are the carry columns of this connection, which is not there unless WRITE, and of the next, not there
    unless READ. Without WRITE, H is the state that is read, and ``out_ptr`` points to it.
    """
    K_NEXT: tl.constexpr = C_NEXT + 2 * M if DYNAMIC_NEXT else 0
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)[:, None] * V + tl.arange(0, V)[None, :]
    h_ptr += token * (N * E)
    out_ptr += token * (N * E)
    if WRITE:
        y_ptr += token * (M * E)
        if DYNAMIC:
            z_ptr += token * (N * (C + 2 * M))
    if DYNAMIC_NEXT:
        z_next_ptr += token * (N * K_NEXT)
        inverse_rms_ptr += token * N

    read = ()
    if WRITE or DYNAMIC_NEXT:
        for first in tl.static_range(0, N, GROUP):
            write = ()
            if WRITE:
                write = write_coefficients(
                    z_ptr, routing_ptr, scale_ptr, first, min(first + GROUP, N), M, N, C, DYNAMIC, SIGMOID
                )
            sums = write_and_project(
                h_ptr, y_ptr, out_ptr, weight_next_ptr, write, lane,
                first, min(first + GROUP, N), M, N, C, K_NEXT, E, LANES, V, WRITE,
            )  # fmt: skip
            if DYNAMIC_NEXT:
                read = read + gates(
                    sums, routing_next_ptr, scale_next_ptr, z_next_ptr, inverse_rms_ptr, eps,
                    first, min(first + GROUP, N), M, C_NEXT, E, SIGMOID_NEXT,
                )  # fmt: skip
    if READ:
        if not DYNAMIC_NEXT:
            read = read_coefficients(None, routing_next_ptr, None, 0, N, M, C_NEXT, False, False)
        # What is loaded now may have been stored by another thread of the warp.
        tl.debug_barrier()
        x_ptr += token * (M * E)
        for start in tl.range(0, E, LANES * V):
            place = start + lane
            exists = place < E if E % (LANES * V) else None
            state = load_rows(out_ptr, place, exists, N, E)
            for i in tl.static_range(M):
                tl.store(x_ptr + i * E + place, combine(state, read, i, M, N).to(x_ptr.dtype.element_ty), mask=exists)


def forward(b: Boundary) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``boundary``."""
    p, q = b.p, b.q
    tokens, n, e = b.h_TNE.shape
    m = (p or q).m
    dynamic_next = q is not None and q.dynamic
    out_TNE, x_TME, z_next_TNK, inverse_rms_TN = b.made()
    columns = q.columns if dynamic_next else 0
    numbers = (p.columns - m if p else 0) + (columns + 1 if dynamic_next else 0)
    geometry = tile("small_forward", n, b.h_TNE.device)
    launch(
        small_forward, tokens, geometry,
        b.h_TNE, b.y_TME, b.z_TNK, p and p.routing_NK, p and p.scale_NK, q and q.weight_KE, q and q.routing_NK,
        q and q.scale_NK, out_TNE if p else b.h_TNE, x_TME, z_next_TNK, inverse_rms_TN, q.eps if q else 0.0,
        M=m, N=n, C=p.num_carry if p else 0, C_NEXT=q.num_carry if q else 0, E=e,
        LANES=WARP * geometry.warps, V=vector_width(geometry, b.h_TNE),
        GROUP=group_size(n, numbers, _NUMBERS - 3 * columns), WRITE=p is not None, READ=q is not None,
        DYNAMIC=p is not None and p.dynamic, SIGMOID=p is not None and p.sigmoid,
        DYNAMIC_NEXT=dynamic_next, SIGMOID_NEXT=q is not None and q.sigmoid,
    )  # fmt: skip
    return out_TNE, x_TME, z_next_TNK, inverse_rms_TN
