"""Backward of a connection with 8 < n <= 32, in two kernels. See ``batched`` for how.

    gates    of the connection q that read H': dA_read = H' dX^T, then the gradients of all its logits
    stream   G = dH' + A_read dX + dz W^T + shrink o H', the whole gradient of H', which never reaches memory, and of
             the connection p that wrote H': dC = H G^T, dB^T = G Y^T, dH = A_carry G, dY = B G

dz are gradients of the product of H' with W; 1/rms of a segment, which every logit is multiplied with, makes the rest
of the gradient a multiple of H' itself: shrink. Their order is one of dependence: G needs every dz of its segment.
"""

import torch
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
from megatron_vwn.ops.kernels.device import deviation_backward
from megatron_vwn.ops.kernels.geometry import tile
from megatron_vwn.ops.kernels.launch import launch


def backward(b: Boundary) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``boundary``."""
    p, q, dc_next_TNK, shrink_TN = b.p, b.q, b.dc_next_TNK, None
    tokens, n, e = b.h_TNE.shape
    dh_TNE, dy_TME, dc_TNK, dz_next_TNK = b.gradients()
    if q:
        size = tile("batched_gates", n, b.h_TNE.device).fit(e, b.h_TNE.dtype)
        if dc_next_TNK is None:
            dc_next_TNK = b.h_TNE.new_empty(tokens, n, q.columns)
        if q.dynamic:
            shrink_TN = torch.empty_like(b.inverse_rms_TN)
        launch(
            batched_gates, triton.cdiv(tokens, size.tokens), size,
            b.read_TNE, b.dx_TME, b.z_next_TNK, b.inverse_rms_TN, q.routing_NK, q.scale_NK,
            dc_next_TNK, dz_next_TNK, shrink_TN, tokens, **constants(None, q, e, size),
            HAS_DC=b.dc_next_TNK is not None,
        )  # fmt: skip
    size = tile("batched_stream", n, b.h_TNE.device).fit(e, b.h_TNE.dtype)
    launch(
        batched_stream, triton.cdiv(tokens, size.tokens), size,
        b.h_TNE, b.y_TME, b.z_TNK, p and p.routing_NK, p and p.scale_NK,
        b.z_next_TNK, q and q.weight_KE, q and q.routing_NK, q and q.scale_NK,
        dz_next_TNK, shrink_TN, b.dx_TME, b.dout_TNE, dh_TNE, dy_TME, dc_TNK, tokens,
        **constants(p, q, e, size), HAS_DOUT=b.dout_TNE is not None,
    )  # fmt: skip
    return dh_TNE, dy_TME, dc_TNK, dz_next_TNK, dc_next_TNK


@triton.jit(do_not_specialize=["T"])
def batched_gates(
    out_ptr, dx_ptr, z_ptr, inverse_rms_ptr, routing_ptr, scale_ptr, dc_ptr, dz_ptr, shrink_ptr, T,
    TOKENS: tl.constexpr, SEGMENTS: tl.constexpr, M: tl.constexpr, E: tl.constexpr,
    N: tl.constexpr, PADDED_M: tl.constexpr, S: tl.constexpr, SMALL: tl.constexpr,
    B: tl.constexpr, STAGES: tl.constexpr,
    WRITE: tl.constexpr, CARRY: tl.constexpr, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
    READ: tl.constexpr, NEXT_CARRY: tl.constexpr, NEXT_DYNAMIC: tl.constexpr, NEXT_SIGMOID: tl.constexpr,
    HAS_DC: tl.constexpr,
):  # fmt: skip
    """dC's read columns, dz and shrink; of a dynamic connection without a dC, all of dC, zero but for the read's."""
    K: tl.constexpr = NEXT_CARRY + 2 * M
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)[:, None, None]
    alive = first + token < T
    row = tl.arange(0, N)[None, :, None]
    small = tl.arange(0, SMALL)
    stays = alive if N == SEGMENTS else alive & (row < SEGMENTS)
    is_read = (small >= M) & (small < 2 * M)
    out_ptr += first * (SEGMENTS * E)
    dx_ptr += first * (M * E)
    dc_ptr += first * (SEGMENTS * K)
    state = token * (SEGMENTS * E) + row * E
    backbone = token * (M * E) + (small - M)[None, :, None] * E
    has_dx = alive & is_read[None, :, None]
    dread = tl.zeros((TOKENS, N, SMALL), tl.float32)
    for start in tl.range(0, E, B, num_stages=STAGES):
        b = (start + tl.arange(0, B))[None, None, :]
        inside = b < E if E % B else True
        out = tl.load(out_ptr + state + b, mask=stays & inside, other=0.0)
        dx = tl.load(dx_ptr + backbone + b, mask=has_dx & inside, other=0.0)
        dread = tl.dot(out, tl.permute(dx, (0, 2, 1)), dread, input_precision="ieee")
    # Rounded as it is stored, so that dz belongs to what the sums for A and S are made of.
    dread = dread.to(dtype)
    place = token * (SEGMENTS * K) + row * K
    column = small[None, None, :]
    narrow = place + NEXT_CARRY + column
    tl.store(dc_ptr + narrow, dread, mask=stays & is_read[None, None, :])
    if NEXT_DYNAMIC:
        z_ptr += first * (SEGMENTS * K)
        dz_ptr += first * (SEGMENTS * K)
        segment = tl.arange(0, N)[None, :]
        token_row = first + tl.arange(0, TOKENS)[:, None]
        there = (token_row < T) & (segment < SEGMENTS)
        inverse_rms = tl.load(inverse_rms_ptr + token_row * SEGMENTS + segment, mask=there, other=0.0)
        inverse = (inverse_rms * E**-0.5)[:, :, None]
        exists = (column < 2 * M) & (row < SEGMENTS)
        ones = tl.where(column < M, row % M == column, row == column - M)
        if HAS_DC:
            dc = tl.load(dc_ptr + narrow, mask=stays & (column < M), other=0.0)
        else:
            dc = tl.zeros_like(dread)
            tl.store(dc_ptr + narrow, dc, mask=stays & (column < M))
        dc = tl.where(is_read[None, None, :], dread, dc).to(tl.float32)
        z = tl.load(z_ptr + narrow, mask=alive & exists, other=0.0).to(tl.float32)
        parameter = row * K + (NEXT_CARRY + column + M) % K
        dlogits = deviation_backward(dc, z, routing_ptr, scale_ptr, parameter, exists, ones, NEXT_SIGMOID)
        shrink = tl.sum(dlogits * z, axis=2)
        tl.store(dz_ptr + narrow, (dlogits * inverse).to(dtype), mask=alive & exists)
        if NEXT_CARRY:
            column = tl.arange(0, N)[None, None, :]
            square = place + column
            exists = (column < NEXT_CARRY) & (row < SEGMENTS)
            if HAS_DC:
                dc = tl.load(dc_ptr + square, mask=alive & exists, other=0.0).to(tl.float32)
                z = tl.load(z_ptr + square, mask=alive & exists, other=0.0).to(tl.float32)
                parameter = row * K + column + M
                ones = row == column
                dlogits = deviation_backward(dc, z, routing_ptr, scale_ptr, parameter, exists, ones, NEXT_SIGMOID)
                shrink += tl.sum(dlogits * z, axis=2)
                tl.store(dz_ptr + square, (dlogits * inverse).to(dtype), mask=alive & exists)
            else:
                nothing = tl.zeros((TOKENS, N, N), dtype)
                tl.store(dc_ptr + square, nothing, mask=alive & exists)
                tl.store(dz_ptr + square, nothing, mask=alive & exists)
        shrink = -shrink * inverse_rms * inverse_rms / E
        tl.store(shrink_ptr + token_row * SEGMENTS + segment, shrink, mask=there)


@triton.jit(do_not_specialize=["T"])
def batched_stream(
    h_ptr, y_ptr, z_ptr, routing_ptr, scale_ptr, z_next_ptr, weight_next_ptr, routing_next_ptr, scale_next_ptr,
    dz_next_ptr, shrink_ptr, dx_ptr, dout_ptr, dh_ptr, dy_ptr, dc_ptr, T,
    TOKENS: tl.constexpr, SEGMENTS: tl.constexpr, M: tl.constexpr, E: tl.constexpr,
    N: tl.constexpr, PADDED_M: tl.constexpr, S: tl.constexpr, SMALL: tl.constexpr,
    B: tl.constexpr, STAGES: tl.constexpr,
    WRITE: tl.constexpr, CARRY: tl.constexpr, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr,
    READ: tl.constexpr, NEXT_CARRY: tl.constexpr, NEXT_DYNAMIC: tl.constexpr, NEXT_SIGMOID: tl.constexpr,
    HAS_DOUT: tl.constexpr,
):  # fmt: skip
    """One walk over E. shrink o H' is made from H and Y, whose coefficients it is multiplied into: H' is not loaded.

    Where nothing was written h_ptr is H', and G, which is then dH, all there is.
    """
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)[:, None, None]
    alive = first + token < T
    row = tl.arange(0, N)[None, :, None]
    column = tl.arange(0, N)[None, None, :]
    small = tl.arange(0, SMALL)
    s = tl.arange(0, S)
    state = token * (SEGMENTS * E) + row * E
    twice = token * (M * E) + (s % PADDED_M)[None, :, None] * E
    # A mask that is always true would cost a register.
    stays = alive if N == SEGMENTS else alive & (row < SEGMENTS)
    has_twice = alive & ((s < 2 * PADDED_M) & (s % PADDED_M < M))[None, :, None]
    h_ptr += first * (SEGMENTS * E)
    dh_ptr += first * (SEGMENTS * E)
    if HAS_DOUT:
        dout_ptr += first * (SEGMENTS * E)

    if READ:
        dx_ptr += first * (M * E)
        NEXT_K: tl.constexpr = NEXT_CARRY + 2 * M
        if NEXT_DYNAMIC:
            z_next_ptr += first * (SEGMENTS * NEXT_K)
        read = with_pattern(
            z_next_ptr, routing_next_ptr, scale_next_ptr, alive, NEXT_CARRY + M, False,
            TOKENS, N, SEGMENTS, M, PADDED_M, S, NEXT_CARRY, NEXT_DYNAMIC, NEXT_SIGMOID,
        ).to(dtype)  # fmt: skip
    if NEXT_DYNAMIC:
        dz_next_ptr += first * (SEGMENTS * NEXT_K) + token * (SEGMENTS * NEXT_K) + row * NEXT_K
        dz_small = tl.load(
            dz_next_ptr + (NEXT_CARRY + s)[None, None, :], mask=stays & (s < 2 * M)[None, None, :], other=0.0
        )
        dz_small = to_rows(dz_small, TOKENS, N)
        if NEXT_CARRY:
            dz_carry = tl.load(dz_next_ptr + column, mask=stays & (column < NEXT_CARRY), other=0.0)
            dz_carry = to_rows(dz_carry, TOKENS, N)
        segment = tl.arange(0, N)[None, :]
        token_row = first + tl.arange(0, TOKENS)[:, None]
        there = (token_row < T) & (segment < SEGMENTS)
        shrink = tl.load(shrink_ptr + token_row * SEGMENTS + segment, mask=there, other=0.0)[:, :, None]
        kept = tl.where(row == column, shrink, 0.0)
    if WRITE:
        y_ptr += first * (M * E)
        dy_ptr += first * (M * E)
        K: tl.constexpr = CARRY + 2 * M
        dc_ptr += first * (SEGMENTS * K)
        if DYNAMIC:
            z_ptr += first * (SEGMENTS * K)
        if CARRY:
            carry = carry_coefficients(
                z_ptr, routing_ptr, scale_ptr, alive, TOKENS, N, SEGMENTS, M, CARRY, DYNAMIC, SIGMOID
            ).to(dtype)
            dcarry = tl.zeros((TOKENS, N, N), tl.float32)
        write = with_pattern(
            z_ptr, routing_ptr, scale_ptr, alive, CARRY, True,
            TOKENS, N, SEGMENTS, M, PADDED_M, S, CARRY, DYNAMIC, SIGMOID,
        )  # fmt: skip
        write_T = tl.permute(write.to(dtype), (0, 2, 1))
        dwrite = tl.zeros((TOKENS, N, SMALL), tl.float32)
        if NEXT_DYNAMIC:
            if CARRY:
                kept += shrink * tl.permute(carry, (0, 2, 1)).to(tl.float32)
            write_kept = (shrink * write).to(dtype)
        once = token * (M * E) + small[None, :, None] * E
        has_once = alive & (small < M)[None, :, None]
        i = tl.arange(0, PADDED_M)
        y_place = token * (M * E) + i[None, :, None] * E
        has_y = alive & (i < M)[None, :, None]
    if NEXT_DYNAMIC:
        kept = kept.to(dtype)

    for start in tl.range(0, E, B, num_stages=STAGES):
        channel = start + tl.arange(0, B)
        b = channel[None, None, :]
        inside = b < E if E % B else True
        if READ:
            dx = tl.load(dx_ptr + twice + b, mask=has_twice & inside, other=0.0)
        if NEXT_DYNAMIC:
            here = (channel < E)[None, :] if E % B else (channel >= 0)[None, :]
            w_place = weight_next_ptr + channel[None, :]
            if NEXT_CARRY:
                w_mask = here if N == NEXT_CARRY else here & (tl.arange(0, N) < NEXT_CARRY)[:, None]
                w_carry = tl.load(w_place + tl.arange(0, N)[:, None] * E, mask=w_mask, other=0.0)
            w_small = tl.load(w_place + (NEXT_CARRY + s)[:, None] * E, mask=here & (s < 2 * M)[:, None], other=0.0)
        if HAS_DOUT:
            dout = tl.load(dout_ptr + state + b, mask=stays & inside, other=0.0)
        h = tl.load(h_ptr + state + b, mask=stays & inside, other=0.0)
        if NEXT_DYNAMIC:
            g = tl.dot(dz_small, w_small, input_precision="ieee")
            if NEXT_CARRY:
                g = tl.dot(dz_carry, w_carry, g, input_precision="ieee")
            g = from_rows(g, TOKENS, N)
            if HAS_DOUT:
                g += dout.to(tl.float32)
            g = tl.dot(kept, h, g, input_precision="ieee")
        elif HAS_DOUT:
            g = dout.to(tl.float32)
        else:
            g = tl.zeros((TOKENS, N, B), tl.float32)
        if READ:
            g = tl.dot(read, dx, g, input_precision="ieee")
        if WRITE:
            if NEXT_DYNAMIC:
                y = tl.load(y_ptr + twice + b, mask=has_twice & inside, other=0.0).to(dtype)
                g = tl.dot(write_kept, y, g, input_precision="ieee")
            rounded = g.to(dtype)
            if CARRY:
                dcarry = tl.dot(h, tl.permute(rounded, (0, 2, 1)), dcarry, input_precision="ieee")
                dh = tl.dot(carry, rounded, g, input_precision="ieee")
            else:
                dh = g
            y = tl.load(y_ptr + once + b, mask=has_once & inside, other=0.0).to(dtype)
            dwrite = tl.dot(rounded, tl.permute(y, (0, 2, 1)), dwrite, input_precision="ieee")
            tl.store(dh_ptr + state + b, dh.to(dtype), mask=stays & inside)
            # Rows [deviations; pattern], repeated.
            dy = tl.dot(write_T, rounded, input_precision="ieee")
            dy = tl.sum(tl.reshape(dy, (TOKENS, S // PADDED_M, PADDED_M, B)), axis=1)
            tl.store(dy_ptr + y_place + b, dy.to(dy_ptr.dtype.element_ty), mask=has_y & inside)
        else:
            tl.store(dh_ptr + state + b, g.to(dtype), mask=stays & inside)

    if WRITE:
        c_place = token * (SEGMENTS * K) + row * K
        if CARRY:
            tl.store(dc_ptr + c_place + column, dcarry.to(dtype), mask=stays & (column < CARRY))
        c_place += CARRY + small[None, None, :]
        tl.store(dc_ptr + c_place, dwrite.to(dtype), mask=stays & (small < M)[None, None, :])
