"""Megatron's torch gated delta net without the package flash-linear-attention."""

import torch
from megatron.core.ssm.gated_delta_net import common


def allow_torch_gated_delta_net() -> None:
    """In deterministic mode Megatron takes one function from the package, and none of its kernels: give it that one."""
    if not common.HAVE_FLA:
        common.HAVE_FLA = True
        common.l2norm = l2norm


def l2norm(x: torch.Tensor) -> torch.Tensor:
    """[..., d], each vector divided by its length, as the package does it."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
