"""Whole sequences from the shares of a context-parallel group, and back.

Megatron cuts a sequence into 2 CP chunks and gives rank i chunks i and 2 CP - 1 - i, which balances causal attention.
"""

import torch
from torch import Tensor


def whole_sequence(tokens_bs: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """All tokens [b, CP * s] of this rank's [b, s]; for integers, which carry no gradient."""
    if group.size() == 1:
        return tokens_bs
    shares = [torch.empty_like(tokens_bs) for _ in range(group.size())]
    torch.distributed.all_gather(shares, tokens_bs.contiguous(), group=group)
    halves = [share.chunk(2, dim=1) for share in shares]
    return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)], dim=1)


def own_share(whole: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """This rank's [b, s, ...] of a whole sequence [b, CP * s, ...]."""
    if group.size() == 1:
        return whole
    chunks = whole.chunk(2 * group.size(), dim=1)
    return torch.cat([chunks[group.rank()], chunks[-1 - group.rank()]], dim=1)
