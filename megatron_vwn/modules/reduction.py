"""Reduction: from the last over-width state to one vector of the backbone's width, before the final norm and head."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vwn import ops
from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.fp8_linear import fp8_linear, product
from megatron_vwn.modules.group_norm import GroupNorm
from megatron_vwn.modules.stream_module import PartitionedModule


class Reduction(PartitionedModule):
    """X = W_reduce GroupNorm(H), with W_reduce = averaging the copies of each segment + weight [D, N, E] / sqrt(D').

    The averaging has few entries, of size 1/r, and an Adam step moves every entry of the weight by about the learning
    rate, whatever its gradient: undivided, the first steps would bury the averaging under noise right before the head.
    The paper divides the logits of A and B by sqrt(E) in the same way. --vwn-linear plain leaves the division out.

    Args:
        config: the backbone's config.
        virtual_width: the stream.
        pg_collection: process groups; ``tp`` is used.
    """

    def __init__(
        self, config: TransformerConfig, virtual_width: VirtualWidthConfig, pg_collection: ProcessGroupCollection
    ):
        super().__init__(config, virtual_width, pg_collection)
        self.divisor = virtual_width.linear_divisor(virtual_width.over_width(config.hidden_size))
        self.add_parameter("weight", config.hidden_size, virtual_width.n, self.segment_size, channel_dim=2)
        self.fp8 = fp8_linear(config, virtual_width.n * self.local_segment_size, config.hidden_size, end="last")
        if virtual_width.reduce_norm:
            self.norm = GroupNorm(config, virtual_width, pg_collection)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """This rank's over-width state [s, b, N * E] to [s, b, D] in the model's dtype, whole on every rank."""
        vw = self.virtual_width
        h_TNE = self.segments(hidden_states)
        if vw.reduce_norm:
            h_TNE = self.norm(h_TNE)
        mean_TME = self.partition.gather_channels(ops.average_copies(h_TNE, vw.m))
        flat_TF = h_TNE.flatten(1).to(self.weight.dtype)
        projected_TD = product(flat_TF, self.weight.flatten(1), self.fp8) / self.divisor
        x_TD = mean_TME.flatten(1) + self.partition.sum_over_channels(projected_TD)
        return x_TD.to(self.config.params_dtype).view(*hidden_states.shape[:-1], self.config.hidden_size)
