"""``read``, ``write`` and ``write_read`` as autograd functions around the kernels."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vwn.ops.eager import normalize_input
from megatron_vwn.ops.kernels.geometry import MAX_NORMED_SEGMENTS, Geometry
from megatron_vwn.ops.kernels.launch import launch, programs, tiles
from megatron_vwn.ops.kernels.packing import Columns, Folded, ProgramSums, fold, unfold
from megatron_vwn.ops.kernels.read import read_backward, read_forward
from megatron_vwn.ops.kernels.write import write_backward, write_forward
from megatron_vwn.ops.kernels.write_read import write_read_backward, write_read_forward
from megatron_vwn.ops.parameters import ConnectionParameters, InputNorm


def read(h_TNE: Tensor, p: ConnectionParameters, input_norm: InputNorm | None = None) -> Tensor:
    """X = A_read^T H, or its norm: [T, D] in the dtype of h."""
    return _Read.apply(_Shape(p, input_norm), h_TNE, _weight(input_norm), *Columns.of(p, p.read_columns))


def write(h_TNE: Tensor, y_TD: Tensor, p: ConnectionParameters) -> Tensor:
    """H' = B^T Y + A_carry^T H: [T, N, E] in the dtype of h."""
    return _Write.apply(_Shape(p), h_TNE, y_TD, *Columns.of(p, p.write_columns))


def write_read(
    h_TNE: Tensor,
    y_TD: Tensor,
    p: ConnectionParameters,
    p_next: ConnectionParameters,
    input_norm: InputNorm | None = None,
) -> tuple[Tensor, Tensor]:
    """The write of one connection and the read of the next: H' [T, N, E] and X [T, D], or its norm, in the dtype of
    h. Beyond MAX_NORMED_SEGMENTS the norm is an operation of its own, which keeps X."""
    if input_norm is not None and p.n > MAX_NORMED_SEGMENTS:
        out_TNE, x_TD = write_read(h_TNE, y_TD, p, p_next)
        return out_TNE, normalize_input(x_TD, input_norm)
    columns = (*Columns.of(p, p.write_columns), *Columns.of(p_next, p_next.read_columns))
    return _WriteRead.apply(_Shape(p, input_norm), h_TNE, y_TD, _weight(input_norm), *columns)


def _weight(input_norm: InputNorm | None) -> Tensor | None:
    return None if input_norm is None else input_norm.weight_D


class _Shape:
    """What a connection is, without its tensors."""

    def __init__(self, p: ConnectionParameters, input_norm: InputNorm | None = None):
        self.m, self.n, self.carry, self.eps = p.m, p.n, p.num_carry, p.eps
        self.dynamic, self.sigmoid = p.dynamic, p.gate == "sigmoid"
        self.norm_eps = None if input_norm is None else input_norm.eps

    def geometry(self, kernel: triton.JITFunction, h_TNE: Tensor) -> Geometry:
        """Constants of a kernel that works on H."""
        return Geometry.of(
            m=self.m,
            n=self.n,
            carry=self.carry,
            segment_size=h_TNE.shape[-1],
            dynamic=self.dynamic,
            sigmoid=self.sigmoid,
            dtype=h_TNE.dtype,
            kernel=kernel.__name__,
            normed=self.norm_eps is not None,
        )

    def scalars(self, h_TNE: Tensor) -> tuple[int, float, float]:
        """Tokens, eps and 1/tau, the arguments that every kernel ends with."""
        return h_TNE.shape[0], self.eps, 1 / math.sqrt(h_TNE.shape[-1])


class _Norm(NamedTuple):
    """The norm of the sublayer's input as kernels take it; all None without one."""

    weight_D: Tensor | None
    inverse_T: Tensor | None
    sums_PME: Tensor | None = None

    @classmethod
    def forward(cls, h_TNE: Tensor, weight_D: Tensor | None) -> "_Norm":
        """With room for 1/rms of each token's input."""
        if weight_D is None:
            return cls(None, None)
        return cls(weight_D.float().contiguous(), h_TNE.new_empty(h_TNE.shape[0], dtype=torch.float32))

    @classmethod
    def backward(cls, programs: int, weight_D: Tensor | None, inverse_T: Tensor | None) -> "_Norm":
        """With each program's own sums, as ``ProgramSums`` has them."""
        if weight_D is None:
            return cls(None, None)
        sums_PME = weight_D.new_zeros(programs, weight_D.shape[0], dtype=torch.float32)
        return cls(weight_D.float().contiguous(), inverse_T, sums_PME)

    def gradient(self, weight_D: Tensor | None) -> Tensor | None:
        """Of the weight, in its dtype."""
        return None if weight_D is None else self.sums_PME.sum(0).to(weight_D.dtype)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: _Shape, h_TNE: Tensor, norm_D: Tensor | None, *columns: Tensor | None) -> Tensor:
        h_TNE = h_TNE.contiguous()
        ctx.shape = shape
        norm = _Norm.forward(h_TNE, norm_D)
        ctx.save_for_backward(h_TNE, norm_D, norm.inverse_T, *columns)
        geometry = shape.geometry(read_forward, h_TNE)
        x_TME = h_TNE.new_empty(h_TNE.shape[0], shape.m, h_TNE.shape[-1])
        p = fold(Columns(*columns), h_TNE.dtype)
        launch(
            read_forward, tiles(h_TNE, geometry), geometry,
            h_TNE, p.weight_KE, p.routing_NK, p.scale_NK, x_TME, norm.weight_D, norm.inverse_T,
            *shape.scalars(h_TNE), shape.norm_eps,
        )  # fmt: skip
        return x_TME.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_TD: Tensor):
        h_TNE, norm_D, inverse_T, *columns = ctx.saved_tensors
        shape, columns = ctx.shape, Columns(*columns)
        geometry = shape.geometry(read_backward, h_TNE)
        p, dh_TNE = fold(columns, h_TNE.dtype), torch.empty_like(h_TNE)
        grid = programs(h_TNE, tiles(h_TNE, geometry))
        sums = ProgramSums(grid, geometry, h_TNE, carry=False, blocks=1)
        norm = _Norm.backward(grid, norm_D, inverse_T)
        launch(
            read_backward, grid, geometry,
            h_TNE, dx_TD.contiguous(), p.weight_KE, p.routing_NK, p.scale_NK,
            dh_TNE, sums.weight_PKE, sums.routing_P, sums.scale_P, norm.weight_D, norm.inverse_T, norm.sums_PME,
            *shape.scalars(h_TNE),
        )  # fmt: skip
        return None, dh_TNE, norm.gradient(norm_D), *unfold(columns, *sums.total())


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape: _Shape, h_TNE: Tensor, y_TD: Tensor, *columns: Tensor | None) -> Tensor:
        h_TNE, y_TD = h_TNE.contiguous(), y_TD.contiguous()
        ctx.shape = shape
        ctx.save_for_backward(h_TNE, y_TD, *columns)
        geometry, out_TNE = shape.geometry(write_forward, h_TNE), torch.empty_like(h_TNE)
        p = fold(Columns(*columns), h_TNE.dtype)
        launch(
            write_forward, tiles(h_TNE, geometry), geometry,
            h_TNE, y_TD, p.weight_KE, p.routing_NK, p.scale_NK, out_TNE, *shape.scalars(h_TNE),
        )  # fmt: skip
        return out_TNE

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TNE: Tensor):
        h_TNE, y_TD, *columns = ctx.saved_tensors
        shape, columns = ctx.shape, Columns(*columns)
        geometry = shape.geometry(write_backward, h_TNE)
        p, dh_TNE, dy_TD = fold(columns, h_TNE.dtype), torch.empty_like(h_TNE), torch.empty_like(y_TD)
        grid = programs(h_TNE, tiles(h_TNE, geometry))
        sums = ProgramSums(grid, geometry, h_TNE, carry=shape.carry > 0, blocks=1)
        launch(
            write_backward, grid, geometry,
            h_TNE, y_TD, dout_TNE.contiguous(), p.weight_KE, p.routing_NK, p.scale_NK,
            dh_TNE, dy_TD, sums.weight_PKE, sums.routing_P, sums.scale_P, *shape.scalars(h_TNE),
        )  # fmt: skip
        return None, dh_TNE, dy_TD, *unfold(columns, *sums.total())


class _WriteRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, shape: _Shape, h_TNE: Tensor, y_TD: Tensor, norm_D: Tensor | None, *columns: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h_TNE, y_TD = h_TNE.contiguous(), y_TD.contiguous()
        ctx.shape = shape
        norm = _Norm.forward(h_TNE, norm_D)
        ctx.save_for_backward(h_TNE, y_TD, norm_D, norm.inverse_T, *columns)
        geometry, out_TNE = shape.geometry(write_read_forward, h_TNE), torch.empty_like(h_TNE)
        x_TME = h_TNE.new_empty(h_TNE.shape[0], shape.m, h_TNE.shape[-1])
        w, r = _fold_both(columns, h_TNE.dtype)
        launch(
            write_read_forward, tiles(h_TNE, geometry), geometry,
            h_TNE, y_TD, w.weight_KE, w.routing_NK, w.scale_NK, r.weight_KE, r.routing_NK, r.scale_NK,
            out_TNE, x_TME, norm.weight_D, norm.inverse_T, *shape.scalars(h_TNE), shape.norm_eps,
        )  # fmt: skip
        return out_TNE, x_TME.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TNE: Tensor, dx_TD: Tensor):
        h_TNE, y_TD, norm_D, inverse_T, *columns = ctx.saved_tensors
        shape = ctx.shape
        geometry = shape.geometry(write_read_backward, h_TNE)
        w, r = _fold_both(columns, h_TNE.dtype)
        dh_TNE, dy_TD = torch.empty_like(h_TNE), torch.empty_like(y_TD)
        grid = programs(h_TNE, tiles(h_TNE, geometry))
        sums = ProgramSums(grid, geometry, h_TNE, carry=shape.carry > 0, blocks=2)
        norm = _Norm.backward(grid, norm_D, inverse_T)
        scratch = h_TNE.new_empty(grid * geometry.scratch, dtype=torch.float32)
        launch(
            write_read_backward, grid, geometry,
            h_TNE, y_TD, dx_TD.contiguous(), dout_TNE.contiguous(),
            w.weight_KE, w.routing_NK, w.scale_NK, r.weight_KE, r.routing_NK, r.scale_NK,
            dh_TNE, dy_TD, sums.weight_PKE, sums.routing_P, sums.scale_P, scratch,
            norm.weight_D, norm.inverse_T, norm.sums_PME, *shape.scalars(h_TNE),
        )  # fmt: skip
        routing_NK, scale_NK, weight_KE = sums.total()
        split = shape.carry + shape.m
        written = unfold(Columns(*columns[:4]), routing_NK[:, :split], scale_NK[:, :split], weight_KE[:split])
        was_read = unfold(Columns(*columns[4:]), routing_NK[:, split:], scale_NK[:, split:], weight_KE[split:])
        return None, dh_TNE, dy_TD, norm.gradient(norm_D), *written, *was_read


def _fold_both(columns: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Folded, Folded]:
    return fold(Columns(*columns[:4]), dtype), fold(Columns(*columns[4:]), dtype)
