"""What Connection, Expansion and Reduction share: parameters that follow the partition of the stream."""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

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

    def add_parameter(self, name: str, *shape: int, value: float = 0.0, channel_dim: int | None = None) -> None:
        """Register a parameter of the model's dtype, filled with one value.

        No random number is drawn, so a fresh model has its baseline's backbone, seed for seed.

        Args:
            name: attribute and state-dict name.
            shape: this rank's shape.
            value: what fills it.
            channel_dim: its dimension of E, a shard under the width partition; None where all ranks hold the same.
        """
        # Megatron's own rule: its modules too leave the device to the context in these two cases.
        follows_context = self.config.use_cpu_initialization or self.config.init_model_with_meta_device
        device = None if follows_context else torch.cuda.current_device()
        tensor = torch.full(shape, value, dtype=self.config.params_dtype, device=device)
        self.register_parameter(name, self.partition.mark(torch.nn.Parameter(tensor), channel_dim))
        if channel_dim is not None and self.partition.splits_width:
            self._sharded_axes[name] = channel_dim

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
