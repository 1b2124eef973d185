"""Group norm of the over-width state, in groups of one backbone vector."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vwn import ops
from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.stream_module import PartitionedModule
from megatron_vwn.ops import eager


class GroupNorm(PartitionedModule):
    """A norm over groups of D channels, that is of m segments; of all D' where n is no multiple of m.

    RMS norm in models that use RMSNorm, layer norm in those that use LayerNorm. Weight and bias are whole on every rank
    and one-dimensional, so they do not decay.
    """

    def __init__(
        self, config: TransformerConfig, virtual_width: VirtualWidthConfig, pg_collection: ProcessGroupCollection
    ):
        super().__init__(config, virtual_width, pg_collection)
        self.group = virtual_width.norm_group
        over_width = virtual_width.over_width(config.hidden_size)
        self.add_parameter("weight", over_width, value=1.0)
        self.register_parameter("bias", None)
        if config.normalization == "LayerNorm":
            self.add_parameter("bias", over_width)

    def forward(self, h_TNE: Tensor) -> Tensor:
        """This rank's state, normed, in the accumulation dtype, or in its own where a kernel computes."""
        weight = self._local_channels(self.weight)
        bias = None if self.bias is None else self._local_channels(self.bias)
        eps = self.config.layernorm_epsilon
        if not self.partition.splits_width:
            return ops.group_norm(h_TNE, weight, bias, m=self.group, eps=eps, kernels=self.virtual_width.kernels)
        return eager.group_norm(
            h_TNE, weight, bias, m=self.group, eps=eps, segment_size=self.segment_size, total=self.partition.total
        )

    def _local_channels(self, parameter: Tensor) -> Tensor:
        """This rank's [N, E] of a whole [D']; the gradient is gathered, so it is complete on every rank."""
        return self.partition.scatter_channels(parameter.view(self.virtual_width.n, self.segment_size))
