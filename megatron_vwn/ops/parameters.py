"""What one connection is made of, as plain tensors, and the shape suffixes that all of ops/ and modules/ use.

Shape suffixes:
    T   tokens (sequence times batch, flattened)
    N   n, segments of the over-width state
    M   m, segments of one backbone vector
    E   D/m, channels of a segment (under the width partition: this rank's share of them)
    D   hidden size of the backbone, D = M * E
    K   coefficients per segment: m read + (n or 0) carry + m write, in this order

``h_TNE`` is the over-width state with E contiguous, ``x_TD`` and ``y_TD`` are a sublayer's input and output.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class ConnectionParameters(NamedTuple):
    """One connection. Learned tensors are deviations from the paper's initial values, so all but a norm start at zero.

    Row j of every [N, K] tensor belongs to segment j: its read and carry columns weigh what is taken FROM segment j,
    its write columns what is added TO segment j. Row j's write columns are therefore column j of the paper's B.

    Attributes:
        m: fraction rate.
        n: number of segments.
        gate: "tanh" (A(H) = S o tanh(z) + A) or "sigmoid" (A(H) = A o 2 sigmoid(S o z)).
        eps: added to the mean square inside the RMSNorm of H.
        routing_NK: deviation of [A_read | A_carry | B^T] from the initial pattern.
        scale_NK: deviation of S from one; None for a static connection.
        weight_EK: [W_a_read | W_a_carry | W_b]; None for a static connection.
        norm_E: RMSNorm weight itself, initially ones; None for a static connection.
        doubly_stochastic: whether the carry is the Sinkhorn projection of what would else be added to the identity.
        sum_over_ranks: sums a tensor, in place, over the ranks that share the channels of each segment (the width
            partition); None where a rank has them all.
        ranks: how many they are.
        kernels: what computes: "triton", "torch", or "auto" for Triton wherever it can.
    """

    m: int
    n: int
    gate: Literal["tanh", "sigmoid"]
    eps: float
    routing_NK: Tensor
    scale_NK: Tensor | None = None
    weight_EK: Tensor | None = None
    norm_E: Tensor | None = None
    doubly_stochastic: bool = False
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    ranks: int = 1
    kernels: Literal["auto", "triton", "torch"] = "auto"

    @property
    def learned(self) -> tuple[Tensor | None, ...]:
        """The tensors: routing, scale, weight, norm."""
        return self.routing_NK, self.scale_NK, self.weight_EK, self.norm_E

    def with_learned(self, tensors: Iterable[Tensor | None]) -> "ConnectionParameters":
        """The same connection with other tensors, in the order of ``learned``."""
        routing_NK, scale_NK, weight_EK, norm_E = tensors
        return self._replace(routing_NK=routing_NK, scale_NK=scale_NK, weight_EK=weight_EK, norm_E=norm_E)

    def without_learned(self) -> "ConnectionParameters":
        """What an autograd function keeps beside the tensors that it saves: a node must not hold others."""
        return self.with_learned([None] * 4)

    @property
    def dynamic(self) -> bool:
        """Whether coefficients depend on the token."""
        return self.weight_EK is not None

    @property
    def num_carry(self) -> int:
        """n, or 0 where the carry is the identity."""
        return self.routing_NK.shape[1] - 2 * self.m


class Gates(NamedTuple):
    """What a read computes once of its state and hands to the write of the same connection; opaque but to the
    implementation that made it. A static connection has none.

    In the backward pass the gradient slot of ``logits_TNK`` carries the gradient of the COEFFICIENTS, in the order and
    the dtype of the logits: the write knows its part of them and the read completes it before it goes on to the logits.

    Attributes:
        logits_TNK: RMSNorm(H) W / tau, in the stream's dtype.
        inverse_rms_TN: 1 / rms of each segment, fp32 (fp64 for a stream in fp64); without a gradient.
    """

    logits_TNK: Tensor
    inverse_rms_TN: Tensor


# The doubly stochastic carry starts within n e^-8 of the identity, and after 20 rounds its rows and columns sum to one
# as well as training needs (columns, which come last, exactly).
SINKHORN_KAPPA = 8.0
SINKHORN_ITERATIONS = 20


def initial_pattern(m: int, n: int, num_carry: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The initial [A_read | A_carry | B^T] as an [N, K] tensor: [I_m; 0], I_n, and B^T[j, i] = 1 where i = j mod m."""
    segment_N = torch.arange(n, device=device)
    pattern_NK = torch.zeros(n, 2 * m + num_carry, dtype=dtype, device=device)
    pattern_NK[segment_N[:m], segment_N[:m]] = 1
    if num_carry:
        pattern_NK[segment_N, m + segment_N] = 1
    pattern_NK[segment_N, m + num_carry + segment_N % m] = 1
    return pattern_NK


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, else the dtype itself: coefficients, norms and sums never use fewer bits."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
