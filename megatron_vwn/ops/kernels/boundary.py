"""What every family of kernels is given, and what it makes: one signature, one allocation.

A family has two functions, ``forward(boundary)`` and ``backward(boundary)``, of a write by the connection p, a read by
the connection q, or both at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vwn.ops.kernels.tables import Prepared


class Boundary(NamedTuple):
    """Tensors around a sublayer's end, contiguous; None for what there is not.

    Attributes:
        h_TNE: the state that p has read; for a read alone the one that q reads.
        p, q: the connection that writes, and the one that reads.
        y_TME: the sublayer's output.
        z_TNK: logits of p; None where it is static.
        out_TNE: H', what ``forward`` made of it; this and what follows are for ``backward``.
        z_next_TNK, inverse_rms_TN: logits of q, and 1/rms of the segments that it read.
        dout_TNE: the gradient of H' but for the read's part; None is zero.
        dx_TME: the gradient of X.
        dc_next_TNK: the gradient of q's carry and write coefficients; None is zero. Its read columns are anything, and
            it may be overwritten.
    """

    h_TNE: Tensor
    p: Prepared | None = None
    q: Prepared | None = None
    y_TME: Tensor | None = None
    z_TNK: Tensor | None = None
    out_TNE: Tensor | None = None
    z_next_TNK: Tensor | None = None
    inverse_rms_TN: Tensor | None = None
    dout_TNE: Tensor | None = None
    dx_TME: Tensor | None = None
    dc_next_TNK: Tensor | None = None

    @property
    def read_TNE(self) -> Tensor:
        """The state that q reads."""
        return self.out_TNE if self.p else self.h_TNE

    def made(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Room for what ``forward`` returns: H' [T, N, E] of p; X [T, M, E], logits [T, N, K] and 1/rms [T, N] of q."""
        tokens, n, e = self.h_TNE.shape
        new, dynamic = self.h_TNE.new_empty, self.q is not None and self.q.dynamic
        return (
            torch.empty_like(self.h_TNE) if self.p else None,
            new(tokens, self.q.m, e) if self.q else None,
            new(tokens, n, self.q.columns) if dynamic else None,
            new(tokens, n, dtype=torch.float32) if dynamic else None,
        )

    def gradients(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Room for dH [T, N, E], of H' for a read alone; dY [T, M, E] and dC [T, N, K] of p; dz [T, N, K] of q.

        ``backward`` returns these and dC of q with its read columns. dC of p has its carry and write columns alone.
        """
        return (
            torch.empty_like(self.h_TNE),
            torch.empty_like(self.y_TME) if self.p else None,
            self.h_TNE.new_empty(*self.h_TNE.shape[:2], self.p.columns) if self.p else None,
            torch.empty_like(self.z_next_TNK) if self.q and self.q.dynamic else None,
        )
