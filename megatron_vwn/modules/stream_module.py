"""What Connection, Expansion and Reduction share: parameters that follow the partition of the stream."""

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.parallel.partition import StreamPartition


class PartitionedModule(MegatronModule):
    """A module that knows how its tensor-parallel group holds the stream.

    Args:
        config: the backbone's config.
        virtual_width: the stream.
        pg_collection: process groups; ``tp`` is used.

    Attributes:
        partition: the partition of the stream.
        segment_size: E of a whole segment, in channels.
        local_segment_size: channels of each segment on this rank.
    """

    def __init__(
        self, config: TransformerConfig, virtual_width: VirtualWidthConfig, pg_collection: ProcessGroupCollection
    ):
        super().__init__(config)
        self.virtual_width = virtual_width
        self.tp_group = pg_collection.tp
        self.partition = StreamPartition.of(config, virtual_width, pg_collection.tp)
        self.segment_size = virtual_width.segment_size(config.hidden_size)
        self.local_segment_size = self.partition.local_segment_size(self.segment_size)
        self._sharded_axes: dict[str, int] = {}

    def add_parameter(
        self,
        name: str,
        *shape: int,
        value: float = 0.0,
        init_method: Callable[[Tensor], object] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        """Register a parameter of the model's dtype.

        Args:
            name: attribute and state-dict name.
            shape: shape of the whole parameter.
            value: what fills it. No random number is drawn then, so the backbone is its baseline's, seed for seed.
            init_method: fills the whole parameter in place, from the generator that all tensor-parallel ranks share.
            channel_dim: its dimension of E, of which this rank keeps its channels under the width partition; None
                where every rank holds all of it.
        """
        # Megatron's own rule: its modules too leave the device to the context in these two cases.
        follows_context = self.config.use_cpu_initialization or self.config.init_model_with_meta_device
        device = None if follows_context else torch.cuda.current_device()
        tensor = torch.full(shape, value, dtype=self.config.params_dtype, device=device)
        if init_method is not None and self.config.perform_initialization:
            init_method(tensor)
        if channel_dim is not None and self.partition.splits_width:
            tensor = tensor.chunk(self.tp_group.size(), dim=channel_dim)[self.tp_group.rank()].clone()
            self._sharded_axes[name] = channel_dim
        self.register_parameter(name, self.partition.mark(torch.nn.Parameter(tensor), channel_dim))

    def segments(self, hidden_states: Tensor) -> Tensor:
        """This rank's over-width state [s, b, N * E] as [T, N, E]."""
        return hidden_states.reshape(-1, self.virtual_width.n, self.local_segment_size)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The same global tensors under every partition: shards of E under width, else replicas."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self._sharded_axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
