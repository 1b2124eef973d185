"""What ``read`` and ``write_read`` do besides where they normalise the sublayer's input: Xn = X s o g, s = 1/rms(X).

The forward pass stores X for as long as it takes to see all of a token's channels, and s for the backward pass. X
itself is kept nowhere: it is linear in the state that was read, X = F^T H with F = pick + read deviation, so its part
in the gradients follows from the Gram matrix H H^T of each token. With u = dXn o g and k = s^3 (u . X) / D,

    dX = s u - k X          H dX^T = s H u^T - k (H H^T) F          u . X = sum of F o (H u^T)

and the last walk over E makes each chunk of s X again. Suffixes as in ``ops.kernels.device``.
"""

import triton
import triton.language as tl

from megatron_vwn.ops.kernels.device import (
    add_backbone_weight,
    dot,
    load_backbone,
    opaque_zero,
    read_weight,
    split_rows,
    store_backbone,
)


@triton.jit
def normalize(x_ptr, norm_weight_ptr, inverse_ptr, squares_S, first, T, norm_eps, G: tl.constexpr):
    """Xn in place of the X [T, M, E] that this program stored, and s [T], from the sums of squares of rows of X."""
    zero = opaque_zero(first, T, 2)
    token_S, segment_S = split_rows(G.backbone_rows, G.padded_m, zero)
    inverse_S = tl.rsqrt(of_tokens(squares_S, zero, G) / (G.m * G.segment_size) + norm_eps)
    once = (segment_S == 0) & (token_S < G.tokens) & (first + token_S < T)
    tl.store(inverse_ptr + first + token_S, inverse_S, mask=once)
    # Other threads of this program stored what is loaded next.
    tl.debug_barrier()
    for start in tl.range(0, G.segment_size, G.channels, disable_licm=True, num_stages=1):
        x_SB = load_backbone(x_ptr, first, T, start, G).to(tl.float32)
        x_SB *= inverse_S[:, None] * read_weight(norm_weight_ptr, first, T, start, G)
        tl.debug_barrier()
        store_backbone(x_ptr, x_SB, first, T, start, G)


@triton.jit
def of_tokens(values_S, zero, G: tl.constexpr):
    """The sum over each token's rows of X, at all of them."""
    token_S, _ = split_rows(G.backbone_rows, G.padded_m, zero)
    return tl.sum(tl.where(token_S[:, None] == token_S[None, :], values_S[None, :], 0.0), axis=1)


@triton.jit
def load_gradient(dx_ptr, norm_weight_ptr, first, T, start, G: tl.constexpr):
    """A chunk of dX where X is not normalised, else of u, [S, B]."""
    dx_SB = load_backbone(dx_ptr, first, T, start, G)
    if G.normed:
        dx_SB = (dx_SB.to(tl.float32) * read_weight(norm_weight_ptr, first, T, start, G)).to(dx_SB.dtype)
    return dx_SB


@triton.jit
def norm_coefficients(inverse_ptr, state_u_RS, whole_RS, first, T, zero, G: tl.constexpr):
    """s and k of each row's token, [R, 1] or numbers where a tile is one token, from H u^T and F."""
    u_x = tl.sum(state_u_RS * whole_RS, axis=1)
    if G.tokens == 1:
        inverse = tl.load(inverse_ptr + first)
        u_x = tl.sum(u_x)
    else:
        token_R, _ = split_rows(G.rows, G.padded_n, zero)
        exists = (token_R < G.tokens) & (first + token_R < T)
        inverse = tl.load(inverse_ptr + first + token_R, mask=exists, other=1.0)[:, None]
        u_x = tl.sum(tl.where(token_R[:, None] == token_R[None, :], u_x[None, :], 0.0), axis=1)[:, None]
    return inverse, inverse * inverse * inverse * u_x / (G.m * G.segment_size)


@triton.jit
def normed_backward(
    dx_ptr, norm_weight_ptr, dnorm_ptr, row, state_RB, s_f_RS, k_f_RS, first, T, start, G: tl.constexpr
):  # fmt: skip
    """A chunk of F dX, what the read adds to the gradient of its state, and the sums for g; from s F and k/s F, rounded
    to the state's dtype."""
    dtype: tl.constexpr = state_RB.dtype
    R: tl.constexpr = G.rows
    S: tl.constexpr = G.backbone_rows
    B: tl.constexpr = G.channels
    x_SB = dot(tl.trans(s_f_RS), state_RB, tl.zeros((S, B), tl.float32))
    dxn_SB = load_backbone(dx_ptr, first, T, start, G).to(tl.float32)
    add_backbone_weight(dnorm_ptr, row, dxn_SB * x_SB, first, T, start, G)
    dxn_SB *= read_weight(norm_weight_ptr, first, T, start, G)
    pulled_RB = dot(k_f_RS, (-x_SB).to(dtype), tl.zeros((R, B), tl.float32))
    return dot(s_f_RS, dxn_SB.to(dtype), pulled_RB)
