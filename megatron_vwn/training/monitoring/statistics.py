"""What connections did with the tokens of a batch: sums that add up over tokens and ranks, and what follows from them.

A connection is observed with the very state that its sublayer read. Its coefficients are computed once more from it, by
``ops.eager`` whatever computes the model, so nothing of the model's own computation is touched or kept.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vwn.modules.connection import Connection
from megatron_vwn.ops import eager
from megatron_vwn.ops.parameters import initial_pattern
from megatron_vwn.parallel.partition import StreamPartition
from megatron_vwn.training.monitoring.snapshot import SATURATED, Place

# Coefficients and channels of so many numbers are held at once.
_NUMBERS_AT_ONCE = 1 << 22


class Observation(NamedTuple):
    """Sums over this rank's tokens, in fp64.

    Attributes:
        sums: number of tokens, number of saturated gates, then of the dynamic part of [A_read | A_carry | B^T] the
            values and the squares, each [N, K] flattened.
        gram_NN: H H^T over this rank's channels.
        static_NK: deviation of the static part from the initial pattern; no sum.
    """

    sums: Tensor
    gram_NN: Tensor
    static_NK: Tensor


@torch.no_grad()
def observe(connection: Connection, hidden_states: Tensor) -> Observation:
    """Observe one connection. Under the width partition the tensor-parallel ranks communicate, so all have to.

    Args:
        connection: of the sublayer.
        hidden_states: this rank's state [s, b, N * E] that the sublayer read.
    """
    p = connection()
    h_TNE = connection.segments(hidden_states)
    constant = p._replace(weight_EK=None, scale_NK=None, norm_E=None)
    dtype = eager.accumulation_dtype(h_TNE.dtype)
    constant_NK = eager.coefficients(None, constant, dtype)[0]
    pattern_NK = initial_pattern(p.m, p.n, p.num_carry, dtype=dtype, device=h_TNE.device)
    static_NK = (constant_NK - pattern_NK).double()
    numbers = torch.zeros(2, dtype=torch.float64, device=h_TNE.device)
    dynamic_NK, squares_NK = torch.zeros_like(static_NK), torch.zeros_like(static_NK)
    gram_NN = torch.zeros(p.n, p.n, dtype=torch.float64, device=h_TNE.device)
    at_once = max(1, _NUMBERS_AT_ONCE // (p.n * max(connection.num_coefficients, h_TNE.shape[-1])))
    for part_TNE in h_TNE.split(at_once):
        part_TNE = part_TNE.to(dtype)
        numbers[0] += part_TNE.shape[0]
        gram_NN += (part_TNE @ part_TNE.mT).sum(0, dtype=torch.float64)
        if p.dynamic:
            logits_TNK, _ = eager.logits(part_TNE, p)
            gate_TNK = eager.gate(logits_TNK, p)
            part_TNK = eager.coefficients(gate_TNK, p, dtype) - constant_NK
            dynamic_NK += part_TNK.sum(0, dtype=torch.float64)
            squares_NK += part_TNK.square().sum(0, dtype=torch.float64)
            numbers[1] += (gate_TNK.abs() > SATURATED).sum()
    return Observation(torch.cat([numbers, dynamic_NK.flatten(), squares_NK.flatten()]), gram_NN, static_NK)


def total_over_tokens(
    observed: Mapping[Place, Observation], partition: StreamPartition, groups: ProcessGroupCollection
) -> Tensor:
    """Sum observations over all tokens: those of every rank of the data- and context-parallel group and, where each
    has its own, of the tensor-parallel group.

    Args:
        observed: this pipeline stage's, in one order on all these ranks.
        partition: of the stream.
        groups: ``tp`` and ``dp_cp`` are used.

    Returns:
        One row per connection: ``sums``, ``gram_NN`` and ``static_NK``, flattened; fp64.
    """
    sums = torch.stack([o.sums for o in observed.values()])
    gram = torch.stack([o.gram_NN.flatten() for o in observed.values()])
    if groups.dp_cp.size() > 1:
        torch.distributed.all_reduce(sums, group=groups.dp_cp)
        torch.distributed.all_reduce(gram, group=groups.dp_cp)
    if partition.kind == "sequence":
        torch.distributed.all_reduce(sums, group=groups.tp)
    if partition.kind != "replicated":  # other tokens, or other channels of the same tokens
        torch.distributed.all_reduce(gram, group=groups.tp)
    return torch.cat([sums, gram, torch.stack([o.static_NK.flatten() for o in observed.values()])], dim=1)
