"""Which implementation runs: the fused kernels where they can, else the composition of torch operations.

Both keep to ``ops.reference``; the tests of the kernels compare all of them.
"""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from megatron_vwn.ops import eager
from megatron_vwn.ops.parameters import ConnectionParameters, Gates

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def implementation(h_TNE: Tensor, p: ConnectionParameters) -> ModuleType:
    """What computes a connection, by the dtype and the kind of device of the state and what p says besides its tensors:
    the module of the kernels on a GPU, or anywhere if asked for (Triton's interpreter), or ``eager``. Both have
    ``read``, ``write`` and ``write_read``; the gates that one of them made are for itself."""
    wanted = p.kernels == "triton" or (p.kernels == "auto" and h_TNE.is_cuda)
    # Rows that pad a tile have no norm without an eps, and no kernel takes a share of the channels.
    possible = wanted and h_TNE.dtype in _DTYPES and p.eps > 0 and p.sum_over_ranks is None
    if not possible or why_not_kernels(p.n, doubly_stochastic=p.doubly_stochastic) is not None:
        return eager
    # Imports Triton, which takes a second and is not everywhere.
    from megatron_vwn.ops.kernels import autograd

    return autograd


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


def read(h_TNE: Tensor, p: ConnectionParameters) -> tuple[Tensor, Gates | None]:
    """X = A_read^T H, the sublayer's input [T, D] in the dtype of h, and the gates that ``write`` wants; None if p is
    static."""
    return implementation(h_TNE, p).read(h_TNE, p)


def write(h_TNE: Tensor, y_TD: Tensor, gates: Gates | None, p: ConnectionParameters) -> Tensor:
    """H' = B^T Y + A_carry^T H: the next state [T, N, E] in the dtype of h; ``gates`` are what the read of h gave."""
    _check_gates(h_TNE, gates, p)
    return implementation(h_TNE, p).write(h_TNE, y_TD, gates, p)


def write_read(
    h_TNE: Tensor, y_TD: Tensor, gates: Gates | None, p: ConnectionParameters, p_next: ConnectionParameters
) -> tuple[Tensor, Tensor, Gates | None]:
    """The write of one connection and the read of the next at once: H' [T, N, E], X [T, D] and the gates of the next,
    in the dtype of h."""
    _check_gates(h_TNE, gates, p)
    compute, following = implementation(h_TNE, p), implementation(h_TNE, p_next)
    if following is not compute:
        out_TNE = compute.write(h_TNE, y_TD, gates, p)
        return out_TNE, *following.read(out_TNE, p_next)
    return compute.write_read(h_TNE, y_TD, gates, p, p_next)


def _check_gates(h_TNE: Tensor, gates: Gates | None, p: ConnectionParameters) -> None:
    """Refuse gates that no read of this state by this connection gave.

    Raises:
        ValueError: a dynamic connection without gates would be computed as a static one, and gates of other tokens
            would be broadcast.
    """
    if (gates is None) == p.dynamic:
        kind, what = ("dynamic", "the gates that its read returned") if p.dynamic else ("static", "None for its gates")
        raise ValueError(f"the connection is {kind}: give the write {what}.")
    if gates is not None and gates.logits_TNK.shape != (*h_TNE.shape[:2], p.routing_NK.shape[1]):
        raise ValueError(
            f"the gates are {list(gates.logits_TNK.shape)}, the state has {h_TNE.shape[0]} tokens of {p.n} segments: "
            "give those that the read of this very state returned."
        )


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
