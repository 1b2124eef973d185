"""Parameters as kernels take them, and gradients as autograd wants them back.

The norm's weight is folded into W, because (h g / rms) W = h (g o W) / rms: the kernels never see the norm's weight and
divide once per segment, after the product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vwn.ops.kernels.geometry import Geometry
from megatron_vwn.ops.parameters import ConnectionParameters


class Columns(NamedTuple):
    """Some columns of a connection's parameters; None where the connection is static. Autograd sees these tensors."""

    routing_NK: Tensor
    scale_NK: Tensor | None
    weight_EK: Tensor | None
    norm_E: Tensor | None

    @classmethod
    def of(cls, p: ConnectionParameters, columns: slice) -> "Columns":
        """The columns that a read or a write needs."""
        if not p.dynamic:
            return cls(p.routing_NK[:, columns], None, None, None)
        return cls(p.routing_NK[:, columns], p.scale_NK[:, columns], p.weight_EK[:, columns], p.norm_E)


class Folded(NamedTuple):
    """What a kernel is given: routing and S in fp32, (g o W)^T in the stream's dtype; dummies where it is static."""

    routing_NK: Tensor
    scale_NK: Tensor
    weight_KE: Tensor


def fold(columns: Columns, dtype: torch.dtype) -> Folded:
    """Contiguous tensors for a kernel."""
    routing_NK = columns.routing_NK.float().contiguous()
    if columns.weight_EK is None:
        return Folded(routing_NK, routing_NK, routing_NK)
    weight_EK = columns.norm_E.float()[:, None] * columns.weight_EK.float()
    return Folded(routing_NK, (1 + columns.scale_NK.float()).contiguous(), weight_EK.T.to(dtype).contiguous())


def unfold(columns: Columns, routing_NK: Tensor, scale_NK: Tensor, weight_KE: Tensor) -> Columns:
    """Gradients of the columns from those of ``Folded``, each in its parameter's dtype."""
    routing_NK = routing_NK.to(columns.routing_NK.dtype)
    if columns.weight_EK is None:
        return Columns(routing_NK, None, None, None)
    weight_EK = weight_KE.T
    return Columns(
        routing_NK,
        scale_NK.to(columns.scale_NK.dtype),
        (weight_EK * columns.norm_E.float()[:, None]).to(columns.weight_EK.dtype),
        (weight_EK * columns.weight_EK.float()).sum(-1).to(columns.norm_E.dtype),
    )


class ProgramSums:
    """fp32 sums that the programs of a backward kernel keep, each for itself: no atomics, so every run has the same
    bits.

    Args:
        programs: how many run.
        geometry: their tile.
        h_TNE: the stream, for its device.
        carry: whether there is a block of n columns of a carry.
        blocks: blocks of m columns behind it, one for each read or write.
    """

    def __init__(self, programs: int, geometry: Geometry, h_TNE: Tensor, *, carry: bool, blocks: int):
        self.geometry = geometry
        self.blocks = [(geometry.rows, geometry.padded_n, geometry.n)] * carry
        self.blocks += [(geometry.backbone_rows, geometry.padded_m, geometry.m)] * blocks
        columns = sum(width for width, _, _ in self.blocks)
        coefficients = sum(size for _, _, size in self.blocks)
        self.weight_PKE = h_TNE.new_zeros(programs, coefficients, geometry.segment_size, dtype=torch.float32)
        self.routing_P = h_TNE.new_zeros(programs, geometry.rows * columns, dtype=torch.float32)
        self.scale_P = torch.zeros_like(self.routing_P)

    def total(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of routing [N, K], scale [N, K] and weight [K, E]; K = carry, then each block."""
        return self._collapse(self.routing_P), self._collapse(self.scale_P), self.weight_PKE.sum(0)

    def _collapse(self, sums_P: Tensor) -> Tensor:
        """A program's matrices repeat for every token of its tile; off the diagonal of tokens they are zero."""
        geometry, parts, start, sums = self.geometry, [], 0, sums_P.sum(0)
        for width, padded, size in self.blocks:
            end = start + geometry.rows * width
            matrix = sums[start:end].view(geometry.tokens, geometry.padded_n, width // padded, padded)
            parts.append(matrix.sum((0, 2))[: geometry.n, :size])
            start = end
        return torch.cat(parts, dim=1)
