"""Megatron's sublayers with a connection in place of their residual.

One symbol of a hybrid pattern is one sublayer T of the paper, its own pre-norm included. Megatron adds the residual in
the layer's bias-dropout-add; ``branch_only`` leaves the addition out, so that the stock layer computes T(x) and the
connection does the rest.
"""

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from torch import Tensor

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.boundary import PendingWrite, arrive
from megatron_vwn.modules.connection import Connection


def branch_only(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """A bias-dropout-add that does not add: the layer returns dropout(output + bias)."""

    def bias_dropout(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        return torch.nn.functional.dropout(output, p=prob, training=training)

    return bias_dropout


class _Connected:
    """Mixin before a Megatron layer: read, the stock layer, write.

    Attributes:
        leaves_write: whether the caller hands what this layer returns, untouched, to a layer of this kind, which can do
            the write together with its own read; set by the stack.
        observer: gets the state that the sublayer has read, if somebody set one.
    """

    leaves_write = False
    observer: Callable[[Tensor], None] | None = None

    def __init__(
        self,
        config: TransformerConfig,
        *args,
        virtual_width: VirtualWidthConfig,
        pg_collection: ProcessGroupCollection,
        **kwargs,
    ):
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        self.connection = Connection(config, virtual_width, pg_collection)

    def forward(self, hidden_states: Tensor | PendingWrite, *args, **kwargs):
        """Hidden states are this rank's over-width state [s, b, N * E], or the write that leads to it; everything else
        is the stock layer's."""
        arrival = arrive(self.connection, hidden_states)
        if self.observer is not None:
            self.observer(arrival.state)
        output = super().forward(arrival.x, *args, **kwargs)
        if isinstance(output, tuple):
            output, *rest = output
            return arrival.leave(output, wait=self.leaves_write), *rest
        return arrival.leave(output, wait=self.leaves_write)


class VirtualWidthTransformerLayer(_Connected, TransformerLayer):
    """Attention of any kind."""


class VirtualWidthMLPLayer(_Connected, MLPLayer):
    """Dense MLP."""


class VirtualWidthMoELayer(_Connected, MoETransformerLayer):
    """Mixture of experts."""


class VirtualWidthMambaLayer(_Connected, MambaLayer):
    """Mamba mixer."""


CONNECTED = {
    TransformerLayer: VirtualWidthTransformerLayer,
    MLPLayer: VirtualWidthMLPLayer,
    MoETransformerLayer: VirtualWidthMoELayer,
    MambaLayer: VirtualWidthMambaLayer,
}
