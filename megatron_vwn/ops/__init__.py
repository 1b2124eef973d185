"""The arithmetic of virtual width on plain tensors; imports torch and Triton and nothing of Megatron.

``read`` and ``write`` are pure functions of the state and pass no coefficients to each other. The module
``parameters`` has the legend of shape suffixes and what a connection is made of, ``reference`` the paper's equations,
``eager`` the torch implementation, ``kernels`` the fused one, and ``dispatch`` chooses between the two for the names
below. ``connection`` makes a ``torch.nn.Module`` of them, ``megatron_vwn.Connection``.
"""

from megatron_vwn.ops.dispatch import Plan, composed, group_norm, plan, read, why_not_kernels, write, write_read
from megatron_vwn.ops.eager import average_copies, tile
from megatron_vwn.ops.parameters import ConnectionParameters, InputNorm

__all__ = [
    "ConnectionParameters",
    "InputNorm",
    "Plan",
    "average_copies",
    "composed",
    "group_norm",
    "plan",
    "read",
    "tile",
    "why_not_kernels",
    "write",
    "write_read",
]
