"""The connection by torch operations: what runs where no kernel does, and under every partition.

It computes what ``ops.reference`` says with few temporaries: one product for all logits of a state, one operation for
the coefficients, batched products for the mixes. ``read``, ``write`` and ``write_read`` are one autograd function,
which keeps H, Y and the gates, because its backward pass can add every part of a gradient in place where autograd would
make a tensor of each.

The backward pass of a state H', with G its whole gradient (c: coefficients, z: logits, dz: gradient of the products
with W, rho: 1/rms):

    dc_read = H' dX^T                               the write has put the other columns into the gates' gradient
    dz      = dc o dc/dz rho / tau                  and so dA, dS, dW = H'^T dz
    G       = dH' + A_read dX + dz W^T - (sum_K (dc o dc/dz) z) rho^2 / E  o  H'
    dH      = A_carry G,  dY = B G,  dc_carry = H G^T,  dc_write = G Y^T

Under the width partition a rank holds some channels of each segment: sums over channels, and the gradient of the
coefficients, are then summed over its ranks (``ConnectionParameters.sum_over_ranks``), and nothing else is.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vwn.ops.parameters import (
    SINKHORN_KAPPA,
    ConnectionParameters,
    Gates,
    accumulation_dtype,
    initial_pattern,
)
from megatron_vwn.ops.reference import sinkhorn


def read(h_TNE: Tensor, p: ConnectionParameters) -> tuple[Tensor, Gates | None]:
    """X = A_read^T H, [T, D] in the dtype of h, and the gates for the write."""
    _, x_TME, *gates = _Boundary.apply(None, p.without_learned(), h_TNE, None, None, None, None, *p.learned)
    return x_TME.flatten(1), _as_gates(gates)


def write(h_TNE: Tensor, y_TD: Tensor, gates: Gates | None, p: ConnectionParameters) -> Tensor:
    """H' = B^T Y + A_carry^T H, [T, N, E] in the dtype of h."""
    written = (p.without_learned(), None, h_TNE, y_TD, gates and gates.logits_TNK, p.routing_NK, p.scale_NK)
    return _Boundary.apply(*written, None, None, None, None)[0]


def write_read(
    h_TNE: Tensor, y_TD: Tensor, gates: Gates | None, p: ConnectionParameters, p_next: ConnectionParameters
) -> tuple[Tensor, Tensor, Gates | None]:
    """The write of one connection and the read of the next: H', X and the next one's gates."""
    shapes = p.without_learned(), p_next.without_learned()
    written = (h_TNE, y_TD, gates and gates.logits_TNK, p.routing_NK, p.scale_NK)
    out_TNE, x_TME, *gates = _Boundary.apply(*shapes, *written, *p_next.learned)
    return out_TNE, x_TME.flatten(1), _as_gates(gates)


def logits(h_TNE: Tensor, p: ConnectionParameters) -> tuple[Tensor, Tensor]:
    """z = RMSNorm(H) W / tau of all columns, [T, N, K], and 1/rms, [T, N], of a state in the accumulation dtype."""
    tokens, n, segment = h_TNE.shape
    rows_RE = h_TNE.reshape(-1, segment)
    squares_R, z_RK = torch.linalg.vector_norm(rows_RE, dim=1).square(), rows_RE @ _scaled_weight(p, h_TNE.dtype)
    if p.sum_over_ranks is not None:
        sums = p.sum_over_ranks(torch.cat([squares_R[:, None], z_RK], dim=1))
        squares_R, z_RK = sums[:, 0], sums[:, 1:]
    whole = segment * p.ranks
    inverse_R = torch.rsqrt(squares_R / whole + p.eps)
    z_RK = z_RK.mul_((inverse_R / math.sqrt(whole))[:, None])
    return z_RK.unflatten(0, (tokens, n)), inverse_R.view(tokens, n)


def coefficients(gate_TNK: Tensor | None, p: ConnectionParameters, dtype: torch.dtype) -> Tensor:
    """[A_read | A_carry | B^T] from the ``gate`` of all columns, in this accumulation dtype.

    Returns:
        [T, N, K], or [1, N, K] for a static connection, whose gate is None.
    """
    raw_TNK = _raw(p, gate_TNK, dtype)
    if not p.doubly_stochastic:
        return raw_TNK
    read_TNM, carry_TNN, write_TNM = raw_TNK.split([p.m, p.num_carry, p.m], dim=-1)
    return torch.cat([read_TNM, _doubly_stochastic(carry_TNN), write_TNM], dim=-1)


def _without_autocast(method: Callable) -> Callable:
    @wraps(method)
    def exact(ctx, *arguments):
        device = next(argument.device.type for argument in arguments if isinstance(argument, Tensor))
        if not torch.is_autocast_enabled(device):
            return method(ctx, *arguments)
        with torch.autocast(device, enabled=False):
            return method(ctx, *arguments)

    return exact


class _Boundary(torch.autograd.Function):
    """A write by ``this`` connection, a read by ``following``, or both; None for the one that is not there."""

    # Autocast would take the products of either pass down to half precision.
    @staticmethod
    @_without_autocast
    def forward(
        ctx,
        this: ConnectionParameters | None,
        following: ConnectionParameters | None,
        h_TNE: Tensor,
        y_TD: Tensor | None,
        z_TNK: Tensor | None,
        routing_NK: Tensor | None,
        scale_NK: Tensor | None,
        *learned: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        dtype, out_TNE, x_TME, z_next_TNK, inverse_TN = h_TNE.dtype, None, None, None, None
        h = state = h_TNE.to(accumulation_dtype(dtype))
        if this is not None:
            p = this._replace(routing_NK=routing_NK, scale_NK=scale_NK)
            carry_TNN, write_TNM = _written(z_TNK, p, h)
            y_TME = y_TD.to(h.dtype).unflatten(-1, (p.m, -1))
            state = torch.bmm(carry_TNN.mT, h) if p.num_carry else h.clone()
            out_TNE = state.baddbmm_(write_TNM, y_TME).to(dtype)
            state = out_TNE.to(h.dtype)
        if following is not None:
            q = following.with_learned(learned)
            if q.dynamic:
                z_next_TNK, inverse_TN = logits(state, q)
                z_next_TNK = z_next_TNK.to(dtype)
            # The logits as they are kept: the backward pass has no others.
            x_TME = torch.bmm(_part(z_next_TNK, q, state, slice(0, q.m)).mT, state).to(dtype)
        ctx.this, ctx.following = this, following
        # Nobody but a read needs the state that was written.
        next_TNE = None if following is None else out_TNE
        ctx.save_for_backward(h_TNE, y_TD, z_TNK, routing_NK, scale_NK, next_TNE, z_next_TNK, inverse_TN, *learned)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            # Where a tensor came from an operation in place or from a conversion to its own dtype, the tracer of torch
            # 2.11 has two outputs for one and loses the gradient (tests/ops/test_connection.py).
            made = (out_TNE, x_TME, z_next_TNK, inverse_TN)
            out_TNE, x_TME, z_next_TNK, inverse_TN = (None if t is None else t.view(t.shape) for t in made)
        if inverse_TN is not None:
            ctx.mark_non_differentiable(inverse_TN)
        return out_TNE, x_TME, z_next_TNK, inverse_TN

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, dout_TNE: Tensor | None, dx_TME: Tensor | None, dc_next_TNK: Tensor | None, _inverse: None):
        h_TNE, y_TD, z_TNK, routing_NK, scale_NK, out_TNE, z_next_TNK, inverse_TN, *learned = ctx.saved_tensors
        dtype, h = h_TNE.dtype, h_TNE.to(accumulation_dtype(h_TNE.dtype))
        g_TNE = None if dout_TNE is None else dout_TNE.to(h.dtype)
        gradients = [None] * 4
        if ctx.following is not None:
            q = ctx.following.with_learned(learned)
            state = h if ctx.this is None else out_TNE.to(h.dtype)
            if dx_TME is None:
                dx_TME = state.new_zeros(()).expand(state.shape[0], q.m, state.shape[-1])
            dx_TME = dx_TME.to(h.dtype)
            g_TNE, gradients = _read_backward(state, g_TNE, dx_TME, dc_next_TNK, z_next_TNK, inverse_TN, q)
        if ctx.this is None:
            return None, None, g_TNE.to(dtype), None, None, None, None, *gradients
        p = ctx.this._replace(routing_NK=routing_NK, scale_NK=scale_NK)
        if g_TNE is None:
            g_TNE = torch.zeros_like(h)
        y_TME = y_TD.to(h.dtype).unflatten(-1, (p.m, -1))
        carry_TNN, write_TNM = _written(z_TNK, p, h)
        parts = [h.new_zeros(()).expand(*h.shape[:2], p.m), torch.bmm(g_TNE, y_TME.mT)]
        if p.num_carry:
            parts.insert(1, torch.bmm(h, g_TNE.mT))
        dc_TNK = torch.cat(parts, dim=-1)
        dh_TNE = torch.bmm(carry_TNN, g_TNE) if p.num_carry else g_TNE
        dy_TD = torch.bmm(write_TNM.mT, g_TNE).flatten(1).to(y_TD.dtype)
        drouting_NK = None
        if z_TNK is None:
            drouting_NK = _static_gradient(dc_TNK, p).to(routing_NK.dtype)
            dc_TNK = None
        else:
            dc_TNK = dc_TNK.to(z_TNK.dtype)
        return None, None, dh_TNE.to(dtype), dy_TD, dc_TNK, drouting_NK, None, *gradients


def _read_backward(
    state_TNE: Tensor,
    dout_TNE: Tensor | None,
    dx_TME: Tensor,
    dc_TNK: Tensor | None,
    z_TNK: Tensor | None,
    inverse_TN: Tensor | None,
    q: ConnectionParameters,
) -> tuple[Tensor, list[Tensor | None]]:
    # The whole gradient of a state, and those of the learned tensors of the connection that reads it.
    dtype = state_TNE.dtype
    z_TNK = None if z_TNK is None else z_TNK.to(dtype)
    gate_TNK = None if z_TNK is None else gate(z_TNK, q)
    raw_TNK = _raw(q, gate_TNK, dtype)
    read_TNM = raw_TNK[..., : q.m].expand(state_TNE.shape[0], -1, -1)
    rest_TNK = None if dc_TNK is None else dc_TNK[..., q.m :].to(dtype)
    if rest_TNK is None:
        rest_TNK = state_TNE.new_zeros(()).expand(*state_TNE.shape[:2], q.num_carry + q.m)
    dc_TNK = torch.cat([torch.bmm(state_TNE, dx_TME.mT), rest_TNK], dim=-1)
    g_TNE = torch.bmm(read_TNM, dx_TME) if dout_TNE is None else torch.baddbmm(dout_TNE, read_TNM, dx_TME)
    if z_TNK is None:
        return g_TNE, [_static_gradient(dc_TNK, q).to(q.routing_NK.dtype), None, None, None]
    if q.sum_over_ranks is not None:
        dc_TNK = q.sum_over_ranks(dc_TNK)
    dc_TNK = _before_sinkhorn(dc_TNK, raw_TNK, q)
    scale_NK = 1 + q.scale_NK.to(dtype)
    if q.gate == "tanh":
        gated_TNK = dc_TNK * gate_TNK
        drouting_NK, dscale_NK = dc_TNK.sum(0), gated_TNK.sum(0)
        dlogits_TNK = torch.addcmul(dc_TNK, gated_TNK, gate_TNK, value=-1).mul_(scale_NK)
    else:
        drouting_NK = torch.addcmul(dc_TNK, dc_TNK, gate_TNK).sum(0)
        half_TNK = dc_TNK * (0.5 * _static(q, dtype)) * (1 - gate_TNK.square())
        dscale_NK, dlogits_TNK = (half_TNK * z_TNK).sum(0), half_TNK * scale_NK
    segment = state_TNE.shape[-1] * q.ranks
    shrink_TN = torch.linalg.vecdot(dlogits_TNK, z_TNK).mul_(inverse_TN.square() / -segment)
    dz_RK = dlogits_TNK.mul_((inverse_TN / math.sqrt(segment))[..., None]).flatten(0, 1)
    g_TNE.view(-1, g_TNE.shape[-1]).addmm_(dz_RK, _scaled_weight(q, dtype).T)
    g_TNE.addcmul_(state_TNE, shrink_TN[..., None])
    dscaled_EK = (dz_RK.T @ state_TNE.reshape(-1, state_TNE.shape[-1])).T
    gradients = [
        drouting_NK,
        dscale_NK,
        dscaled_EK * q.norm_E.to(dtype)[:, None],
        torch.linalg.vecdot(dscaled_EK, q.weight_EK.to(dtype)),
    ]
    return g_TNE, [gradient.to(t.dtype) for gradient, t in zip(gradients, q.learned, strict=True)]


def _scaled_weight(p: ConnectionParameters, dtype: torch.dtype) -> Tensor:
    # (h g / rms) W = h (g o W) / rms: the norm's weight costs nothing per token.
    return p.norm_E.to(dtype)[:, None] * p.weight_EK.to(dtype)


def _static(p: ConnectionParameters, dtype: torch.dtype) -> Tensor:
    pattern_NK = initial_pattern(p.m, p.n, p.num_carry, dtype=dtype, device=p.routing_NK.device)
    return pattern_NK + p.routing_NK.to(dtype)


def gate(z_TNK: Tensor, p: ConnectionParameters, columns: slice = slice(None)) -> Tensor:
    """tanh(z), or 2 sigmoid(S z) - 1 = tanh(S z / 2), of some columns of a dynamic connection, [T, N, K']."""
    # As 1 - 2 sigmoid(-2z): on a CPU torch's sigmoid is four times as fast as its tanh. The absolute error of 1e-7 is
    # that of rounding a coefficient, and 0 at z = 0.
    scale = -2 if p.gate == "tanh" else -1 - p.scale_NK[:, columns].to(z_TNK.dtype)
    return torch.rsub((z_TNK[..., columns] * scale).sigmoid_(), 1, alpha=2)


def _raw(p: ConnectionParameters, gate_TNK: Tensor | None, dtype: torch.dtype, columns: slice = slice(None)) -> Tensor:
    # Coefficients of some columns from their gates, before the carry is made doubly stochastic.
    static_NK = _static(p, dtype)[:, columns]
    if gate_TNK is None:
        return static_NK[None]
    if p.gate == "tanh":
        return torch.addcmul(static_NK, 1 + p.scale_NK[:, columns].to(dtype), gate_TNK)
    return torch.addcmul(static_NK, static_NK, gate_TNK)


def _part(z_TNK: Tensor | None, p: ConnectionParameters, h_TNE: Tensor, columns: slice) -> Tensor:
    # Coefficients of some columns for each token of h: no more gates than are asked for.
    gate_TNK = None if z_TNK is None else gate(z_TNK.to(h_TNE.dtype), p, columns)
    return _raw(p, gate_TNK, h_TNE.dtype, columns).expand(h_TNE.shape[0], -1, -1)


def _written(z_TNK: Tensor | None, p: ConnectionParameters, h_TNE: Tensor) -> tuple[Tensor, Tensor]:
    # A_carry and B^T of each token of h.
    carry_TNN, write_TNM = _part(z_TNK, p, h_TNE, slice(p.m, None)).split([p.num_carry, p.m], dim=-1)
    return (_doubly_stochastic(carry_TNN) if p.doubly_stochastic else carry_TNN), write_TNM


def _doubly_stochastic(raw_TNN: Tensor) -> Tensor:
    identity_NN = torch.eye(raw_TNN.shape[-1], dtype=raw_TNN.dtype, device=raw_TNN.device)
    return sinkhorn((SINKHORN_KAPPA - 1) * identity_NN + raw_TNN)


def _before_sinkhorn(dc_TNK: Tensor, raw_TNK: Tensor, p: ConnectionParameters) -> Tensor:
    # The gradient of the coefficients before the carry was made doubly stochastic. The rounds of Sinkhorn are computed
    # again: 40 matrices of every token would be kept otherwise.
    if not p.doubly_stochastic:
        return dc_TNK
    carry = slice(p.m, p.m + p.n)
    with torch.enable_grad():
        raw_TNN = raw_TNK[..., carry].detach().requires_grad_()
        (dcarry_TNN,) = torch.autograd.grad(_doubly_stochastic(raw_TNN), raw_TNN, dc_TNK[..., carry])
    return torch.cat([dc_TNK[..., : p.m], dcarry_TNN, dc_TNK[..., carry.stop :]], dim=-1)


def _static_gradient(dc_TNK: Tensor, p: ConnectionParameters) -> Tensor:
    dc_1NK = dc_TNK.sum(0, keepdim=True)
    if p.sum_over_ranks is not None:
        dc_1NK = p.sum_over_ranks(dc_1NK)
    return _before_sinkhorn(dc_1NK, _raw(p, None, dc_1NK.dtype), p)[0]


def _as_gates(gates: list[Tensor | None]) -> Gates | None:
    return None if gates[0] is None else Gates(*gates)


def tile(x_TME: Tensor, n: int) -> Tensor:
    """Copy m segments to n: segment j of the result is segment j mod m of x, [T, N, E]."""
    m = x_TME.shape[-2]
    if n % m == 0:
        return x_TME.repeat(*(1,) * (x_TME.dim() - 2), n // m, 1)
    return x_TME[..., torch.arange(n, device=x_TME.device) % m, :]


def average_copies(h_TNE: Tensor, m: int) -> Tensor:
    """The mean of the copies of each backbone segment, [T, M, E]: what undoes ``tile`` for every n >= m."""
    # Half precisions are summed in fp32, without a copy of the stream in fp32 where blocks are whole.
    n, dtype = h_TNE.shape[-2], accumulation_dtype(h_TNE.dtype)
    if n % m == 0:
        return h_TNE.unflatten(-2, (-1, m)).mean(-3, dtype=dtype)
    h_TNE = h_TNE.to(dtype)
    sums_TME = sum(torch.nn.functional.pad(block, (0, 0, 0, m - block.shape[-2])) for block in h_TNE.split(m, dim=-2))
    copies_M = torch.tensor([len(range(i, n, m)) for i in range(m)], dtype=h_TNE.dtype, device=h_TNE.device)
    return sums_TME / copies_M[:, None]


def group_norm(
    h_TNE: Tensor,
    weight_NE: Tensor,
    bias_NE: Tensor | None,
    *,
    m: int,
    eps: float,
    segment_size: int,
    total: Callable[[Tensor], Tensor] = lambda partial: partial,
) -> Tensor:
    """Norm over groups of m segments, that is of D channels, in the accumulation dtype.

    RMS norm, or layer norm where a bias is given. ``total`` sums a tensor over the ranks that share the channels of a
    segment, with gradients summed likewise, because every rank's channels depend on the sum.
    """
    h_TGD = h_TNE.to(accumulation_dtype(h_TNE.dtype)).unflatten(1, (-1, m)).flatten(2)
    channels = m * segment_size
    if bias_NE is not None:
        h_TGD = h_TGD - total(h_TGD.sum(-1, keepdim=True)) / channels
    mean_square_TG = total(torch.linalg.vecdot(h_TGD, h_TGD)) / channels
    normed_TGD = h_TGD * torch.rsqrt(mean_square_TG + eps)[..., None]
    normed_TNE = normed_TGD.reshape(h_TNE.shape) * weight_NE.to(h_TGD.dtype)
    return normed_TNE if bias_NE is None else normed_TNE + bias_NE.to(h_TGD.dtype)
