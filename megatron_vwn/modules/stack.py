"""The stack of sublayers: Megatron's HybridStack with a final norm of any backend, and with the reduction before it."""

from megatron.core.inference.utils import InferenceMode
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.boundary import join_boundaries
from megatron_vwn.modules.reduction import Reduction


class Stack(HybridStack):
    """HybridStack whose final norm comes from the spec; the stock one names Transformer Engine's and cannot do without.

    Args:
        config: the backbone's config.
        submodules: layer specs.
        final_norm: builder of the final norm.
        post_layer_norm: whether this stack ends with the final norm on the last stage.
        kwargs: those of HybridStack.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        final_norm: LayerNormBuilder,
        post_layer_norm: bool = True,
        **kwargs,
    ):
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.ends_with_norm = self.post_process and post_layer_norm
        if self.ends_with_norm:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments of HybridStack; on the last stage [s, b, D]."""
        hidden_states = super().forward(*args, **kwargs)
        if self.post_process:
            hidden_states = self.finish(hidden_states)
        return hidden_states

    def finish(self, hidden_states: Tensor) -> Tensor:
        """What the last stage does after its layers."""
        if self.ends_with_norm:
            hidden_states = self.final_norm(hidden_states)
        # Pipeline schedules free a stage's output and refuse to do so to a view.
        return make_viewless_tensor(inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)


class VirtualWidthStack(Stack):
    """A stack whose layers pass on the over-width state [s, b, N * E], also from stage to stage; the last stage
    reduces.

    Args:
        config: the backbone's config.
        submodules: layer specs with connections.
        virtual_width: the stream.
        pg_collection: process groups.
        kwargs: those of Stack.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        virtual_width: VirtualWidthConfig,
        pg_collection: ProcessGroupCollection,
        **kwargs,
    ):
        super().__init__(config, submodules, pg_collection=pg_collection, **kwargs)
        join_boundaries(self)
        self.predicts_further_tokens = False
        if self.post_process:
            self.reduction = Reduction(config, virtual_width, pg_collection)

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments of HybridStack; on the last stage [s, b, D], or [s, b, N * E] for a block that follows."""
        if self.predicts_further_tokens and not InferenceMode.is_active():
            return HybridStack.forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)

    def finish(self, hidden_states: Tensor) -> Tensor:
        """Reduce, then as every stack."""
        return super().finish(self.reduction(hidden_states))
