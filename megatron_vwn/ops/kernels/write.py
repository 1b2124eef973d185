"""Kernels of ``write``: H'_j = H_j + Y_(j mod m) + sum_i dA[i, j] H_i + sum_i dB[i, j] Y_i, and its gradients.

Two walks over E, as in ``read_kernels``. Columns of W, routing and scale: n of the carry (none where it is the
identity), then m of the write.
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
    keep_block,
    load_backbone,
    load_state,
    opaque_zero,
    pattern,
    squares,
    store_backbone,
    store_state,
    write_weight,
)


@triton.jit
def write_logits(h_ptr, weight_ptr, first, T, eps, tau, G: tl.constexpr):
    """Logits of the carry [R, R] and of the write [R, S], and 1/rms of each row; a first walk over E."""
    R: tl.constexpr = G.rows
    S: tl.constexpr = G.backbone_rows
    logits_RR = tl.zeros((R, R), tl.float32)
    logits_RS = tl.zeros((R, S), tl.float32)
    squares_R = tl.zeros((R,), tl.float32)
    if G.dynamic:
        for start in tl.range(0, G.segment_size, G.channels, disable_licm=True):
            h_RB = load_state(h_ptr, first, T, start, G)
            squares_R += squares(h_RB)
            logits_RS = dot(h_RB, tl.trans(write_weight(weight_ptr, first, T, start, G)), logits_RS)
            if G.carry:
                logits_RR = dot(h_RB, tl.trans(carry_weight(weight_ptr, first, T, start, G)), logits_RR)
    norm_R = tl.rsqrt(squares_R / G.segment_size + eps)
    return logits_RR * (norm_R * tau)[:, None], logits_RS * (norm_R * tau)[:, None], norm_R


@triton.jit
def next_state(h_RB, y_SB, carry_RR, write_RS, zero, G: tl.constexpr):
    """A chunk of H' in fp32. H_j and the copy of Y are exact; only deviations were rounded."""
    out_RB = dot(pattern("write", zero, h_RB.dtype, G), y_SB, h_RB.to(tl.float32))
    out_RB = dot(write_RS, y_SB, out_RB)
    if G.carry:
        out_RB = dot(tl.trans(carry_RR), h_RB, out_RB)
    return out_RB


@triton.jit(do_not_specialize=["T"])
def write_forward(h_ptr, y_ptr, weight_ptr, routing_ptr, scale_ptr, out_ptr, T, eps, tau, G: tl.constexpr):
    """H' [T, N, E] from H [T, N, E] and Y [T, M, E]; a program makes one tile."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    first = tl.program_id(0) * G.tokens
    carry_RR, write_RS, _ = write_logits(h_ptr, weight_ptr, first, T, eps, tau, G)
    zero = opaque_zero(first, T, 0)
    write_RS = deviation(write_RS, "write", routing_ptr, scale_ptr, zero, G).to(dtype)
    if G.carry:
        carry_RR = deviation(carry_RR, "carry", routing_ptr, scale_ptr, zero, G)
    carry_RR = carry_RR.to(dtype)
    for start in tl.range(0, G.segment_size, G.channels, disable_licm=True):
        h_RB = load_state(h_ptr, first, T, start, G)
        y_SB = load_backbone(y_ptr, first, T, start, G).to(dtype)
        out_RB = next_state(h_RB, y_SB, carry_RR, write_RS, opaque_zero(first, T, start), G)
        store_state(out_ptr, out_RB, first, T, start, G)


@triton.jit(do_not_specialize=["T"])
def write_backward(
    h_ptr, y_ptr, dout_ptr, weight_ptr, routing_ptr, scale_ptr,
    dh_ptr, dy_ptr, dweight_ptr, drouting_ptr, dscale_ptr, T, eps, tau, G: tl.constexpr,
):  # fmt: skip
    """dH [T, N, E] and dY [T, M, E] from dH' (dout), and each program's sums for the parameters.

    drouting and dscale of a program are [R, R] for the carry, if there is one, then [R, S] for the write; dweight is
    [carry + M, E].
    """
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    R: tl.constexpr = G.rows
    S: tl.constexpr = G.backbone_rows
    B: tl.constexpr = G.channels
    BEFORE_WRITE: tl.constexpr = R * R if G.carry else 0
    program = tl.program_id(0)
    drouting_ptr += program * (BEFORE_WRITE + R * S)
    dscale_ptr += program * (BEFORE_WRITE + R * S)
    weight_row = program * (G.carry + G.m)

    for tile in tl.range(program, tl.cdiv(T, G.tokens), tl.num_programs(0), disable_licm=True, num_stages=1):
        first = tile * G.tokens
        logits_RR, logits_RS, norm_R = write_logits(h_ptr, weight_ptr, first, T, eps, tau, G)
        dcarry_RR = tl.zeros((R, R), tl.float32)
        dwrite_RS = tl.zeros((R, S), tl.float32)
        for start in tl.range(0, G.segment_size, B, disable_licm=True):
            dout_RB = load_state(dout_ptr, first, T, start, G)
            y_SB = load_backbone(y_ptr, first, T, start, G).to(dtype)
            dwrite_RS = dot(dout_RB, tl.trans(y_SB), dwrite_RS)
            if G.carry:
                dcarry_RR = dot(load_state(h_ptr, first, T, start, G), tl.trans(dout_RB), dcarry_RR)

        zero = opaque_zero(first, T, 0)
        write_RS = deviation(logits_RS, "write", routing_ptr, scale_ptr, zero, G).to(dtype)
        if G.carry:
            carry_RR = deviation(logits_RR, "carry", routing_ptr, scale_ptr, zero, G).to(dtype)
        if G.dynamic:
            dlogits_RS, drouting_RS, dscale_RS = deviation_backward(
                dwrite_RS, logits_RS, "write", routing_ptr, scale_ptr, zero, G
            )
            add_matrix(drouting_ptr + BEFORE_WRITE, drouting_RS, zero)
            add_matrix(dscale_ptr + BEFORE_WRITE, dscale_RS, zero)
            shrink_R = -tl.sum(dlogits_RS * logits_RS, axis=1) * norm_R * norm_R / G.segment_size
            dz_RS = (dlogits_RS * (norm_R * tau)[:, None]).to(dtype)
            if G.carry:
                dlogits_RR, drouting_RR, dscale_RR = deviation_backward(
                    dcarry_RR, logits_RR, "carry", routing_ptr, scale_ptr, zero, G
                )
                add_matrix(drouting_ptr, drouting_RR, zero)
                add_matrix(dscale_ptr, dscale_RR, zero)
                shrink_R -= tl.sum(dlogits_RR * logits_RR, axis=1) * norm_R * norm_R / G.segment_size
                dz_RR = (dlogits_RR * (norm_R * tau)[:, None]).to(dtype)
        else:
            add_matrix(drouting_ptr + BEFORE_WRITE, keep_block(dwrite_RS, "write", zero, G), zero)
            if G.carry:
                add_matrix(drouting_ptr, keep_block(dcarry_RR, "carry", zero, G), zero)

        for start in tl.range(0, G.segment_size, B, disable_licm=True):
            dout_RB = load_state(dout_ptr, first, T, start, G)
            copy_SR = tl.trans(pattern("write", opaque_zero(first, T, start), dtype, G))
            dy_SB = dot(copy_SR, dout_RB, tl.zeros((S, B), tl.float32))
            store_backbone(dy_ptr, dot(tl.trans(write_RS), dout_RB, dy_SB), first, T, start, G)
            dh_RB = dout_RB.to(tl.float32)
            if G.carry:
                dh_RB = dot(carry_RR, dout_RB, dh_RB)
            if G.dynamic:
                h_RB = load_state(h_ptr, first, T, start, G)
                dh_RB = dot(dz_RS, write_weight(weight_ptr, first, T, start, G), dh_RB)
                dh_RB += shrink_R[:, None] * h_RB.to(tl.float32)
                dw_SB = dot(tl.trans(dz_RS), h_RB, tl.zeros((S, B), tl.float32))
                add_backbone_weight(dweight_ptr, weight_row + G.carry, dw_SB, first, T, start, G)
                if G.carry:
                    dh_RB = dot(dz_RR, carry_weight(weight_ptr, first, T, start, G), dh_RB)
                    dw_RB = dot(tl.trans(dz_RR), h_RB, tl.zeros((R, B), tl.float32))
                    add_state_weight(dweight_ptr, weight_row, dw_RB, first, T, start, G)
            store_state(dh_ptr, dh_RB, first, T, start, G)
