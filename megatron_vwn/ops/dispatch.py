"""Which implementation runs: the fused kernels where they can, else the composition of torch operations.

Both keep to ``ops.reference``; the tests of the kernels compare all of them.
"""

from functools import cache
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from megatron_vwn.ops import eager
from megatron_vwn.ops.eager import recomputed
from megatron_vwn.ops.parameters import ConnectionParameters, InputNorm

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def by_kernels(h_TNE: Tensor, p: ConnectionParameters) -> bool:
    """Whether the fused kernels compute for this state: on a GPU, or anywhere if asked for (Triton's interpreter)."""
    if p.kernels == "torch" or not (h_TNE.is_cuda or p.kernels == "triton"):
        return False
    # Rows that pad a tile have no norm without an eps.
    return h_TNE.dtype in _DTYPES and p.eps > 0 and why_not_kernels(p.n, doubly_stochastic=p.doubly_stochastic) is None


def normalizes_input(h_TNE: Tensor, p: ConnectionParameters) -> bool:
    """Whether the kernels normalise a sublayer's input while they read it, rather than an operation of its own."""
    if not by_kernels(h_TNE, p):
        return False
    from megatron_vwn.ops.kernels.geometry import MAX_NORMED_SEGMENTS

    return p.n <= MAX_NORMED_SEGMENTS


def why_not_kernels(n: int, *, doubly_stochastic: bool) -> str | None:
    """Why the kernels cannot compute such a connection, as the end of a sentence; None if they can."""
    from megatron_vwn.ops.kernels.geometry import MAX_SEGMENTS

    if not _have_triton():
        return "Triton is not installed"
    if doubly_stochastic:
        return "they have no doubly stochastic carry"
    if n > MAX_SEGMENTS:
        return f"they hold the carry of one token in registers, which n = {n} is too large for ({MAX_SEGMENTS} at most)"
    return None


@cache
def _have_triton() -> bool:
    return find_spec("triton") is not None


def read(h_TNE: Tensor, p: ConnectionParameters, input_norm: InputNorm | None = None) -> Tensor:
    """X = A_read^T H, or its norm where one is given: the sublayer's input [T, D] in the dtype of h."""
    return _implementation(h_TNE, p).read(h_TNE, p, input_norm)


def write(h_TNE: Tensor, y_TD: Tensor, p: ConnectionParameters) -> Tensor:
    """H' = B^T Y + A_carry^T H: the next state [T, N, E] in the dtype of h."""
    return _implementation(h_TNE, p).write(h_TNE, y_TD, p)


def write_read(
    h_TNE: Tensor,
    y_TD: Tensor,
    p: ConnectionParameters,
    p_next: ConnectionParameters,
    input_norm: InputNorm | None = None,
) -> tuple[Tensor, Tensor]:
    """The write of one connection and the read of the next: H' [T, N, E] and X [T, D], or X's norm where one is given,
    in the dtype of h."""
    return _implementation(h_TNE, p).write_read(h_TNE, y_TD, p, p_next, input_norm)


def group_norm(
    h_TNE: Tensor, weight_NE: Tensor, bias_NE: Tensor | None, *, m: int, eps: float, kernels: str = "auto"
) -> Tensor:
    """Norm over groups of m whole segments; RMS norm, or layer norm where a bias is given.

    Returns:
        [T, N, E]: by the kernel in the dtype of h, else in the accumulation dtype.
    """
    wanted = (h_TNE.is_cuda and kernels == "auto") or kernels == "triton"
    if wanted and _have_triton() and bias_NE is None and h_TNE.dtype in _DTYPES:
        from megatron_vwn.ops.kernels.group_norm import MAX_GROUP
        from megatron_vwn.ops.kernels.group_norm import group_norm as fused

        if m * h_TNE.shape[-1] <= MAX_GROUP:
            return fused(h_TNE, weight_NE, m=m, eps=eps)
    return eager.group_norm(h_TNE, weight_NE, bias_NE, m=m, eps=eps, segment_size=h_TNE.shape[-1])


def _implementation(h_TNE: Tensor, p: ConnectionParameters) -> ModuleType | SimpleNamespace:
    if not by_kernels(h_TNE, p):
        return recomputed if p.recompute else eager
    # Imports Triton, which takes a second and is not everywhere.
    from megatron_vwn.ops.kernels import autograd as connection

    return connection
