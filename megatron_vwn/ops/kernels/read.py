"""Kernels of ``read``: X_i = H_i + sum_j dA[j, i] H_j, and its gradients.

Two walks over E: the first forms the logits, which need all channels of a segment, the second the products. The second
finds H in a cache. ``ops.kernels.device`` explains tiles and suffixes.
"""

import triton
import triton.language as tl

from megatron_vwn.ops.kernels.device import (
    add_backbone_weight,
    add_matrix,
    deviation,
    deviation_backward,
    dot,
    dot_coefficients,
    keep_block,
    load_backbone,
    load_state,
    opaque_zero,
    pattern,
    read_weight,
    squares,
    store_backbone,
    store_state,
)
from megatron_vwn.ops.kernels.input_norm import load_gradient, norm_coefficients, normalize, normed_backward


@triton.jit(do_not_specialize=["T"])
def read_forward(
    h_ptr, weight_ptr, routing_ptr, scale_ptr, x_ptr, norm_weight_ptr, inverse_ptr, T, eps, tau, norm_eps,
    G: tl.constexpr,
):  # fmt: skip
    """X [T, M, E] from H [T, N, E], or its norm and s [T] (``ops.kernels.input_norm``); a program makes one tile."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    R: tl.constexpr = G.rows
    S: tl.constexpr = G.backbone_rows
    B: tl.constexpr = G.channels
    first = tl.program_id(0) * G.tokens
    logits_RS = tl.zeros((R, S), tl.float32)
    if G.dynamic:
        squares_R = tl.zeros((R,), tl.float32)
        for start in tl.range(0, G.segment_size, B, disable_licm=True):
            h_RB = load_state(h_ptr, first, T, start, G)
            squares_R += squares(h_RB)
            logits_RS = dot(h_RB, tl.trans(read_weight(weight_ptr, first, T, start, G)), logits_RS)
        logits_RS *= (tl.rsqrt(squares_R / G.segment_size + eps) * tau)[:, None]
    mix_RS = deviation(logits_RS, "read", routing_ptr, scale_ptr, opaque_zero(first, T, 0), G).to(dtype)

    if G.normed:
        x_squares_S = tl.zeros((S,), tl.float32)
    for start in tl.range(0, G.segment_size, B, disable_licm=True):
        h_RB = load_state(h_ptr, first, T, start, G)
        # The pattern picks H_i exactly: only the deviation was rounded.
        pick_SR = tl.trans(pattern("read", opaque_zero(first, T, start), dtype, G))
        x_SB = dot(pick_SR, h_RB, tl.zeros((S, B), tl.float32))
        x_SB = dot(tl.trans(mix_RS), h_RB, x_SB)
        store_backbone(x_ptr, x_SB, first, T, start, G)
        if G.normed:
            # Rounded, as a norm of its own would find it.
            x_squares_S += squares(x_SB.to(dtype))
    if G.normed:
        normalize(x_ptr, norm_weight_ptr, inverse_ptr, x_squares_S, first, T, norm_eps, G)


@triton.jit(do_not_specialize=["T"])
def read_backward(
    h_ptr, dx_ptr, weight_ptr, routing_ptr, scale_ptr, dh_ptr, dweight_ptr, drouting_ptr, dscale_ptr,
    norm_weight_ptr, inverse_ptr, dnorm_ptr, T, eps, tau, G: tl.constexpr,
):  # fmt: skip
    """dH [T, N, E] from dX, or from the gradient of its norm, and each program's sums for the parameters.

    Programs take tiles in turn. Each has its own dweight and dnorm [M, E], drouting and dscale [R, S], so there are no
    atomics and every run gives the same bits.
    """
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    R: tl.constexpr = G.rows
    S: tl.constexpr = G.backbone_rows
    B: tl.constexpr = G.channels
    program = tl.program_id(0)
    drouting_ptr += program * R * S
    dscale_ptr += program * R * S

    for tile in tl.range(program, tl.cdiv(T, G.tokens), tl.num_programs(0), disable_licm=True, num_stages=1):
        first = tile * G.tokens
        dmix_RS = tl.zeros((R, S), tl.float32)
        logits_RS = tl.zeros((R, S), tl.float32)
        squares_R = tl.zeros((R,), tl.float32)
        if G.normed:
            gram_RR = tl.zeros((R, R), tl.float32)
        for start in tl.range(0, G.segment_size, B, disable_licm=True):
            h_RB = load_state(h_ptr, first, T, start, G)
            dx_SB = load_gradient(dx_ptr, norm_weight_ptr, first, T, start, G)
            dmix_RS = dot(h_RB, tl.trans(dx_SB), dmix_RS)
            if G.normed:
                gram_RR = dot(h_RB, tl.trans(h_RB), gram_RR)
            if G.dynamic:
                squares_R += squares(h_RB)
                logits_RS = dot(h_RB, tl.trans(read_weight(weight_ptr, first, T, start, G)), logits_RS)
        norm_R = tl.rsqrt(squares_R / G.segment_size + eps)
        logits_RS *= (norm_R * tau)[:, None]
        zero = opaque_zero(first, T, 0)
        mix_RS = deviation(logits_RS, "read", routing_ptr, scale_ptr, zero, G)
        if G.normed:
            whole_RS = mix_RS + pattern("read", zero, tl.float32, G)
            inverse, k = norm_coefficients(inverse_ptr, dmix_RS, whole_RS, first, T, zero, G)
            x_RS = dot_coefficients(gram_RR, whole_RS, tl.zeros((R, S), tl.float32), dtype)
            dmix_RS = inverse * dmix_RS - k * x_RS
            s_f_RS = (inverse * whole_RS).to(dtype)
            k_f_RS = (k / inverse * whole_RS).to(dtype)
        mix_RS = mix_RS.to(dtype)
        if G.dynamic:
            dlogits_RS, drouting_RS, dscale_RS = deviation_backward(
                dmix_RS, logits_RS, "read", routing_ptr, scale_ptr, zero, G
            )
            add_matrix(drouting_ptr, drouting_RS, zero)
            add_matrix(dscale_ptr, dscale_RS, zero)
            # H enters its own norm: logits = z tau / rms, so dH gets -(dlogits . logits) / rms^2 / E times H.
            shrink_R = -tl.sum(dlogits_RS * logits_RS, axis=1) * norm_R * norm_R / G.segment_size
            dz_RS = (dlogits_RS * (norm_R * tau)[:, None]).to(dtype)
        else:
            add_matrix(drouting_ptr, keep_block(dmix_RS, "read", zero, G), zero)

        for start in tl.range(0, G.segment_size, B, disable_licm=True):
            if G.normed:
                h_RB = load_state(h_ptr, first, T, start, G)
                dh_RB = normed_backward(
                    dx_ptr, norm_weight_ptr, dnorm_ptr, program * G.m, h_RB, s_f_RS, k_f_RS, first, T, start, G
                )
            else:
                dx_SB = load_backbone(dx_ptr, first, T, start, G)
                pick_RS = pattern("read", opaque_zero(first, T, start), dtype, G)
                dh_RB = dot(pick_RS, dx_SB, tl.zeros((R, B), tl.float32))
                dh_RB = dot(mix_RS, dx_SB, dh_RB)
            if G.dynamic:
                if not G.normed:
                    h_RB = load_state(h_ptr, first, T, start, G)
                dh_RB = dot(dz_RS, read_weight(weight_ptr, first, T, start, G), dh_RB)
                dh_RB += shrink_R[:, None] * h_RB.to(tl.float32)
                dw_SB = dot(tl.trans(dz_RS), h_RB, tl.zeros((S, B), tl.float32))
                add_backbone_weight(dweight_ptr, program * G.m, dw_SB, first, T, start, G)
            store_state(dh_ptr, dh_RB, first, T, start, G)
