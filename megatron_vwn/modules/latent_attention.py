"""Multi-latent attention in torch operations."""

from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import MLATransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_vwn.config import VirtualWidthError


class LatentDotProductAttention(DotProductAttention):
    """Dot-product attention whose values have another width than queries and keys.

    Args:
        config: the backbone's config, whose v_head_dim is the width of a head's values.
        k_channels: queries' and keys' channels per head, which the tensors show.
        v_channels: values' channels per head; Megatron gives it only to the second of the two that it builds.
        kwargs: those of DotProductAttention.
    """

    def __init__(
        self, config: MLATransformerConfig, *, k_channels: int | None = None, v_channels: int | None = None, **kwargs
    ):
        super().__init__(config, **kwargs)
        self.hidden_size_per_partition = config.v_head_dim * self.num_attention_heads_per_partition


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention, with the whole gradient of the keys' positional part under tensor parallelism.

    All heads of all ranks share that part. Megatron 0.19 gathers it from column-parallel down-projections in a way that
    gives every rank the gradient of its own heads only, a third off in small models; from the token shards of sequence
    parallelism the gradients are summed, so these are made first. Without sequence parallelism Megatron also counts the
    gradient of the query norm once per rank.

    Args:
        config: the backbone's config.
        args: those of MLASelfAttention.
        kwargs: those of MLASelfAttention.

    Raises:
        VirtualWidthError: for tensor parallelism without sequence parallelism.
    """

    def __init__(self, config: MLATransformerConfig, *args, **kwargs):
        if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            raise VirtualWidthError(
                "Latent attention under tensor parallelism needs sequence parallelism: set sequence_parallel."
            )
        super().__init__(config, *args, **kwargs)

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [s, b, D] of this rank to the latents of queries and of keys and values, both [s, b, rank]."""
        queries, keys_and_values = super()._qkv_down_projection(hidden_states)
        if self.config.sequence_parallel:
            keys_and_values = gather_from_tensor_model_parallel_region(keys_and_values, group=self.tp_group)
            keys_and_values = scatter_to_sequence_parallel_region(keys_and_values, group=self.tp_group)
        return queries, keys_and_values
