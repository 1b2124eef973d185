"""Pipeline stages exchange the over-width state: hidden_size becomes what one rank holds of D'."""

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import TransformerConfig

from megatron_vwn.config import VirtualWidthConfig


class WideP2PCommunicator(P2PCommunicator):
    """Megatron's communicator with receive buffers of the stream's width.

    The schedules size buffers by ``config.hidden_size``. Both of them pass through ``_communicate``, a private method,
    so the supported Megatron versions are pinned and tests cover 1F1B and the interleaved schedule.

    Args:
        pp_group: pipeline-parallel process group.
        config: the backbone's config.
        virtual_width: the stream.
    """

    def __init__(
        self,
        pp_group: torch.distributed.ProcessGroup,
        config: TransformerConfig,
        virtual_width: VirtualWidthConfig,
    ):
        super().__init__(pp_group, config)
        self._channels = virtual_width.over_width(config.hidden_size)
        tensor_parallel_size = config.tensor_model_parallel_size
        partition = virtual_width.resolve_partition(
            tensor_parallel_size=tensor_parallel_size, sequence_parallel=config.sequence_parallel
        )
        if partition == "width":
            self._channels //= tensor_parallel_size

    def _communicate(self, *, tensor_shape, **kwargs):
        if tensor_shape is not None:
            tensor_shape = (*tensor_shape[:-1], self._channels)
        return super()._communicate(tensor_shape=tensor_shape, **kwargs)
