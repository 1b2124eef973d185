"""Forward of a connection of few segments, n <= 8: ``write``, ``read``, or both across a sublayer, in one kernel.

Too few rows for a tensor core, so all is vector arithmetic. A program is one warp and one token: a sum over channels
ends in five shuffles without shared memory or a barrier, and coefficients are scalars that every thread has.

    for a chunk of channels: H' = A_carry^T H + B^T Y is stored, its squares and its products with W are summed
    the sums are the logits of the next connection, stored; their read columns become coefficients
    for a chunk of channels: X = A_read^T H', which this very warp has just stored

Where the next connection is static there are no logits, and X follows in the first walk. ``device`` has the order of
columns, ``vectors`` how a token lies in a warp.
"""
# ruff: noqa: RUF005  (Triton adds tuples, but knows no starred expressions)

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.geometry import tile
from megatron_vwn.ops.kernels.launch import launch
from megatron_vwn.ops.kernels.tables import Prepared
from megatron_vwn.ops.kernels.vectors import (
    WARP,
    add_product,
    channels_of,
    coefficient,
    coefficients,
    combine,
    load_rows,
    vector_width,
    zeros,
)


@triton.jit
def small_forward(
    h_ptr, y_ptr, z_ptr, routing_ptr, scale_ptr, weight_next_ptr, routing_next_ptr, scale_next_ptr, out_ptr, x_ptr,
    z_next_ptr, inverse_rms_ptr, eps,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, C_NEXT: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr,
    V: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
    DYNAMIC_NEXT: tl.constexpr, SIGMOID_NEXT: tl.constexpr,
):  # fmt: skip
    """out [T, N, E], x [T, M, E], z_next [T, N, K] and inverse_rms [T, N], of one token.

    C and C_NEXT are the carry columns of this connection, which is not there unless WRITE, and of the next, not there
    unless READ. Without WRITE, H is the state that is read, and ``out_ptr`` points to it.
    """
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    B: tl.constexpr = LANES * V
    S: tl.constexpr = C + M
    K: tl.constexpr = S + M
    S_NEXT: tl.constexpr = C_NEXT + M
    K_NEXT: tl.constexpr = S_NEXT + M
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)[:, None] * V + tl.arange(0, V)[None, :]
    h_ptr += token * (N * E)
    out_ptr += token * (N * E)
    if WRITE:
        y_ptr += token * (M * E)
        if DYNAMIC:
            z_ptr += token * (N * K)
        write = coefficients(z_ptr, routing_ptr, scale_ptr, 0, S, M, N, C, DYNAMIC, SIGMOID)
    if READ:
        x_ptr += token * (M * E)
        if DYNAMIC_NEXT:
            sums = zeros(N * (K_NEXT + 1), LANES)
        else:
            read = coefficients(None, routing_next_ptr, None, S_NEXT, M, M, N, C_NEXT, False, False)

    for start in tl.range(0, E, B):
        place = start + lane
        exists = place < E if E % B else None
        state = load_rows(h_ptr, place, exists, N, E)
        if READ and DYNAMIC_NEXT:
            weight = load_rows(weight_next_ptr, place, exists, K_NEXT, E)
        if WRITE:
            y = load_rows(y_ptr, place, exists, M, E)
            rounded = ()
            for j in tl.static_range(N):
                value = combine(y, write, j * S + C, 1, M)
                value += combine(state, write, j, S, N) if C else state[j].to(tl.float32)
                value = value.to(dtype)
                tl.store(out_ptr + j * E + place, value, mask=exists)
                rounded = rounded + (value,)
            state = rounded
        if READ:
            if DYNAMIC_NEXT:
                split = ()
                for k in tl.static_range(K_NEXT):
                    split = split + (channels_of(weight[k], LANES, V),)
                more = ()
                for j in tl.static_range(N):
                    row = channels_of(state[j], LANES, V)
                    more = more + (add_product(sums[j * (K_NEXT + 1)], row, row, V),)
                    for k in tl.static_range(K_NEXT):
                        more = more + (add_product(sums[j * (K_NEXT + 1) + 1 + k], row, split[k], V),)
                sums = more
            else:
                for i in tl.static_range(M):
                    tl.store(x_ptr + i * E + place, combine(state, read, i, M, N).to(dtype), mask=exists)

    if READ and DYNAMIC_NEXT:
        PADDED: tl.constexpr = triton.next_power_of_2(K_NEXT)
        column = tl.arange(0, PADDED)
        z_next_ptr += token * (N * K_NEXT)
        read = ()
        for j in tl.static_range(N):
            inverse_rms = tl.rsqrt(tl.sum(sums[j * (K_NEXT + 1)], axis=0) / E + eps)
            tl.store(inverse_rms_ptr + token * N + j, inverse_rms)
            row = tl.zeros((PADDED,), tl.float32)
            for k in tl.static_range(K_NEXT):
                z = tl.sum(sums[j * (K_NEXT + 1) + 1 + k], axis=0) * (inverse_rms * E**-0.5)
                row = tl.where(column == k, z, row)
                if k >= S_NEXT:
                    z = z.to(dtype).to(tl.float32)
                    read = read + (
                        coefficient(z, routing_next_ptr, scale_next_ptr, j, k, M, C_NEXT, True, SIGMOID_NEXT),
                    )
            tl.store(z_next_ptr + j * K_NEXT + column, row.to(dtype), mask=column < K_NEXT)
        # What is loaded now may have been stored by another thread of the warp.
        tl.debug_barrier()
        for start in tl.range(0, E, B):
            place = start + lane
            exists = place < E if E % B else None
            state = load_rows(out_ptr, place, exists, N, E)
            for i in tl.static_range(M):
                tl.store(x_ptr + i * E + place, combine(state, read, i, M, N).to(dtype), mask=exists)


def forward(
    h_TNE: Tensor, y_TME: Tensor | None, z_TNK: Tensor | None, p: Prepared | None, q: Prepared | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """H' [T, N, E], X [T, M, E], the next connection's logits [T, N, K] and 1 / rms [T, N]; None for what there is not.

    Args:
        h_TNE: the state; for a read alone, the one that is read.
        y_TME: the sublayer's output; None for a read.
        z_TNK: this connection's logits; None where it is static, and for a read.
        p: this connection; None for a read.
        q: the next connection, whose X is wanted; None for a write.
    """
    t, n, e = h_TNE.shape
    m = (p or q).m
    dynamic_next = q is not None and q.dynamic
    out = h_TNE if p is None else h_TNE.new_empty(t, n, e)
    x = None if q is None else h_TNE.new_empty(t, m, e)
    z_next = h_TNE.new_empty(t, n, q.columns) if dynamic_next else None
    inverse_rms = h_TNE.new_empty(t, n, dtype=torch.float32) if dynamic_next else None
    geometry = tile("small_forward", n, h_TNE.device)
    launch(
        small_forward, t, geometry,
        h_TNE, y_TME, z_TNK, p and p.routing_NK, p and p.scale_NK, q and q.weight_KE, q and q.routing_NK,
        q and q.scale_NK, out, x, z_next, inverse_rms, q.eps if q else 0.0,
        M=m, N=n, C=p.num_carry if p else 0, C_NEXT=q.num_carry if q else 0, E=e,
        LANES=WARP * geometry.warps, V=vector_width(geometry, h_TNE), WRITE=p is not None, READ=q is not None,
        DYNAMIC=p is not None and p.dynamic, SIGMOID=p is not None and p.sigmoid,
        DYNAMIC_NEXT=dynamic_next, SIGMOID_NEXT=q is not None and q.sigmoid,
    )  # fmt: skip
    return None if p is None else out, x, z_next, inverse_rms
