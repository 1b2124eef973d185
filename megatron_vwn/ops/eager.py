"""The connection composed of ordinary torch operations: what runs where no kernel does, and under every partition.

It differs from ``ops.reference`` in two ways. Only deviations from the initial pattern are multiplied, C = H + dA^T H,
so the stream of a freshly initialised model is copied exactly and low-precision products round only the small part.
And a coefficient is computed in stages, because under the width partition a rank sees only some channels of each
segment:

    projection   sum over the rank's channels of h^2 and of h (g o W)     summed over ranks by the caller
    deviations   logits, gate and static part, minus the initial pattern  identical on all ranks
    mixing       products along the segments                              local to the channels again

``read`` and ``write`` chain the stages for a stream that is whole in its channels. ``recomputed`` has the same
functions for stream recompute: they keep their arguments alone for the backward pass, and compute the rest again.
"""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vwn.ops.parameters import (
    SINKHORN_KAPPA,
    ConnectionParameters,
    InputNorm,
    accumulation_dtype,
    initial_pattern,
)
from megatron_vwn.ops.reference import sinkhorn


def project(h_TNE: Tensor, p: ConnectionParameters, columns: slice) -> Tensor:
    """Sums over E from which the logits follow: [T, N, 1 + K'], first h^2, then h (norm o W) of the chosen columns."""
    h_TNE = h_TNE.to(accumulation_dtype(h_TNE.dtype))
    weight_EK = p.norm_E.to(h_TNE.dtype)[:, None] * p.weight_EK[:, columns].to(h_TNE.dtype)
    return torch.cat([h_TNE.square().sum(-1, keepdim=True), h_TNE @ weight_EK], dim=-1)


def deviations(sums_TNK: Tensor | None, p: ConnectionParameters, columns: slice, segment_size: int) -> Tensor:
    """Coefficients minus their initial pattern for the chosen columns.

    Args:
        sums_TNK: what ``project`` gave, summed over all channels; None for a static connection.
        p: the connection.
        columns: a slice of K.
        segment_size: E of the whole segment, in channels.

    Returns:
        [T, N, K'], or [N, K'] for a static connection, in the accumulation dtype.
    """
    return _project_carry(_unprojected(sums_TNK, p, columns, segment_size), p, columns)


def _unprojected(sums_TNK: Tensor | None, p: ConnectionParameters, columns: slice, segment_size: int) -> Tensor:
    routing_NK = p.routing_NK[:, columns]
    if sums_TNK is None:
        return routing_NK.to(accumulation_dtype(routing_NK.dtype))
    routing_NK = routing_NK.to(sums_TNK.dtype)
    scale_NK = 1 + p.scale_NK[:, columns].to(sums_TNK.dtype)
    rms_TN1 = (sums_TNK[..., :1] / segment_size + p.eps).sqrt()
    logits_TNK = sums_TNK[..., 1:] / (rms_TN1 * math.sqrt(segment_size))
    if p.gate == "tanh":
        return scale_NK * torch.tanh(logits_TNK) + routing_NK
    pattern_NK = initial_pattern(p.m, p.n, p.num_carry, dtype=sums_TNK.dtype, device=sums_TNK.device)[:, columns]
    # 2 sigmoid(z) - 1 = tanh(z / 2): the deviation of the gate from one, without cancellation.
    gate_TNK = torch.tanh(0.5 * scale_NK * logits_TNK)
    return pattern_NK * gate_TNK + routing_NK * (1 + gate_TNK)


def _project_carry(deviation_TNK: Tensor, p: ConnectionParameters, columns: slice) -> Tensor:
    """Make the carry among the chosen columns doubly stochastic, if the connection's is.

    The Sinkhorn iterations are computed again in the backward pass: 40 matrices of every token would be kept otherwise.
    """
    if not p.doubly_stochastic or columns.stop <= p.m:
        return deviation_TNK
    read, carry_TNN, write = deviation_TNK.split([p.m - columns.start, p.n, p.m], dim=-1)
    identity_NN = torch.eye(p.n, dtype=carry_TNN.dtype, device=carry_TNN.device)
    logits_TNN = SINKHORN_KAPPA * identity_NN + carry_TNN
    carry_TNN = checkpoint(sinkhorn, logits_TNN, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([read, carry_TNN - identity_NN, write], dim=-1)


def mix_read(h_TNE: Tensor, deviation_TNM: Tensor, p: ConnectionParameters) -> Tensor:
    """X_i = H_i + sum_j dA[j, i] H_j as [T, M, E], in the dtype of h."""
    h = h_TNE.to(deviation_TNM.dtype)
    return (h[:, : p.m] + deviation_TNM.transpose(-1, -2) @ h).to(h_TNE.dtype)


def mix_write(h_TNE: Tensor, y_TME: Tensor, deviation_TNK: Tensor, p: ConnectionParameters) -> Tensor:
    """H'_j = H_j + Y_(j mod m) + sum_i dA[i, j] H_i + sum_i dB[i, j] Y_i as [T, N, E], in the dtype of h."""
    h, y = h_TNE.to(deviation_TNK.dtype), y_TME.to(deviation_TNK.dtype)
    carry_TNN, write_TNM = deviation_TNK.split([p.num_carry, p.m], dim=-1)
    out = h + tile(y, p.n) + write_TNM @ y
    if p.num_carry:
        out = out + carry_TNN.transpose(-1, -2) @ h
    return out.to(h_TNE.dtype)


def read(h_TNE: Tensor, p: ConnectionParameters, input_norm: InputNorm | None = None) -> Tensor:
    """X = A_read^T H of a whole stream, or its norm: [T, D] in the dtype of h."""
    sums_TNK = project(h_TNE, p, p.read_columns) if p.dynamic else None
    x_TD = mix_read(h_TNE, deviations(sums_TNK, p, p.read_columns, h_TNE.shape[-1]), p).flatten(1)
    return x_TD if input_norm is None else normalize_input(x_TD, input_norm)


def normalize_input(x_TD: Tensor, input_norm: InputNorm) -> Tensor:
    """The norm of a sublayer's input as an operation of its own: [T, D] in the dtype of x."""
    normed_TD = torch.nn.functional.rms_norm(x_TD, x_TD.shape[-1:], input_norm.weight_D, input_norm.eps)
    return normed_TD.to(x_TD.dtype)


def write(h_TNE: Tensor, y_TD: Tensor, p: ConnectionParameters) -> Tensor:
    """H' = B^T Y + A_carry^T H of a whole stream: [T, N, E] in the dtype of h."""
    sums_TNK = project(h_TNE, p, p.write_columns) if p.dynamic else None
    deviation_TNK = deviations(sums_TNK, p, p.write_columns, h_TNE.shape[-1])
    return mix_write(h_TNE, y_TD.unflatten(-1, (p.m, -1)), deviation_TNK, p)


def write_read(
    h_TNE: Tensor,
    y_TD: Tensor,
    p: ConnectionParameters,
    p_next: ConnectionParameters,
    input_norm: InputNorm | None = None,
) -> tuple[Tensor, Tensor]:
    """The write of one connection and the read of the next."""
    next_TNE = write(h_TNE, y_TD, p)
    return next_TNE, read(next_TNE, p_next, input_norm)


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
    if h_TNE.dtype != dtype and n % m == 0:
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
    h_TGME = h_TNE.to(accumulation_dtype(h_TNE.dtype)).unflatten(1, (-1, m))
    channels = m * segment_size
    if bias_NE is not None:
        h_TGME = h_TGME - total(h_TGME.sum((-2, -1), keepdim=True)) / channels
    mean_square_TG11 = total(h_TGME.square().sum((-2, -1), keepdim=True)) / channels
    normed_TNE = (h_TGME * torch.rsqrt(mean_square_TG11 + eps)).flatten(1, 2) * weight_NE.to(h_TGME.dtype)
    return normed_TNE if bias_NE is None else normed_TNE + bias_NE.to(h_TGME.dtype)


def _recomputed(function: Callable) -> Callable:
    # Nothing in a connection is random.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


# Autograd keeps many intermediates of the functions above: the state in fp32, its squares' sums, logits, gates,
# deviations. The kernels keep H and Y; so do these. ``torch.utils.checkpoint`` fills the nodes of the same graph again,
# so gradients are the same to the bit, where an ``autograd.Function`` of our own would add the parts of dH in another
# order. On a CPU a read and a write take 40 to 80 % longer, so only who asks for stream recompute gets these. None of
# them communicates: under the width partition the caller sums over ranks between the stages.
recomputed = SimpleNamespace(
    **{
        function.__name__: _recomputed(function)
        for function in (read, write, write_read, project, deviations, mix_read, mix_write)
    }
)
