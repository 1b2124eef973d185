"""The arithmetic of virtual width on plain tensors; imports torch and Triton and nothing of Megatron.

``read`` computes the gates of a connection once and hands them to its ``write``. The module ``parameters`` has the
legend of shape suffixes and what a connection is made of, ``reference`` the paper's equations, ``eager`` the torch
implementation, ``kernels`` the fused one, and ``dispatch`` chooses between the two for the names below. ``connection``
makes a ``torch.nn.Module`` of them, ``megatron_vwn.Connection``. Names are imported when they are first used: ``costs``
needs no torch.
"""

from typing import TYPE_CHECKING

from megatron_vwn.lazy import lazily

if TYPE_CHECKING:
    from megatron_vwn.ops.dispatch import (
        COST_OF_TORCH,
        group_norm,
        implementation,
        read,
        why_not_group_norm_kernel,
        why_not_kernels,
        write,
        write_read,
    )
    from megatron_vwn.ops.eager import average_copies, tile
    from megatron_vwn.ops.parameters import ConnectionParameters, Gates

__all__ = [
    "COST_OF_TORCH",
    "ConnectionParameters",
    "Gates",
    "average_copies",
    "group_norm",
    "implementation",
    "read",
    "tile",
    "why_not_group_norm_kernel",
    "why_not_kernels",
    "write",
    "write_read",
]

_HOMES = dict.fromkeys(__all__, "megatron_vwn.ops.dispatch")
_HOMES |= dict.fromkeys(("average_copies", "tile"), "megatron_vwn.ops.eager")
_HOMES |= dict.fromkeys(("ConnectionParameters", "Gates"), "megatron_vwn.ops.parameters")

__getattr__ = lazily(__name__, _HOMES)
