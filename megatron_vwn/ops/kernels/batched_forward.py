"""Forward of a connection with 8 < n <= 32: write, read, or both at once. See ``batched`` for how."""

import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.batched import (
    carry_coefficients,
    constants,
    from_rows,
    to_rows,
    with_pattern,
)
from megatron_vwn.ops.kernels.boundary import Boundary
from megatron_vwn.ops.kernels.device import deviation
from megatron_vwn.ops.kernels.geometry import tile
from megatron_vwn.ops.kernels.launch import launch


def forward(b: Boundary) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``boundary``."""
    p, q, tokens, e = b.p, b.q, b.h_TNE.shape[0], b.h_TNE.shape[-1]
    size = tile("batched_forward", b.h_TNE.shape[1], b.h_TNE.device).fit(e, b.h_TNE.dtype)
    out_TNE, x_TME, z_next_TNK, inverse_rms_TN = b.made()
    launch(
        batched_forward, triton.cdiv(tokens, size.tokens), size,
        b.h_TNE, b.y_TME, b.z_TNK, p and p.routing_NK, p and p.scale_NK,
        q and q.weight_KE, q and q.routing_NK, q and q.scale_NK,
        out_TNE if p else b.h_TNE, x_TME, z_next_TNK, inverse_rms_TN, tokens, q.eps if q else 0.0,
        **constants(p, q, e, size), B2=size.second_channels, STAGES2=size.second_stages,
    )  # fmt: skip
    return out_TNE, x_TME, z_next_TNK, inverse_rms_TN


@triton.jit(do_not_specialize=["T", "eps"])
def batched_forward(
    h_ptr, y_ptr, z_ptr, routing_ptr, scale_ptr, weight_next_ptr, routing_next_ptr, scale_next_ptr,
    out_ptr, x_ptr, z_next_ptr, inverse_rms_ptr, T, eps,
    TOKENS: tl.constexpr, SEGMENTS: tl.constexpr, M: tl.constexpr, E: tl.constexpr,
    N: tl.constexpr, PADDED_M: tl.constexpr, S: tl.constexpr, SMALL: tl.constexpr,
    B: tl.constexpr, STAGES: tl.constexpr, B2: tl.constexpr, STAGES2: tl.constexpr,
    WRITE: tl.constexpr, CARRY: tl.constexpr, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
    READ: tl.constexpr, NEXT_CARRY: tl.constexpr, NEXT_DYNAMIC: tl.constexpr, NEXT_SIGMOID: tl.constexpr,
):  # fmt: skip
    """The first walk over E makes H' and the sums for its logits, the second X from H', which is still in L2.

    out_ptr is H where nothing is written.
    """
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)[:, None, None]
    alive = first + token < T
    row = tl.arange(0, N)[None, :, None]
    state = token * (SEGMENTS * E) + row * E
    # A mask that is always true would cost a register.
    stays = alive if N == SEGMENTS else alive & (row < SEGMENTS)
    h_ptr += first * (SEGMENTS * E)
    out_ptr += first * (SEGMENTS * E)

    if WRITE:
        y_ptr += first * (M * E)
        if DYNAMIC:
            z_ptr += first * (SEGMENTS * (CARRY + 2 * M))
        if CARRY:
            carry = carry_coefficients(
                z_ptr, routing_ptr, scale_ptr, alive, TOKENS, N, SEGMENTS, M, CARRY, DYNAMIC, SIGMOID
            ).to(dtype)
            carry = tl.permute(carry, (0, 2, 1))
        write = with_pattern(
            z_ptr, routing_ptr, scale_ptr, alive, CARRY, True,
            TOKENS, N, SEGMENTS, M, PADDED_M, S, CARRY, DYNAMIC, SIGMOID,
        ).to(dtype)  # fmt: skip
        same = tl.where(row == tl.arange(0, N)[None, None, :], 1.0, 0.0).to(dtype)
        same = tl.broadcast_to(same, (TOKENS, N, N))
        s = tl.arange(0, S)[None, :, None]
        twice = token * (M * E) + (s % PADDED_M) * E
        has_y = alive & (s < 2 * PADDED_M) & (s % PADDED_M < M)
    if READ:
        NEXT_K: tl.constexpr = NEXT_CARRY + 2 * M
        x_ptr += first * (M * E)
        small = tl.arange(0, SMALL)
        column = tl.arange(0, N)
    if NEXT_DYNAMIC:
        z_next_ptr += first * (SEGMENTS * NEXT_K)
        squares = tl.zeros((TOKENS, N), tl.float32)
        z_small = tl.zeros((TOKENS * N, SMALL), tl.float32)
        if NEXT_CARRY:
            z_carry = tl.zeros((TOKENS * N, N), tl.float32)

    if WRITE or NEXT_DYNAMIC:
        for start in tl.range(0, E, B, num_stages=STAGES):
            channel = start + tl.arange(0, B)
            b = channel[None, None, :]
            inside = b < E if E % B else True
            out = tl.load(h_ptr + state + b, mask=stays & inside, other=0.0)
            if WRITE:
                y = tl.load(y_ptr + twice + b, mask=has_y & inside, other=0.0).to(dtype)
                acc = tl.dot(same, out, input_precision="ieee")
                if CARRY:
                    acc = tl.dot(carry, out, acc, input_precision="ieee")
                acc = tl.dot(write, y, acc, input_precision="ieee")
                out = acc.to(dtype)
                tl.store(out_ptr + state + b, out, mask=stays & inside)
            if NEXT_DYNAMIC:
                rounded = out.to(tl.float32)
                squares += tl.sum(rounded * rounded, axis=2)
                rows = to_rows(out, TOKENS, N)
                here = (channel < E)[None, :] if E % B else (channel >= 0)[None, :]
                place = weight_next_ptr + channel[None, :]
                if NEXT_CARRY:
                    w_mask = here if N == NEXT_CARRY else here & (column < NEXT_CARRY)[:, None]
                    w = tl.load(place + column[:, None] * E, mask=w_mask, other=0.0)
                    z_carry = tl.dot(rows, tl.trans(w), z_carry, input_precision="ieee")
                w_mask = here if SMALL == 2 * M else here & (small < 2 * M)[:, None]
                w = tl.load(place + (NEXT_CARRY + small)[:, None] * E, mask=w_mask, other=0.0)
                z_small = tl.dot(rows, tl.trans(w), z_small, input_precision="ieee")

    if READ:
        i = small[None, None, :] - M
        is_read = (i >= 0) & (i < M)
        ones = is_read & (row == i)
        if NEXT_DYNAMIC:
            inverse_rms = tl.rsqrt(squares / E + eps)
            segment = tl.arange(0, N)[None, :]
            token_row = first + tl.arange(0, TOKENS)[:, None]
            place = inverse_rms_ptr + token_row * SEGMENTS + segment
            tl.store(place, inverse_rms, mask=(token_row < T) & (segment < SEGMENTS))
            inverse = (inverse_rms * E**-0.5)[:, :, None]
            z_next_ptr += token * (SEGMENTS * NEXT_K) + row * NEXT_K
            if NEXT_CARRY:
                z = (from_rows(z_carry, TOKENS, N) * inverse).to(dtype)
                tl.store(z_next_ptr + column[None, None, :], z, mask=stays & (column < NEXT_CARRY)[None, None, :])
            z = (from_rows(z_small, TOKENS, N) * inverse).to(dtype)
            z_place = z_next_ptr + (NEXT_CARRY + small)[None, None, :]
            tl.store(z_place, z, mask=stays & (small < 2 * M)[None, None, :])
            # The gates of the write are computed, too; their rows of X are dropped.
            z = z.to(tl.float32)
        else:
            z = 0.0
        exists = is_read & (row < SEGMENTS)
        read = deviation(
            z, routing_next_ptr, scale_next_ptr, row * NEXT_K + i, exists, ones, NEXT_DYNAMIC, NEXT_SIGMOID
        )
        read = tl.broadcast_to(read + tl.where(ones, 1.0, 0.0), (TOKENS, N, SMALL))
        # In two parts, which together are nearly as exact as fp32: the pattern's ones are.
        high = read.to(dtype)
        low = (read - high.to(tl.float32)).to(dtype)
        both = tl.reshape(tl.permute(tl.join(high, low), (0, 3, 2, 1)), (TOKENS, 2 * SMALL, N))
        x_place = x_ptr + token * (M * E) + (small - M)[None, :, None] * E
        has_x = alive & ((small >= M) & (small < 2 * M))[None, :, None]
        if WRITE:
            # Other threads stored H' than load it.
            tl.debug_barrier()
        for start in tl.range(0, E, B2, num_stages=STAGES2):
            b = (start + tl.arange(0, B2))[None, None, :]
            inside = b < E if E % B2 else True
            out = tl.load(out_ptr + state + b, mask=stays & inside, other=0.0)
            x = tl.dot(both, out, input_precision="ieee")
            x = tl.sum(tl.reshape(x, (TOKENS, 2, SMALL, B2)), axis=1)
            tl.store(x_place + b, x.to(dtype), mask=has_x & inside)
