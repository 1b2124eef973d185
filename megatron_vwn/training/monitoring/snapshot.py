"""What monitoring knows of a model at one step, as plain numbers on the CPU; nothing here imports Megatron."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vwn.ops.parameters import initial_pattern
from megatron_vwn.training.monitoring.depth import independent_directions, participation_ratio, receptive_field

# A gate beyond it has lost nine tenths of its slope (1 - tanh^2 < 0.1): it hardly learns any more.
SATURATED = 0.95
# Kinds of parameters: of a connection by their name, of everything else by their module, whose norm counts with it.
OF_CONNECTIONS = ("routing", "scale", "weight", "norm")
OF_MODULES = ("expand", "reduce", "fusion", "ngrams")


class Place(NamedTuple):
    """Which connection: its number from 1, in the trunk (depth 0) over all pipeline stages, or in the layers of a
    further prediction (depth 1 and on)."""

    depth: int
    number: int

    def __str__(self) -> str:
        return f"mtp_{self.depth}_layer_{self.number:03}" if self.depth else f"layer_{self.number:03}"


@dataclass(frozen=True, kw_only=True)
class ConnectionStatistics:
    """One connection over all tokens of a micro-batch; tensors are fp64 on the CPU.

    [N, M + N + M] tensors are [A_read | A_carry | B^T], with the identity where the carry is one.

    Attributes:
        m: fraction rate.
        static: without its dynamic part.
        mean: over tokens.
        spread: standard deviation over tokens.
        dynamic_share: of the squares of all coefficients that are learned, what the dynamic part has, 0 to 1.
        gate_saturation: fraction of gates beyond ``SATURATED``.
        gram_NN: mean of H H^T over tokens and channels.
    """

    m: int
    static: Tensor
    mean: Tensor
    spread: Tensor
    dynamic_share: float
    gate_saturation: float
    gram_NN: Tensor

    @property
    def n(self) -> int:
        """Number of segments."""
        return self.gram_NN.shape[0]

    @property
    def read(self) -> Tensor:
        """A_read [n, m], mean over tokens."""
        return self.mean[:, : self.m]

    @property
    def carry(self) -> Tensor:
        """A_carry [n, n], mean over tokens."""
        return self.mean[:, self.m : -self.m]

    @property
    def write(self) -> Tensor:
        """B [m, n], mean over tokens."""
        return self.mean[:, -self.m :].T

    @property
    def segment_norms(self) -> Tensor:
        """Root mean square of each segment over tokens and channels, [n]."""
        return self.gram_NN.diagonal().sqrt()

    @property
    def effective_segments(self) -> float:
        """How many segments carry the stream's energy, 1 to n."""
        return participation_ratio(self.gram_NN.diagonal())

    @property
    def independent_segments(self) -> float:
        """How many of them are no copies of others, 1 to n."""
        return independent_directions(self.gram_NN)

    @classmethod
    def of(cls, row: Tensor, m: int, n: int, num_carry: int, segment_size: int) -> "ConnectionStatistics":
        """From one row of ``total_over_tokens``, on the CPU.

        Args:
            row: sums, Gram matrix and static part.
            m: fraction rate.
            n: number of segments.
            num_carry: n, or 0 for an identity carry.
            segment_size: E in channels.
        """
        k = 2 * m + num_carry
        numbers, dynamic, squares, gram, static = row.split([2, n * k, n * k, n * n, n * k])
        tokens, saturated = numbers.tolist()
        mean_NK, squares_NK = dynamic.view(n, k) / tokens, squares.view(n, k) / tokens
        static_NK = initial_pattern(m, n, num_carry, dtype=row.dtype, device=row.device) + static.view(n, k)
        spread_NK = (squares_NK - mean_NK.square()).clamp_min(0).sqrt()
        energy = squares_NK.sum()
        identity_NN, zeros_NN = torch.eye(n, dtype=row.dtype), torch.zeros(n, n, dtype=row.dtype)

        def with_carry(c_NK: Tensor, carry_NN: Tensor) -> Tensor:
            return c_NK if num_carry else torch.cat([c_NK[:, :m], carry_NN, c_NK[:, m:]], dim=1)

        return cls(
            m=m,
            static=with_carry(static_NK, identity_NN),
            mean=with_carry(static_NK + mean_NK, identity_NN),
            spread=with_carry(spread_NK, zeros_NN),
            dynamic_share=(energy / (energy + static_NK.square().sum())).item(),
            gate_saturation=saturated / (tokens * n * k),
            gram_NN=gram.view(n, n) / (tokens * segment_size),
        )


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A model's connections at one step.

    Attributes:
        iteration: the step, counted as Megatron's log does.
        connections: of all pipeline stages; the trunk's first, in order.
        gradient_norms: of the whole model by kind of parameter, not clipped; kinds that the model lacks are left out.
        connection_gradient_norms: of all parameters of a connection.
    """

    iteration: int
    connections: dict[Place, ConnectionStatistics]
    gradient_norms: dict[str, float]
    connection_gradient_norms: dict[Place, float]

    @cached_property
    def chains(self) -> dict[int, dict[Place, ConnectionStatistics]]:
        """The connections that follow each other: those of the trunk (0), and of each further prediction."""
        found: dict[int, dict[Place, ConnectionStatistics]] = {}
        for place, connection in self.connections.items():
            found.setdefault(place.depth, {})[place] = connection
        return found

    @cached_property
    def receptive_fields(self) -> dict[int, Tensor]:
        """``receptive_field`` of each chain, with token-mean matrices; numbers and a picture are made of it."""
        return {
            depth: receptive_field(*zip(*((c.read, c.carry, c.write) for c in chain.values()), strict=True))
            for depth, chain in self.chains.items()
        }
