"""Multi-token prediction on the over-width state.

Depth k fuses the state of depth k - 1 (the trunk's, before its reduction and final norm) with the over-width embedding
of the token k places ahead, sends the result through VWN layers, and predicts with its own reduction and norm and the
shared head. Megatron's block, loss and logging stay as they are; two things differ: what fuses, and that the block is
handed the over-width state and therefore does the trunk's reduction as well.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.boundary import join_boundaries
from megatron_vwn.modules.embedding import Expansion, OverWidthEmbedding
from megatron_vwn.modules.group_norm import GroupNorm
from megatron_vwn.modules.reduction import Reduction
from megatron_vwn.modules.stream_module import PartitionedModule


class Fusion(PartitionedModule):
    """H_j = W_e GroupNorm(embedding)_j + W_h GroupNorm(state)_j: one map [2E -> E] shared by all segments.

    The weight [E_out, 2, E_in] has W_e and W_h side by side. It equals Megatron's dense fusion [D, 2D] whose two halves
    are I_m (x) W_e and I_m (x) W_h.
    """

    def __init__(
        self, config: TransformerConfig, virtual_width: VirtualWidthConfig, pg_collection: ProcessGroupCollection
    ):
        super().__init__(config, virtual_width, pg_collection)
        self.embedding_norm = GroupNorm(config, virtual_width, pg_collection)
        self.state_norm = GroupNorm(config, virtual_width, pg_collection)
        segment = self.segment_size
        self.add_parameter("weight", segment, 2, segment, init_method=config.init_method, channel_dim=2)

    def forward(self, embedding: Tensor, hidden_states: Tensor) -> Tensor:
        """Two over-width states [s, b, N * E] of this rank to one, in the dtype of hidden_states."""
        pair_TN2E = torch.stack(
            [
                self.embedding_norm(self.segments(embedding)),
                self.state_norm(self.segments(hidden_states)),
            ],
            dim=2,
        )
        # A rank's channels of the input contribute to every channel of the output.
        partial_TNE = pair_TN2E.flatten(2).to(self.weight.dtype) @ self.weight.flatten(1).T
        out_TNE = self.partition.scatter_channels(self.partition.sum_over_channels(partial_TNE))
        return out_TNE.to(hidden_states.dtype).view(hidden_states.shape)


class VirtualWidthMTPLayer(MultiTokenPredictionLayer):
    """One prediction depth: fusion, VWN layers, and a reduction and norm of its own before the shared head.

    Args:
        config: the backbone's config.
        submodules: only ``layer_norm`` is used; the stock norms and projection are identities.
        virtual_width: the stream.
        pg_collection: process groups.
        kwargs: those of MultiTokenPredictionLayer; the layers come from its pattern and ``hybrid_submodules``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MultiTokenPredictionLayerSubmodules,
        *args,
        virtual_width: VirtualWidthConfig,
        pg_collection: ProcessGroupCollection,
        **kwargs,
    ):
        super().__init__(config, submodules, *args, pg_collection=pg_collection, **kwargs)
        join_boundaries(self.mtp_model_layer)
        self.fusion = Fusion(config, virtual_width, pg_collection)
        self.reduction = Reduction(config, virtual_width, pg_collection)
        # Of its own, because the trunk's lives on the first pipeline stage and this layer on the last.
        self.expansion = None
        if virtual_width.embedding == "projected":
            self.expansion = Expansion(config, virtual_width, pg_collection)

    def forward(self, *args, embedding: OverWidthEmbedding, **kwargs):
        """As the stock layer, on over-width states; the returned state is not reduced (see ``predict``)."""
        return super().forward(*args, embedding=partial(embedding.embed, expansion=self.expansion), **kwargs)

    def predict(self, hidden_states: Tensor) -> Tensor:
        """The input of the shared head [s, b, D] from the state that ``forward`` returned."""
        return super()._postprocess(self.reduction(hidden_states))

    def _concat_embeddings(self, hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
        return self.fusion(decoder_input, hidden_states)

    def _postprocess(self, hidden_states: Tensor) -> Tensor:
        return make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)


class VirtualWidthMTPBlock(MultiTokenPredictionBlock):
    """All prediction depths behind the trunk's last layer.

    Attributes:
        finish_trunk: the trunk's reduction and final norm; set by the model.
    """

    finish_trunk: Callable[[Tensor], Tensor]

    def forward(self, input_ids: Tensor, position_ids: Tensor, hidden_states: Tensor, **kwargs) -> Tensor:
        """The trunk's over-width state [s, b, N * E] to the head's inputs [(1 + depths) s, b, D]."""
        outputs = [self.finish_trunk(hidden_states)]
        if self.config.mtp_detach_heads:
            hidden_states = hidden_states.detach()
        padding_mask = kwargs.pop("padding_mask", None)
        kwargs |= kwargs.pop("extra_block_kwargs", None) or {}
        for depth in range(self.config.mtp_num_layers):
            layer = self.layers[0 if self.mtp_use_repeated_layer else depth]
            hidden_states, input_ids, position_ids, padding_mask = layer(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden_states,
                padding_mask=padding_mask,
                **kwargs,
            )
            outputs.append(layer.predict(hidden_states))
        return torch.cat(outputs, dim=0)
