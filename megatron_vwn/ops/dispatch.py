"""Which implementation runs: the fused kernels where they can, else the composition of torch operations.

Both keep to ``ops.reference``; the tests of the kernels compare all of them.
"""

from functools import cache
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vwn.ops import eager
from megatron_vwn.ops.eager import recomputed
from megatron_vwn.ops.parameters import ConnectionParameters, InputNorm

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Plan(NamedTuple):
    """What computes a connection.

    Attributes:
        implementation: has ``read``, ``write`` and ``write_read``: the kernels, ``eager`` or ``recomputed``.
        normalizes_input: whether a read does the norm of the sublayer's input, rather than an operation of its own.
        fuses_write_read: whether one kernel does a write together with the next read.
    """

    implementation: ModuleType | SimpleNamespace
    normalizes_input: bool = False
    fuses_write_read: bool = False


def plan(h_TNE: Tensor, p: ConnectionParameters) -> Plan:
    """Which implementation computes, by the dtype and the kind of device of the state and what p says besides its
    tensors: the kernels compute on a GPU, or anywhere if asked for (Triton's interpreter)."""
    wanted = p.kernels == "triton" or (p.kernels == "auto" and h_TNE.is_cuda)
    # Rows that pad a tile have no norm without an eps.
    possible = wanted and h_TNE.dtype in _DTYPES and p.eps > 0
    if not possible or why_not_kernels(p.n, doubly_stochastic=p.doubly_stochastic) is not None:
        return composed(p)
    # Imports Triton, which takes a second and is not everywhere.
    from megatron_vwn.ops.kernels import autograd
    from megatron_vwn.ops.kernels.geometry import MAX_NORMED_SEGMENTS

    return Plan(autograd, normalizes_input=p.n <= MAX_NORMED_SEGMENTS, fuses_write_read=True)


def composed(p: ConnectionParameters) -> Plan:
    """The plan without kernels."""
    return Plan(recomputed if p.recompute else eager)


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
    return plan(h_TNE, p).implementation.read(h_TNE, p, input_norm)


def write(h_TNE: Tensor, y_TD: Tensor, p: ConnectionParameters) -> Tensor:
    """H' = B^T Y + A_carry^T H: the next state [T, N, E] in the dtype of h."""
    return plan(h_TNE, p).implementation.write(h_TNE, y_TD, p)


def write_read(
    h_TNE: Tensor,
    y_TD: Tensor,
    p: ConnectionParameters,
    p_next: ConnectionParameters,
    input_norm: InputNorm | None = None,
) -> tuple[Tensor, Tensor]:
    """The write of one connection and the read of the next: H' [T, N, E] and X [T, D], or X's norm where one is given,
    in the dtype of h."""
    return plan(h_TNE, p).implementation.write_read(h_TNE, y_TD, p, p_next, input_norm)


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
