"""torch's norms under sequence parallelism."""

import copy

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm


class TorchNorm(WrappedTorchNorm):
    """torch.nn.LayerNorm or RMSNorm by the config, also under sequence parallelism, which Megatron's wrapper refuses.

    Nothing in the norm itself stands against it: each token is normalised alone. Only its parameters see this rank's
    tokens, so they are marked for Megatron to sum their gradients over the group.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs) -> torch.nn.Module:
        """Build the norm: [..., hidden_size] to the same shape."""
        without_sequence_parallel = copy.copy(config)
        without_sequence_parallel.sequence_parallel = False
        norm = super().__new__(cls, without_sequence_parallel, hidden_size, eps, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
