"""torch's norms under sequence parallelism, and norms that a connection's read can do."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from megatron_vwn import ops


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


class SharedNorm:
    """The RMSNorm of a sublayer's input, which the read of its connection may do in its place.

    The module stays where it is, with its parameter, and is called by the stock layer as ever, but returns what is
    already normalised as it came.

    Args:
        norm: the layer's module, whose ``forward`` is replaced.
    """

    def __init__(self, norm: torch.nn.Module):
        self._norm, self._compute, self._done = norm, norm.forward, False
        norm.forward = self._forward

    @classmethod
    def of(cls, layer: torch.nn.Module) -> "SharedNorm | None":
        """The norm of a Megatron layer's sublayer, if it is a module of its own that nothing else deals with.

        None where Transformer Engine fuses it into its linear layer, for other kinds of norm, and where Megatron
        recomputes or offloads it, which a norm that only passes on its input would break.
        """
        found = [getattr(layer, name, None) for name in ("input_layernorm", "pre_mlp_layernorm", "norm")]
        norms = [norm for norm in found if not isinstance(norm, IdentityOp | None)]
        busy = ("recompute_input_layernorm", "recompute_pre_mlp_layernorm", "offload_attn_norm", "offload_mlp_norm")
        if len(norms) != 1 or any(getattr(layer, name, False) for name in busy):
            return None
        (norm,) = norms
        return cls(norm) if _is_rms_norm(norm, layer.config) else None

    def __call__(self) -> ops.InputNorm:
        """What the read needs. Calls the module, because that is where Megatron's data parallelism waits for the
        parameter (see ``Connection.forward``)."""
        return self._norm()

    @contextmanager
    def done(self) -> Iterator[None]:
        """Inside, what the module gets is normalised."""
        self._done = True
        try:
            yield
        finally:
            self._done = False

    def _forward(self, x: Tensor | None = None, *args, **kwargs) -> Tensor | ops.InputNorm:
        if x is None:
            return ops.InputNorm(self._norm.weight, self._norm.eps)
        return x if self._done else self._compute(x, *args, **kwargs)


def _is_rms_norm(norm: torch.nn.Module, config: TransformerConfig) -> bool:
    if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
        return False
    kinds = [torch.nn.RMSNorm]
    if HAVE_TE:
        import transformer_engine.pytorch as te

        kinds.append(te.RMSNorm)
    # Not a subclass of theirs, which may return a residual besides. The kernels divide by what eps keeps from zero.
    return type(norm) in kinds and norm.weight is not None and bool(norm.eps)
