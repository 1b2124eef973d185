"""Reduction: from the last over-width state to one vector of the backbone's width, before the final norm and head."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vwn import ops
from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.partitioned import PartitionedModule


class Reduction(PartitionedModule):
    """X = W_reduce GroupNorm(H), W_reduce stored as its deviation [D, N, E] from averaging the copies of each segment.

    The group norm, with groups of D channels, is an RMS norm in models that use RMSNorm and a layer norm in those that
    use LayerNorm. Its weight and bias are whole on every rank and one-dimensional, so they do not decay.

    Args:
        config: the backbone's config.
        virtual_width: the stream.
        pg_collection: process groups; ``tp`` is used.
    """

    def __init__(
        self, config: TransformerConfig, virtual_width: VirtualWidthConfig, pg_collection: ProcessGroupCollection
    ):
        super().__init__(config, virtual_width, pg_collection)
        self.add_parameter("weight", config.hidden_size, virtual_width.n, self.local_segment_size, channel_dim=2)
        self.register_parameter("norm_weight", None)
        self.register_parameter("norm_bias", None)
        if virtual_width.reduce_norm:
            over_width = virtual_width.over_width(config.hidden_size)
            self.add_parameter("norm_weight", over_width, value=1.0)
            if config.normalization == "LayerNorm":
                self.add_parameter("norm_bias", over_width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """This rank's over-width state [s, b, N * E] to [s, b, D] in the model's dtype, whole on every rank."""
        vw = self.virtual_width
        h_TNE = hidden_states.reshape(-1, vw.n, self.local_segment_size)
        if self.norm_weight is not None:
            h_TNE = ops.group_norm(
                h_TNE,
                self._local_channels(self.norm_weight),
                self._local_channels(self.norm_bias),
                m=vw.m,
                eps=self.config.layernorm_epsilon,
                segment_size=self.segment_size,
                total=self.partition.total,
            )
        mean_TME = self.partition.gather_channels(ops.average_copies(h_TNE, vw.m))
        projected_TD = h_TNE.flatten(1).to(self.weight.dtype) @ self.weight.flatten(1).T
        x_TD = mean_TME.flatten(1) + self.partition.sum_over_channels(projected_TD)
        return x_TD.to(self.config.params_dtype).view(*hidden_states.shape[:-1], self.config.hidden_size)

    def _local_channels(self, parameter: Tensor | None) -> Tensor | None:
        """This rank's [N, E] of a whole [D']; the gradient is gathered, so it is complete on every rank."""
        if parameter is None:
            return None
        return self.partition.scatter_channels(parameter.view(self.virtual_width.n, self.segment_size))
