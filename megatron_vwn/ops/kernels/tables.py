"""What a kernel is given of a connection: its parameters as they are, and W with the norm's weight folded in.

(h g / rms) W = h (g o W) / rms, so no kernel sees the norm's weight, and each divides once per segment, after the
product. One small kernel makes (g o W)^T; the gradient goes back through it in ``weight``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.geometry import Tile
from megatron_vwn.ops.kernels.launch import launch
from megatron_vwn.ops.parameters import ConnectionParameters

_CHANNELS = 32


class Prepared(NamedTuple):
    """A connection as kernels take it.

    Attributes:
        m, n, num_carry, dynamic, eps: as in ``ConnectionParameters``.
        sigmoid: whether the gate is the sigmoid, not tanh.
        routing_NK: the learned deviations themselves, contiguous, in any dtype and the PARAMETERS' order of columns.
        scale_NK: likewise; None for a static connection.
        weight_KE: (norm o W)^T in the stream's dtype and the KERNELS' order of columns; None where it is not needed.
    """

    m: int
    n: int
    num_carry: int
    dynamic: bool
    sigmoid: bool
    eps: float
    routing_NK: Tensor
    scale_NK: Tensor | None
    weight_KE: Tensor | None

    @property
    def columns(self) -> int:
        """K."""
        return 2 * self.m + self.num_carry


def prepare(p: ConnectionParameters, dtype: torch.dtype | None) -> Prepared:
    """One small launch, for W in this dtype; None is for a write, which needs no W."""
    weight_KE = None
    if p.dynamic and dtype is not None:
        weight_EK = p.weight_EK.contiguous()
        e, k = weight_EK.shape
        weight_KE = torch.empty(k, e, dtype=dtype, device=weight_EK.device)
        constants = {"K": k, "M": p.m, "E": e, "PADDED": triton.next_power_of_2(k), "B": _CHANNELS}
        launch(fold_weight, triton.cdiv(e, _CHANNELS), Tile(), weight_EK, p.norm_E, weight_KE, **constants)
    return Prepared(
        m=p.m,
        n=p.n,
        num_carry=p.num_carry,
        dynamic=p.dynamic,
        sigmoid=p.gate == "sigmoid",
        eps=p.eps,
        routing_NK=p.routing_NK.contiguous(),
        scale_NK=p.scale_NK.contiguous() if p.dynamic else None,
        weight_KE=weight_KE,
    )


@triton.jit
def fold_weight(
    weight_ptr, norm_ptr, out_ptr,
    K: tl.constexpr, M: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out[k, e] = norm[e] W[e, (k + m) mod K]: a program makes some channels of every column."""
    e = tl.program_id(0) * B + tl.arange(0, B)
    k = tl.arange(0, PADDED)
    exists = (e < E)[:, None] & (k < K)[None, :]
    norm = tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + e[:, None] * K + ((k + M) % K)[None, :], mask=exists, other=0.0).to(tl.float32)
    out = tl.trans(weight * norm[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + k[:, None] * E + e[None, :], out, mask=tl.trans(exists))
