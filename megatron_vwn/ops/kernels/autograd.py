"""``read``, ``write`` and ``write_read`` as autograd functions around the kernels.

What makes the gates of a connection returns all gradients of its parameters: the write that takes the gates puts the
gradient of its COEFFICIENTS into the slot of the logits' gradient, and the maker completes it with the read's and goes
on to the logits, the routing, the scale and W. A static connection has no gates, and each operation its own part.
"""

from collections.abc import Callable
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
from megatron_vwn.ops.kernels.boundary import Boundary
from megatron_vwn.ops.kernels.geometry import MAX_BATCHED, MAX_SMALL
from megatron_vwn.ops.kernels.sums import routing_gradients
from megatron_vwn.ops.kernels.tables import Prepared, prepare
from megatron_vwn.ops.kernels.weight import weight_gradients
from megatron_vwn.ops.parameters import ConnectionParameters, Gates


def read(h_TNE: Tensor, p: ConnectionParameters) -> tuple[Tensor, Gates | None]:
    """X = A_read^T H, [T, D] in the dtype of h, and the gates of h; None for a static connection."""
    x_TME, *gates = _Read.apply(p, h_TNE, *p.learned)
    return x_TME.flatten(1), Gates(*gates) if p.dynamic else None


def write(h_TNE: Tensor, y_TD: Tensor, gates: Gates | None, p: ConnectionParameters) -> Tensor:
    """H' = B^T Y + A_carry^T H: [T, N, E] in the dtype of h, whose gates are given."""
    return _Write.apply(p, h_TNE, y_TD, _logits(gates), *p.learned)


def write_read(
    h_TNE: Tensor, y_TD: Tensor, gates: Gates | None, p: ConnectionParameters, p_next: ConnectionParameters
) -> tuple[Tensor, Tensor, Gates | None]:
    """The write of one connection and the read of the next: H', X [T, D] and the gates of H' for p_next."""
    out_TNE, x_TME, *made = _WriteRead.apply(p, p_next, h_TNE, y_TD, _logits(gates), *p.learned, *p_next.learned)
    return out_TNE, x_TME.flatten(1), Gates(*made) if p_next.dynamic else None


def _logits(gates: Gates | None) -> Tensor | None:
    return None if gates is None else gates.logits_TNK


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p: ConnectionParameters, h_TNE: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        h_TNE = h_TNE.contiguous()
        q = prepare(p, h_TNE.dtype)
        _, x_TME, z_TNK, inverse_rms_TN = _family(p.n).forward(Boundary(h_TNE, q=q))
        _keep(ctx, z_TNK, inverse_rms_TN)
        ctx.p = p.without_learned()
        ctx.save_for_backward(h_TNE, z_TNK, inverse_rms_TN, *tensors)
        return _made(x_TME, z_TNK, inverse_rms_TN)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_TME: Tensor | None, dc_TNK: Tensor | None = None, _=None):
        h_TNE, z_TNK, inverse_rms_TN, *tensors = ctx.saved_tensors
        p = ctx.p.with_learned(tensors)
        q, dx_TME = prepare(p, h_TNE.dtype), _segments(dx_TME, h_TNE, p.m)
        given = {"z_next_TNK": z_TNK, "inverse_rms_TN": inverse_rms_TN, "dx_TME": dx_TME}
        dh_TNE, _, _, dz_TNK, dc_TNK = _family(p.n).backward(
            Boundary(h_TNE, q=q, **given, dc_next_TNK=_contiguous(dc_TNK))
        )
        return None, dh_TNE, *_reader_gradients(p, q, h_TNE, z_TNK, dz_TNK, dc_TNK)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, p: ConnectionParameters, h_TNE: Tensor, y_TD: Tensor, z_TNK: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        h_TNE, y_TD = h_TNE.contiguous(), y_TD.contiguous()
        written = Boundary(h_TNE, prepare(p, None), y_TME=_segments(y_TD, h_TNE, p.m), z_TNK=z_TNK)
        out_TNE, _, _, _ = _family(p.n).forward(written)
        ctx.p = p.without_learned()
        ctx.save_for_backward(h_TNE, y_TD, z_TNK, *tensors)
        return out_TNE

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TNE: Tensor):
        h_TNE, y_TD, z_TNK, *tensors = ctx.saved_tensors
        p = ctx.p.with_learned(tensors)
        written = prepare(p, None)
        given = {"y_TME": _segments(y_TD, h_TNE, p.m), "z_TNK": z_TNK, "dout_TNE": dout_TNE.contiguous()}
        dh_TNE, dy_TME, dc_TNK, _, _ = _family(p.n).backward(Boundary(h_TNE, written, **given))
        return None, dh_TNE, dy_TME.flatten(1), *_writer_gradients(written, dc_TNK)


class _WriteRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, p: ConnectionParameters, p_next: ConnectionParameters,
        h_TNE: Tensor, y_TD: Tensor, z_TNK: Tensor | None, *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        h_TNE, y_TD = h_TNE.contiguous(), y_TD.contiguous()
        connections = prepare(p, None), prepare(p_next, h_TNE.dtype)
        out_TNE, x_TME, z_next_TNK, inverse_rms_TN = _family(p.n).forward(
            Boundary(h_TNE, *connections, _segments(y_TD, h_TNE, p.m), z_TNK)
        )
        _keep(ctx, z_next_TNK, inverse_rms_TN)
        ctx.p, ctx.p_next = p.without_learned(), p_next.without_learned()
        ctx.save_for_backward(h_TNE, y_TD, z_TNK, out_TNE, z_next_TNK, inverse_rms_TN, *tensors)
        return out_TNE, *_made(x_TME, z_next_TNK, inverse_rms_TN)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TNE: Tensor | None, dx_TME: Tensor | None, dc_next_TNK: Tensor | None = None, _=None):
        h_TNE, y_TD, z_TNK, out_TNE, z_next_TNK, inverse_rms_TN, *tensors = ctx.saved_tensors
        p, p_next = ctx.p.with_learned(tensors[:4]), ctx.p_next.with_learned(tensors[4:])
        written, q = prepare(p, None), prepare(p_next, h_TNE.dtype)
        dh_TNE, dy_TME, dc_TNK, dz_next_TNK, dc_next_TNK = _family(p.n).backward(
            Boundary(
                h_TNE,
                written,
                q,
                _segments(y_TD, h_TNE, p.m),
                z_TNK,
                out_TNE=out_TNE,
                z_next_TNK=z_next_TNK,
                inverse_rms_TN=inverse_rms_TN,
                dout_TNE=_contiguous(dout_TNE),
                dx_TME=_segments(dx_TME, h_TNE, p.m),
                dc_next_TNK=_contiguous(dc_next_TNK),
            )
        )
        return (
            None, None, dh_TNE, dy_TME.flatten(1), *_writer_gradients(written, dc_TNK),
            *_reader_gradients(p_next, q, out_TNE, z_next_TNK, dz_next_TNK, dc_next_TNK),
        )  # fmt: skip


class _Family(NamedTuple):
    """The kernels for some numbers of segments; ``boundary`` has what both functions take."""

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
