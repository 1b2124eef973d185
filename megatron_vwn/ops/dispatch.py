"""Which implementation runs: the fused kernels where they can, else the composition of torch operations.

Both keep to ``ops.reference``; the tests of the kernels compare all of them. ``why_not_kernels`` and
``why_not_group_norm_kernel`` decide, here and for whoever says beforehand what will run.
"""

import os
import re
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_vwn.ops import eager
from megatron_vwn.ops.parameters import ConnectionParameters, Gates

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OVER_RANKS = "the width partition sums over ranks between their steps"
TRITON = (3, 5), (3, 9)
"""The oldest and the newest Triton that may run the kernels. In the interpreter 3.5.1, 3.8.0 and 3.9.0 computed them
beside torch 2.11, as does its own 3.6 in the tests; 3.6 and 3.9 compile them for sm_90 and sm_100 without spills, at
D = 2048 and 4096."""
COST_OF_TORCH = (
    "torch operations read and write the stream instead of Triton kernels, at more than ten times their memory traffic"
)
"""What a fallback costs: inputs and outputs of torch's operations in a write and read at (m, n) = (4, 16), D = 2048,
forward and backward, are 18 times the bytes of one fused pass."""


def implementation(h_TNE: Tensor, p: ConnectionParameters) -> ModuleType:
    """What computes a connection, by the dtype and the kind of device of the state and what p says besides its tensors:
    the module of the kernels on a GPU, or anywhere if asked for (Triton's interpreter), or ``eager``. Both have
    ``read``, ``write`` and ``write_read``; the gates that one of them made are for itself."""
    if not _wanted(h_TNE, p.kernels):
        return eager
    reason = why_not_kernels(
        p.n,
        doubly_stochastic=p.doubly_stochastic,
        eps=p.eps,
        sums_over_ranks=p.sum_over_ranks is not None,
        dtype=h_TNE.dtype,
    )
    if reason is not None:
        _warn_without_triton()
        return eager
    # Imports Triton, which takes a second and is not everywhere.
    from megatron_vwn.ops.kernels import autograd

    return autograd


def why_not_kernels(
    n: int,
    *,
    doubly_stochastic: bool,
    eps: float | None = None,
    sums_over_ranks: bool = False,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why the kernels cannot compute such a connection, as the end of a sentence; None if they can.

    Args:
        n: segments of the state.
        doubly_stochastic: whether the carry is.
        eps: of the norm of what the gates see; None if it is not known yet.
        sums_over_ranks: whether ranks hold channels of every segment.
        dtype: of the state; None for one that they have.
    """
    reason = why_not_triton()
    if reason is not None:
        return reason
    from megatron_vwn.ops.kernels.geometry import MAX_SEGMENTS

    if sums_over_ranks:
        return _OVER_RANKS
    if doubly_stochastic:
        return "they have no doubly stochastic carry"
    if n > MAX_SEGMENTS:
        return f"they hold the carry of one token in registers, which n = {n} is too large for ({MAX_SEGMENTS} at most)"
    if eps is not None and not eps > 0:
        return "they need an eps of the norm above 0, because rows that pad a tile have no norm without"
    return _why_not_dtype(dtype)


def why_not_group_norm_kernel(
    channels: int, *, layer_norm: bool, sums_over_ranks: bool = False, dtype: torch.dtype | None = None
) -> str | None:
    """Why the kernel cannot norm groups of so many channels, as the end of a sentence; None if it can; further
    arguments as ``why_not_kernels``."""
    reason = why_not_triton()
    if reason is not None:
        return reason
    from megatron_vwn.ops.kernels.group_norm import MAX_GROUP

    if sums_over_ranks:
        return _OVER_RANKS
    if layer_norm:
        return "the kernel is of RMS norm, not of layer norm"
    if channels > MAX_GROUP:
        return f"the kernel holds a group in registers, which {channels:,} channels are too many for ({MAX_GROUP:,})"
    return _why_not_dtype(dtype)


@cache
def why_not_triton() -> str | None:
    """Why no kernel runs with the Triton that is installed, as the end of a sentence; None if they do."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    found = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if not TRITON[0] <= found <= TRITON[1]:
        oldest, newest = (".".join(map(str, version)) for version in TRITON)
        return f"Triton {triton.__version__} is installed, and they are tested with {oldest} to {newest}"
    return None


def _why_not_dtype(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None or dtype in _DTYPES else f"they have no {str(dtype).removeprefix('torch.')}"


def _wanted(h_TNE: Tensor, kernels: str) -> bool:
    return kernels == "triton" or (kernels == "auto" and h_TNE.is_cuda)


@cache
def _warn_without_triton() -> None:
    """Once in a process, and in one of a run's: what the installation costs; what a model has no kernel for is said
    where it is built."""
    if why_not_triton() is not None and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"megatron_vwn: {why_not_triton()}: {COST_OF_TORCH}.", stacklevel=2)


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
    if _wanted(h_TNE, kernels) and not why_not_group_norm_kernel(
        m * h_TNE.shape[-1], layer_norm=bias_NE is not None, dtype=h_TNE.dtype
    ):
        from megatron_vwn.ops.kernels.group_norm import group_norm as fused

        return fused(h_TNE, weight_NE, m=m, eps=eps)
    return eager.group_norm(h_TNE, weight_NE, bias_NE, m=m, eps=eps, segment_size=h_TNE.shape[-1])
