"""The equations of the VWN paper (arXiv 2511.11238), written to be read; the oracle of every test.

Any floating dtype; half precisions are computed in fp32. Full matrices A and B are formed, nothing is fused and nothing
is saved: ``ops.eager`` and the kernels do the same with less. Shapes are explained in ``ops.parameters``.

The paper's symbols: A = [A_read, A_carry] in [n, m+n], B in [m, n], and per token
    X  = A_read^T  H      "read"       C = A_carry^T H      "carry"       H' = B^T Y + C      "write"
"""

import math

import torch
from torch import Tensor

from megatron_vwn.ops.parameters import (
    SINKHORN_ITERATIONS,
    SINKHORN_KAPPA,
    ConnectionParameters,
    accumulation_dtype,
    initial_pattern,
)


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis: the channels of each segment of H [T, N, E]."""
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight


def coefficients(h_TNE: Tensor, p: ConnectionParameters) -> Tensor:
    """[A_read | A_carry | B^T] of every token, [T, N, K].

    tanh:     S o tanh(RMSNorm(H) W / tau) + A          tau = sqrt(E)
    sigmoid:  A o 2 sigmoid(S o (RMSNorm(H) W / tau))
    static:   A
    """
    pattern_NK = initial_pattern(p.m, p.n, p.num_carry, dtype=h_TNE.dtype, device=h_TNE.device)
    static_NK = pattern_NK + p.routing_NK.to(h_TNE.dtype)
    if not p.dynamic:
        return static_NK.expand(h_TNE.shape[0], -1, -1)
    normed_TNE = rms_norm(h_TNE, p.norm_E.to(h_TNE.dtype), p.eps)
    logits_TNK = normed_TNE @ p.weight_EK.to(h_TNE.dtype) / math.sqrt(h_TNE.shape[-1])
    scale_NK = 1 + p.scale_NK.to(h_TNE.dtype)
    if p.gate == "tanh":
        return scale_NK * torch.tanh(logits_TNK) + static_NK
    return static_NK * 2 * torch.sigmoid(scale_NK * logits_TNK)


def routing(h_TNE: Tensor, p: ConnectionParameters) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's matrices of every token: A_read [T, n, m], A_carry [T, n, n] and B [T, m, n]."""
    c_TNK = coefficients(h_TNE, p)
    identity_TNN = torch.eye(p.n, dtype=h_TNE.dtype, device=h_TNE.device).expand(h_TNE.shape[0], -1, -1)
    a_read_TNM = c_TNK[..., : p.m]
    a_carry_TNN = c_TNK[..., p.m : p.m + p.n] if p.num_carry else identity_TNN
    if p.doubly_stochastic:
        a_carry_TNN = sinkhorn(SINKHORN_KAPPA * identity_TNN + (a_carry_TNN - identity_TNN))
    b_TMN = c_TNK[..., p.m + p.num_carry :].transpose(1, 2)
    return a_read_TNM, a_carry_TNN, b_TMN


def sinkhorn(logits_TNN: Tensor) -> Tensor:
    """exp(logits) with rows and columns scaled in turn to sum to one, columns last: no segment of C = A_carry^T H can
    be larger than the largest of H."""
    a_TNN = (logits_TNN - logits_TNN.amax((-2, -1), keepdim=True)).exp()
    for _ in range(SINKHORN_ITERATIONS):
        a_TNN = a_TNN / a_TNN.sum(-1, keepdim=True)
        a_TNN = a_TNN / a_TNN.sum(-2, keepdim=True)
    return a_TNN


def read(h_TNE: Tensor, p: ConnectionParameters) -> Tensor:
    """X = A_read^T H: the sublayer's input [T, D], in the dtype of h."""
    dtype = h_TNE.dtype
    h_TNE = h_TNE.to(accumulation_dtype(dtype))
    a_read_TNM, _, _ = routing(h_TNE, p)
    return (a_read_TNM.transpose(1, 2) @ h_TNE).flatten(1).to(dtype)


def write(h_TNE: Tensor, y_TD: Tensor, p: ConnectionParameters) -> Tensor:
    """H' = B^T Y + A_carry^T H: the next state [T, N, E], in the dtype of h; y is the sublayer's output [T, D]."""
    dtype = h_TNE.dtype
    h_TNE = h_TNE.to(accumulation_dtype(dtype))
    y_TME = y_TD.to(h_TNE.dtype).unflatten(-1, (p.m, h_TNE.shape[-1]))
    _, a_carry_TNN, b_TMN = routing(h_TNE, p)
    return (b_TMN.transpose(1, 2) @ y_TME + a_carry_TNN.transpose(1, 2) @ h_TNE).to(dtype)


def group_norm(h_TNE: Tensor, weight_NE: Tensor, bias_NE: Tensor | None, m: int, eps: float) -> Tensor:
    """Norm over groups of m segments, that is of D channels: RMS norm, or layer norm where a bias is given."""
    h_TGD = h_TNE.unflatten(1, (-1, m)).flatten(2)
    if bias_NE is not None:
        h_TGD = h_TGD - h_TGD.mean(-1, keepdim=True)
    normed_TGD = h_TGD * torch.rsqrt(h_TGD.pow(2).mean(-1, keepdim=True) + eps)
    scaled_TNE = normed_TGD.view_as(h_TNE) * weight_NE
    return scaled_TNE if bias_NE is None else scaled_TNE + bias_NE


def tiling_matrix(m: int, n: int, segment: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """W_expand [D', D] that copies: block (j, i) is the identity of size E where i = j mod m, else zero."""
    block_NM = (torch.arange(n)[:, None] % m == torch.arange(m)).to(dtype)
    return torch.kron(block_NM, torch.eye(segment, dtype=dtype))


def averaging_matrix(m: int, n: int, segment: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """W_reduce [D, D'] that averages the copies: the transpose of tiling, each row divided by its number of copies."""
    transposed = tiling_matrix(m, n, segment, dtype=dtype).T
    return transposed / transposed.sum(-1, keepdim=True)


def expand(x_TD: Tensor, weight_NED: Tensor | None, m: int, n: int) -> Tensor:
    """H = W_expand X as [T, N, E]; weight is the deviation of W_expand from tiling, None where it is exactly tiling."""
    segment = x_TD.shape[-1] // m
    w = tiling_matrix(m, n, segment, dtype=x_TD.dtype).to(x_TD.device)
    if weight_NED is not None:
        w = w + weight_NED.flatten(0, 1)
    return (x_TD @ w.T).unflatten(-1, (n, segment))


def reduce(h_TNE: Tensor, weight_DNE: Tensor, m: int) -> Tensor:
    """X = W_reduce H as [T, D]; weight is the deviation of W_reduce from averaging the copies."""
    _, n, segment = h_TNE.shape
    w = averaging_matrix(m, n, segment, dtype=h_TNE.dtype).to(h_TNE.device) + weight_DNE.flatten(1)
    return h_TNE.flatten(1) @ w.T
