"""The arithmetic of virtual width on plain tensors; imports torch and nothing of Megatron.

``read`` and ``write`` are pure functions of the state and pass no coefficients to each other. The module
``parameters`` has the legend of shape suffixes and what a connection is made of, ``reference`` the paper's equations,
``composed`` the torch implementation that the names below stand for.
"""

from megatron_vwn.ops.composed import average_copies, group_norm, read, tile, write
from megatron_vwn.ops.parameters import ConnectionParameters

__all__ = ["ConnectionParameters", "average_copies", "group_norm", "read", "tile", "write"]
