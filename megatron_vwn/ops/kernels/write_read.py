"""Kernels of ``write_read``: one connection's write and the next one's read, across the boundary of two sublayers.

The state between them, H', is stored once in the forward pass and rebuilt from H and Y in the backward pass. Suffixes
as in ``ops.kernels.device``; w marks the write's parameters, r those of the next read.
"""

import triton
import triton.language as tl

from megatron_vwn.ops.kernels.device import (
    add_backbone_weight,
    add_matrix,
    add_state_weight,
    carry_weight,
    deviation,
    deviation_backward,
    dot,
    dot_coefficients,
    keep_block,
    keep_matrix,
    keep_tokens,
    kept_matrix,
    load_backbone,
    load_state,
    opaque_zero,
    pattern,
    read_weight,
    squares,
    store_backbone,
    store_state,
    write_weight,
)
from megatron_vwn.ops.kernels.input_norm import load_gradient, norm_coefficients, normalize, normed_backward
from megatron_vwn.ops.kernels.write import next_state, write_logits


@triton.jit(do_not_specialize=["T"])
def write_read_forward(
    h_ptr, y_ptr, weight_w_ptr, routing_w_ptr, scale_w_ptr, weight_r_ptr, routing_r_ptr, scale_r_ptr,
    out_ptr, x_ptr, norm_weight_ptr, inverse_ptr, T, eps, tau, norm_eps, G: tl.constexpr,
):  # fmt: skip
    """H' [T, N, E] and the next X [T, M, E] from H and Y, or X's norm and s [T]; a program makes one tile."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    R: tl.constexpr = G.rows
    S: tl.constexpr = G.backbone_rows
    B: tl.constexpr = G.channels
    first = tl.program_id(0) * G.tokens
    carry_RR, write_RS, _ = write_logits(h_ptr, weight_w_ptr, first, T, eps, tau, G)
    zero = opaque_zero(first, T, 0)
    write_RS = deviation(write_RS, "write", routing_w_ptr, scale_w_ptr, zero, G).to(dtype)
    if G.carry:
        carry_RR = deviation(carry_RR, "carry", routing_w_ptr, scale_w_ptr, zero, G)
    carry_RR = carry_RR.to(dtype)

    read_RS = tl.zeros((R, S), tl.float32)
    squares_R = tl.zeros((R,), tl.float32)
    for start in tl.range(0, G.segment_size, B, disable_licm=True):
        h_RB = load_state(h_ptr, first, T, start, G)
        y_SB = load_backbone(y_ptr, first, T, start, G).to(dtype)
        # Rounded, as a read of its own would find it.
        out_RB = next_state(h_RB, y_SB, carry_RR, write_RS, opaque_zero(first, T, start), G).to(dtype)
        store_state(out_ptr, out_RB, first, T, start, G)
        if G.dynamic:
            squares_R += squares(out_RB)
            read_RS = dot(out_RB, tl.trans(read_weight(weight_r_ptr, first, T, start, G)), read_RS)
    read_RS *= (tl.rsqrt(squares_R / G.segment_size + eps) * tau)[:, None]
    read_RS = deviation(read_RS, "read", routing_r_ptr, scale_r_ptr, opaque_zero(first, T, 1), G).to(dtype)

    # Other threads of this program stored what is loaded next.
    tl.debug_barrier()
    if G.normed:
        x_squares_S = tl.zeros((S,), tl.float32)
    for start in tl.range(0, G.segment_size, B, disable_licm=True):
        out_RB = load_state(out_ptr, first, T, start, G)
        pick_SR = tl.trans(pattern("read", opaque_zero(first, T, start), dtype, G))
        x_SB = dot(pick_SR, out_RB, tl.zeros((S, B), tl.float32))
        x_SB = dot(tl.trans(read_RS), out_RB, x_SB)
        store_backbone(x_ptr, x_SB, first, T, start, G)
        if G.normed:
            x_squares_S += squares(x_SB.to(dtype))
    if G.normed:
        normalize(x_ptr, norm_weight_ptr, inverse_ptr, x_squares_S, first, T, norm_eps, G)


@triton.jit(do_not_specialize=["T"])
def write_read_backward(
    h_ptr, y_ptr, dx_ptr, dout_ptr,
    weight_w_ptr, routing_w_ptr, scale_w_ptr, weight_r_ptr, routing_r_ptr, scale_r_ptr,
    dh_ptr, dy_ptr, dweight_ptr, drouting_ptr, dscale_ptr, scratch_ptr, norm_weight_ptr, inverse_ptr, dnorm_ptr,
    T, eps, tau, G: tl.constexpr,
):  # fmt: skip
    """dH and dY from dX of the next read and dH' of everything behind it; H' and its whole gradient never in memory.

    The whole gradient of H' is, with F = pick + read deviation, z' the gradient of H' W_r and c' of the norm's share,

        G = dH' + F dX + z' W_r^T + c' H'

    but z' and c' are known only once all channels were seen, and so is what G is needed for: H G^T and G Y^T, the
    gradients of the write's coefficients. Both are therefore summed term by term,

        H G^T = H dH'^T + (H dX^T) F^T + (H W_r) z'^T + (H H'^T) c'       G Y^T likewise

    Three walks over E: the first forms the write's logits and the products without H', the second rebuilds H' and
    forms the read's logits and the other products, the last makes G chunk by chunk. What the first leaves for later
    waits in scratch memory of the program (``Geometry.scratch``), because registers do not hold it beside the second.

    Sums of a program: dweight [carry + M + M, E], the write's columns first; drouting and dscale [R, R] of the carry,
    if there is one, [R, S] of the write, [R, S] of the read.
    """
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    R: tl.constexpr = G.rows
    S: tl.constexpr = G.backbone_rows
    B: tl.constexpr = G.channels
    E: tl.constexpr = G.segment_size
    BEFORE_WRITE: tl.constexpr = R * R if G.carry else 0
    BEFORE_READ: tl.constexpr = BEFORE_WRITE + R * S
    program = tl.program_id(0)
    drouting_ptr += program * (BEFORE_READ + R * S)
    dscale_ptr += program * (BEFORE_READ + R * S)
    weight_row = program * (G.carry + 2 * G.m)
    # Places in the program's scratch memory.
    LOGITS_CARRY: tl.constexpr = 0
    DCARRY: tl.constexpr = R * R
    LOGITS_WRITE: tl.constexpr = 2 * R * R
    DWRITE: tl.constexpr = LOGITS_WRITE + R * S
    H_W: tl.constexpr = DWRITE + R * S
    W_Y: tl.constexpr = H_W + R * S
    GRAM: tl.constexpr = W_Y + S * S
    H_OUT: tl.constexpr = GRAM + R * R
    OUT_Y: tl.constexpr = H_OUT + R * R
    H_DX: tl.constexpr = OUT_Y + R * S
    DREAD: tl.constexpr = H_DX + R * S
    scratch_ptr += program * (DREAD + R * S if G.normed else GRAM)

    for tile in tl.range(program, tl.cdiv(T, G.tokens), tl.num_programs(0), disable_licm=True, num_stages=1):
        first = tile * G.tokens
        # The write's logits, and every product over E that does not need H'.
        squares_R = tl.zeros((R,), tl.float32)
        logits_RS = tl.zeros((R, S), tl.float32)
        logits_RR = tl.zeros((R, R), tl.float32)
        dwrite_RS = tl.zeros((R, S), tl.float32)
        dcarry_RR = tl.zeros((R, R), tl.float32)
        h_w_RS = tl.zeros((R, S), tl.float32)
        w_y_SS = tl.zeros((S, S), tl.float32)
        for start in tl.range(0, E, B, disable_licm=True):
            y_SB = load_backbone(y_ptr, first, T, start, G).to(dtype)
            dout_RB = load_state(dout_ptr, first, T, start, G)
            dwrite_RS = dot(dout_RB, tl.trans(y_SB), dwrite_RS)
            if G.carry or G.dynamic:
                h_RB = load_state(h_ptr, first, T, start, G)
            if G.carry:
                dcarry_RR = dot(h_RB, tl.trans(dout_RB), dcarry_RR)
            if G.dynamic:
                squares_R += squares(h_RB)
                logits_RS = dot(h_RB, tl.trans(write_weight(weight_w_ptr, first, T, start, G)), logits_RS)
                w_SB = read_weight(weight_r_ptr, first, T, start, G)
                w_y_SS = dot(w_SB, tl.trans(y_SB), w_y_SS)
                if G.carry:
                    logits_RR = dot(h_RB, tl.trans(carry_weight(weight_w_ptr, first, T, start, G)), logits_RR)
                    h_w_RS = dot(h_RB, tl.trans(w_SB), h_w_RS)
        # Kept in memory while H' is rebuilt, which needs the registers; the last tile's were all taken back.
        tl.debug_barrier()
        zero = opaque_zero(first, T, 0)
        norm_w_R = tl.rsqrt(squares_R / E + eps)
        logits_RS *= (norm_w_R * tau)[:, None]
        keep_matrix(scratch_ptr + DWRITE, dwrite_RS, zero)
        if G.carry:
            keep_matrix(scratch_ptr + DCARRY, dcarry_RR, zero)
        if G.dynamic:
            keep_matrix(scratch_ptr + LOGITS_WRITE, logits_RS, zero)
            keep_matrix(scratch_ptr + W_Y, w_y_SS, zero)
            if G.carry:
                logits_RR *= (norm_w_R * tau)[:, None]
                keep_matrix(scratch_ptr + LOGITS_CARRY, logits_RR, zero)
                keep_matrix(scratch_ptr + H_W, h_w_RS, zero)
        write_RS = deviation(logits_RS, "write", routing_w_ptr, scale_w_ptr, zero, G).to(dtype)
        carry_RR = tl.zeros((R, R), dtype)
        if G.carry:
            carry_RR = deviation(logits_RR, "carry", routing_w_ptr, scale_w_ptr, zero, G).to(dtype)

        # H' rebuilt, the read's logits from it, and the other products over E.
        squares_R = tl.zeros((R,), tl.float32)
        logits_RS = tl.zeros((R, S), tl.float32)
        dread_RS = tl.zeros((R, S), tl.float32)
        out_y_RS = tl.zeros((R, S), tl.float32)
        dx_y_SS = tl.zeros((S, S), tl.float32)
        h_out_RR = tl.zeros((R, R), tl.float32)
        h_dx_RS = tl.zeros((R, S), tl.float32)
        if G.normed:
            gram_RR = tl.zeros((R, R), tl.float32)
        for start in tl.range(0, E, B, disable_licm=True):
            h_RB = load_state(h_ptr, first, T, start, G)
            y_SB = load_backbone(y_ptr, first, T, start, G).to(dtype)
            dx_SB = load_gradient(dx_ptr, norm_weight_ptr, first, T, start, G)
            out_RB = next_state(h_RB, y_SB, carry_RR, write_RS, opaque_zero(first, T, start), G).to(dtype)
            dread_RS = dot(out_RB, tl.trans(dx_SB), dread_RS)
            dx_y_SS = dot(dx_SB, tl.trans(y_SB), dx_y_SS)
            if G.carry:
                h_dx_RS = dot(h_RB, tl.trans(dx_SB), h_dx_RS)
            if G.dynamic:
                squares_R += squares(out_RB)
                logits_RS = dot(out_RB, tl.trans(read_weight(weight_r_ptr, first, T, start, G)), logits_RS)
            if G.dynamic or G.normed:
                out_y_RS = dot(out_RB, tl.trans(y_SB), out_y_RS)
                if G.carry:
                    h_out_RR = dot(h_RB, tl.trans(out_RB), h_out_RR)
            if G.normed:
                gram_RR = dot(out_RB, tl.trans(out_RB), gram_RR)

        # Gradients of the read's coefficients, and what they add to those of the write's.
        tl.debug_barrier()
        zero = opaque_zero(first, T, 1)
        if G.normed:
            keep_matrix(scratch_ptr + GRAM, gram_RR, zero)
            tl.debug_barrier()
            zero = opaque_zero(first, T, 4)
            if G.carry:
                keep_matrix(scratch_ptr + H_OUT, h_out_RR, zero)
            tl.debug_barrier()
            zero = opaque_zero(first, T, 5)
            if G.carry:
                keep_matrix(scratch_ptr + H_DX, h_dx_RS, zero)
            keep_matrix(scratch_ptr + OUT_Y, out_y_RS, zero)
            keep_matrix(scratch_ptr + DREAD, dread_RS, zero)
            tl.debug_barrier()
            zero = opaque_zero(first, T, 6)
        norm_r_R = tl.rsqrt(squares_R / E + eps)
        logits_RS *= (norm_r_R * tau)[:, None]
        read_RS = deviation(logits_RS, "read", routing_r_ptr, scale_r_ptr, zero, G)
        whole_RS = read_RS + pattern("read", zero, tl.float32, G)
        read_RS = read_RS.to(dtype)
        if G.normed:
            # From u to dX, term by term; a zero for each, so that no two keep their addresses at a time.
            dread_RS = kept_matrix(scratch_ptr + DREAD, R, S, zero)
            inverse, k = norm_coefficients(inverse_ptr, dread_RS, whole_RS, first, T, zero, G)
            tl.debug_barrier()
            zero = opaque_zero(first, T, 7)
            x_RS = dot_coefficients(
                kept_matrix(scratch_ptr + GRAM, R, R, zero), whole_RS, tl.zeros((R, S), tl.float32), dtype
            )
            dread_RS = inverse * kept_matrix(scratch_ptr + DREAD, R, S, zero) - k * x_RS
            tl.debug_barrier()
            zero = opaque_zero(first, T, 8)
            out_y_RS = kept_matrix(scratch_ptr + OUT_Y, R, S, zero)
            x_y_SS = dot_coefficients(tl.trans(whole_RS), out_y_RS, tl.zeros((S, S), tl.float32), dtype)
            dwrite_RS = kept_matrix(scratch_ptr + DWRITE, R, S, zero)
            dwrite_RS = dot_coefficients(inverse * whole_RS, keep_tokens(dx_y_SS, zero, G), dwrite_RS, dtype)
            dwrite_RS = dot_coefficients(-k * whole_RS, keep_tokens(x_y_SS, zero, G), dwrite_RS, dtype)
            tl.debug_barrier()
            zero = opaque_zero(first, T, 9)
            if G.carry:
                h_dx_RS = kept_matrix(scratch_ptr + H_DX, R, S, zero) * inverse
                h_out_RR = kept_matrix(scratch_ptr + H_OUT, R, R, zero)
                h_dx_RS = dot_coefficients(h_out_RR, -k * whole_RS, h_dx_RS, dtype)
            s_f_RS = (inverse * whole_RS).to(dtype)
            k_f_RS = (k / inverse * whole_RS).to(dtype)
        else:
            dwrite_RS = kept_matrix(scratch_ptr + DWRITE, R, S, zero)
            dwrite_RS = dot_coefficients(whole_RS, keep_tokens(dx_y_SS, zero, G), dwrite_RS, dtype)
        if G.carry:
            dcarry_RR = dot_coefficients(h_dx_RS, tl.trans(whole_RS), tl.zeros((R, R), tl.float32), dtype)
        if G.dynamic:
            dlogits_RS, drouting_RS, dscale_RS = deviation_backward(
                dread_RS, logits_RS, "read", routing_r_ptr, scale_r_ptr, zero, G
            )
            add_matrix(drouting_ptr + BEFORE_READ, drouting_RS, zero)
            add_matrix(dscale_ptr + BEFORE_READ, dscale_RS, zero)
            shrink_r_R = -tl.sum(dlogits_RS * logits_RS, axis=1) * norm_r_R * norm_r_R / E
            dz_RS = dlogits_RS * (norm_r_R * tau)[:, None]
            w_y_SS = kept_matrix(scratch_ptr + W_Y, S, S, zero)
            dwrite_RS = dot_coefficients(dz_RS, keep_tokens(w_y_SS, zero, G), dwrite_RS, dtype)
            dwrite_RS += shrink_r_R[:, None] * out_y_RS
            if G.carry:
                h_w_RS = kept_matrix(scratch_ptr + H_W, R, S, zero)
                if G.normed:
                    tl.debug_barrier()
                    h_out_RR = kept_matrix(scratch_ptr + H_OUT, R, R, zero)
                dcarry_RR = dot_coefficients(h_w_RS, tl.trans(dz_RS), dcarry_RR, dtype) + h_out_RR * shrink_r_R[None, :]
            dz_r_RS = dz_RS.to(dtype)
        else:
            add_matrix(drouting_ptr + BEFORE_READ, keep_block(dread_RS, "read", zero, G), zero)
        if G.carry:
            add_matrix(scratch_ptr + DCARRY, dcarry_RR, zero)

        # Gradients of the write's coefficients.
        tl.debug_barrier()
        zero = opaque_zero(first, T, 2)
        if G.dynamic:
            logits_RS = kept_matrix(scratch_ptr + LOGITS_WRITE, R, S, zero)
            dlogits_RS, drouting_RS, dscale_RS = deviation_backward(
                dwrite_RS, logits_RS, "write", routing_w_ptr, scale_w_ptr, zero, G
            )
            add_matrix(drouting_ptr + BEFORE_WRITE, drouting_RS, zero)
            add_matrix(dscale_ptr + BEFORE_WRITE, dscale_RS, zero)
            if G.normed:
                write_RS = deviation(logits_RS, "write", routing_w_ptr, scale_w_ptr, zero, G).to(dtype)
            shrink_w_R = -tl.sum(dlogits_RS * logits_RS, axis=1) * norm_w_R * norm_w_R / E
            dz_w_RS = (dlogits_RS * (norm_w_R * tau)[:, None]).to(dtype)
        else:
            add_matrix(drouting_ptr + BEFORE_WRITE, keep_block(dwrite_RS, "write", zero, G), zero)

        # Gradients of the carry's coefficients.
        if G.carry:
            tl.debug_barrier()
            zero = opaque_zero(first, T, 3)
            dcarry_RR = kept_matrix(scratch_ptr + DCARRY, R, R, zero)
            if G.dynamic:
                logits_RR = kept_matrix(scratch_ptr + LOGITS_CARRY, R, R, zero)
                dlogits_RR, drouting_RR, dscale_RR = deviation_backward(
                    dcarry_RR, logits_RR, "carry", routing_w_ptr, scale_w_ptr, zero, G
                )
                add_matrix(drouting_ptr, drouting_RR, zero)
                add_matrix(dscale_ptr, dscale_RR, zero)
                if G.normed:
                    carry_RR = deviation(logits_RR, "carry", routing_w_ptr, scale_w_ptr, zero, G).to(dtype)
                shrink_w_R -= tl.sum(dlogits_RR * logits_RR, axis=1) * norm_w_R * norm_w_R / E
                dz_RR = (dlogits_RR * (norm_w_R * tau)[:, None]).to(dtype)
            else:
                add_matrix(drouting_ptr, keep_block(dcarry_RR, "carry", zero, G), zero)

        # All gradients of the stream and of W.
        for start in tl.range(0, E, B, disable_licm=True):
            if G.normed:
                h_RB = load_state(h_ptr, first, T, start, G)
                y_SB = load_backbone(y_ptr, first, T, start, G).to(dtype)
                out_RB = next_state(h_RB, y_SB, carry_RR, write_RS, opaque_zero(first, T, start), G).to(dtype)
                g_RB = normed_backward(
                    dx_ptr, norm_weight_ptr, dnorm_ptr, program * G.m, out_RB, s_f_RS, k_f_RS, first, T, start, G
                )
                g_RB += load_state(dout_ptr, first, T, start, G).to(tl.float32)
            else:
                dx_SB = load_backbone(dx_ptr, first, T, start, G)
                g_RB = load_state(dout_ptr, first, T, start, G).to(tl.float32)
                g_RB = dot(pattern("read", opaque_zero(first, T, start), dtype, G), dx_SB, g_RB)
                g_RB = dot(read_RS, dx_SB, g_RB)
                h_RB = load_state(h_ptr, first, T, start, G)
            if G.dynamic:
                if not G.normed:
                    y_SB = load_backbone(y_ptr, first, T, start, G).to(dtype)
                    out_RB = next_state(h_RB, y_SB, carry_RR, write_RS, opaque_zero(first, T, start), G).to(dtype)
                g_RB = dot(dz_r_RS, read_weight(weight_r_ptr, first, T, start, G), g_RB)
                g_RB += shrink_r_R[:, None] * out_RB.to(tl.float32)
                dw_SB = dot(tl.trans(dz_r_RS), out_RB, tl.zeros((S, B), tl.float32))
                row = weight_row + G.carry + G.m
                add_backbone_weight(dweight_ptr, row, dw_SB, first, T, start, G)
            dh_RB = g_RB
            g_RB = g_RB.to(dtype)
            copy_SR = tl.trans(pattern("write", opaque_zero(first, T, start), dtype, G))
            dy_SB = dot(tl.trans(write_RS), g_RB, dot(copy_SR, g_RB, tl.zeros((S, B), tl.float32)))
            store_backbone(dy_ptr, dy_SB, first, T, start, G)
            if G.carry:
                dh_RB = dot(carry_RR, g_RB, dh_RB)
            if G.dynamic:
                dh_RB = dot(dz_w_RS, write_weight(weight_w_ptr, first, T, start, G), dh_RB)
                dh_RB += shrink_w_R[:, None] * h_RB.to(tl.float32)
                dw_SB = dot(tl.trans(dz_w_RS), h_RB, tl.zeros((S, B), tl.float32))
                row = weight_row + G.carry
                add_backbone_weight(dweight_ptr, row, dw_SB, first, T, start, G)
                if G.carry:
                    dh_RB = dot(dz_RR, carry_weight(weight_w_ptr, first, T, start, G), dh_RB)
                    dw_RB = dot(tl.trans(dz_RR), h_RB, tl.zeros((R, B), tl.float32))
                    add_state_weight(dweight_ptr, weight_row, dw_RB, first, T, start, G)
            store_state(dh_ptr, dh_RB, first, T, start, G)
