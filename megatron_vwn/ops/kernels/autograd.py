"""``read``, ``write`` and ``write_read`` as autograd functions around the kernels.

What makes the gates of a connection returns all gradients of its parameters: the write that takes the gates puts the
gradient of its COEFFICIENTS into the slot of the logits' gradient, and the maker completes it with the read's and goes
on to the logits, the routing, the scale and W. A static connection has no gates, and each operation its own part.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vwn.ops.kernels import (
    batched_backward,
    batched_forward,
    small_backward,
    small_forward,
    wide_backward,
    wide_forward,
)
from megatron_vwn.ops.kernels.geometry import MAX_BATCHED, MAX_SMALL
from megatron_vwn.ops.kernels.sums import routing_gradients
from megatron_vwn.ops.kernels.tables import Prepared, prepare
from megatron_vwn.ops.kernels.weight import weight_gradients
from megatron_vwn.ops.parameters import ConnectionParameters, Gates

_PARAMETERS = ("routing_NK", "scale_NK", "weight_EK", "norm_E")


def read(h_TNE: Tensor, p: ConnectionParameters) -> tuple[Tensor, Gates | None]:
    """X = A_read^T H, [T, D] in the dtype of h, and the gates of h; None for a static connection."""
    x_TME, *gates = _Read.apply(p, h_TNE, *_tensors(p))
    return x_TME.flatten(1), Gates(*gates) if p.dynamic else None


def write(h_TNE: Tensor, y_TD: Tensor, gates: Gates | None, p: ConnectionParameters) -> Tensor:
    """H' = B^T Y + A_carry^T H: [T, N, E] in the dtype of h, whose gates are given."""
    return _Write.apply(p, h_TNE, y_TD, _logits(gates), *_tensors(p))


def write_read(
    h_TNE: Tensor, y_TD: Tensor, gates: Gates | None, p: ConnectionParameters, p_next: ConnectionParameters
) -> tuple[Tensor, Tensor, Gates | None]:
    """The write of one connection and the read of the next: H', X [T, D] and the gates of H' for p_next."""
    out_TNE, x_TME, *made = _WriteRead.apply(p, p_next, h_TNE, y_TD, _logits(gates), *_tensors(p), *_tensors(p_next))
    return out_TNE, x_TME.flatten(1), Gates(*made) if p_next.dynamic else None


def _logits(gates: Gates | None) -> Tensor | None:
    return None if gates is None else gates.logits_TNK


def _tensors(p: ConnectionParameters) -> tuple[Tensor | None, ...]:
    return tuple(getattr(p, name) for name in _PARAMETERS)


def _with(p: ConnectionParameters, tensors: Sequence[Tensor | None]) -> ConnectionParameters:
    """The connection with the tensors that autograd saved of it, and knows to be unchanged."""
    return p._replace(**dict(zip(_PARAMETERS, tensors, strict=True)))


def _without_tensors(p: ConnectionParameters) -> ConnectionParameters:
    """For ctx, which must not hold what ``save_for_backward`` does."""
    return _with(p, [None] * len(_PARAMETERS))


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p: ConnectionParameters, h_TNE: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        h_TNE = h_TNE.contiguous()
        q = prepare(p, h_TNE.dtype)
        _, x_TME, z_TNK, inverse_rms_TN = _family(p.n).forward(h_TNE, None, None, None, q)
        _keep(ctx, z_TNK, inverse_rms_TN)
        ctx.p = _without_tensors(p)
        ctx.save_for_backward(h_TNE, z_TNK, inverse_rms_TN, *tensors)
        return _made(x_TME, z_TNK, inverse_rms_TN)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_TME: Tensor | None, dc_TNK: Tensor | None = None, _=None):
        h_TNE, z_TNK, inverse_rms_TN, *tensors = ctx.saved_tensors
        p = _with(ctx.p, tensors)
        q, dx_TME = prepare(p, h_TNE.dtype), _segments(dx_TME, h_TNE, p.m)
        dh_TNE, _, _, dz_TNK, dc_TNK = _family(p.n).backward(
            h_TNE, None, None, None, h_TNE, z_TNK, inverse_rms_TN, q, None, dx_TME, _contiguous(dc_TNK)
        )
        return None, dh_TNE, *_reader_gradients(p, q, h_TNE, z_TNK, dz_TNK, dc_TNK)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, p: ConnectionParameters, h_TNE: Tensor, y_TD: Tensor, z_TNK: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        h_TNE, y_TD = h_TNE.contiguous(), y_TD.contiguous()
        out_TNE, _, _, _ = _family(p.n).forward(h_TNE, _segments(y_TD, h_TNE, p.m), z_TNK, prepare(p, None), None)
        ctx.p = _without_tensors(p)
        ctx.save_for_backward(h_TNE, y_TD, z_TNK, *tensors)
        return out_TNE

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TNE: Tensor):
        h_TNE, y_TD, z_TNK, *tensors = ctx.saved_tensors
        p = _with(ctx.p, tensors)
        written = prepare(p, None)
        dh_TNE, dy_TME, dc_TNK, _, _ = _family(p.n).backward(
            h_TNE,
            _segments(y_TD, h_TNE, p.m),
            z_TNK,
            written,
            None,
            None,
            None,
            None,
            dout_TNE.contiguous(),
            None,
            None,
        )
        return None, dh_TNE, dy_TME.flatten(1), *_writer_gradients(written, dc_TNK)


class _WriteRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, p: ConnectionParameters, p_next: ConnectionParameters,
        h_TNE: Tensor, y_TD: Tensor, z_TNK: Tensor | None, *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        h_TNE, y_TD = h_TNE.contiguous(), y_TD.contiguous()
        out_TNE, x_TME, z_next_TNK, inverse_rms_TN = _family(p.n).forward(
            h_TNE, _segments(y_TD, h_TNE, p.m), z_TNK, prepare(p, None), prepare(p_next, h_TNE.dtype)
        )
        _keep(ctx, z_next_TNK, inverse_rms_TN)
        ctx.p, ctx.p_next = _without_tensors(p), _without_tensors(p_next)
        ctx.save_for_backward(h_TNE, y_TD, z_TNK, out_TNE, z_next_TNK, inverse_rms_TN, *tensors)
        return out_TNE, *_made(x_TME, z_next_TNK, inverse_rms_TN)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TNE: Tensor | None, dx_TME: Tensor | None, dc_next_TNK: Tensor | None = None, _=None):
        h_TNE, y_TD, z_TNK, out_TNE, z_next_TNK, inverse_rms_TN, *tensors = ctx.saved_tensors
        p, p_next = _with(ctx.p, tensors[:4]), _with(ctx.p_next, tensors[4:])
        written, q = prepare(p, None), prepare(p_next, h_TNE.dtype)
        dh_TNE, dy_TME, dc_TNK, dz_next_TNK, dc_next_TNK = _family(p.n).backward(
            h_TNE, _segments(y_TD, h_TNE, p.m), z_TNK, written, out_TNE, z_next_TNK, inverse_rms_TN, q,
            torch.zeros_like(out_TNE) if dout_TNE is None else dout_TNE.contiguous(),
            _segments(dx_TME, h_TNE, p.m), _contiguous(dc_next_TNK),
        )  # fmt: skip
        return (
            None, None, dh_TNE, dy_TME.flatten(1), *_writer_gradients(written, dc_TNK),
            *_reader_gradients(p_next, q, out_TNE, z_next_TNK, dz_next_TNK, dc_next_TNK),
        )  # fmt: skip


class _Family(NamedTuple):
    """The kernels for some numbers of segments; all families have the same two functions."""

    forward: Callable
    backward: Callable


_SMALL = _Family(small_forward.forward, small_backward.backward)
_BATCHED = _Family(batched_forward.forward, batched_backward.backward)
_WIDE = _Family(wide_forward.forward, wide_backward.backward)


def _family(n: int) -> _Family:
    if n <= MAX_SMALL:
        return _SMALL
    return _BATCHED if n <= MAX_BATCHED else _WIDE


def _keep(ctx, z_TNK: Tensor | None, inverse_rms_TN: Tensor | None) -> None:
    # An output that nobody used has no gradient, rather than one of zeros to be filled and read.
    ctx.set_materialize_grads(False)
    if inverse_rms_TN is not None:
        ctx.mark_non_differentiable(inverse_rms_TN)


def _made(x_TME: Tensor, z_TNK: Tensor | None, inverse_rms_TN: Tensor | None) -> tuple[Tensor, ...]:
    return (x_TME,) if z_TNK is None else (x_TME, z_TNK, inverse_rms_TN)


def _segments(x: Tensor | None, h_TNE: Tensor, m: int) -> Tensor:
    """A [T, D] or [T, M, E] as contiguous [T, M, E]; zeros where there is none."""
    if x is None:
        return h_TNE.new_zeros(h_TNE.shape[0], m, h_TNE.shape[-1])
    return x.contiguous().view(h_TNE.shape[0], m, h_TNE.shape[-1])


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _reader_gradients(
    p: ConnectionParameters, q: Prepared, out_TNE: Tensor, z_TNK: Tensor | None, dz_TNK: Tensor | None, dc_TNK: Tensor
) -> tuple[Tensor | None, ...]:
    """Of the parameters of the connection that read out, all of them if it is dynamic."""
    if not p.dynamic:
        read = slice(q.columns - q.m, q.columns)
        return routing_gradients(dc_TNK, None, q, read)[0], None, None, None
    routing = routing_gradients(dc_TNK, z_TNK, q, slice(0, q.columns))
    return *routing, *weight_gradients(out_TNE, dz_TNK, p)


def _writer_gradients(p: Prepared, dc_TNK: Tensor) -> tuple[Tensor | None, ...]:
    """Of the logits' slot and of the parameters of the connection that wrote."""
    if p.dynamic:
        return dc_TNK, None, None, None, None
    written = slice(0, p.columns - p.m)
    return None, routing_gradients(dc_TNK, None, p, written)[0], None, None, None
