"""HybridModel with an over-width stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from megatron.core.models.hybrid import hybrid_model
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.embedding import OverWidthEmbedding


class VirtualWidthModel(HybridModel):
    """A HybridModel whose residual stream is n/m times as wide as its backbone.

    Args:
        config: the backbone's config; nothing in it is widened.
        hybrid_stack_spec: from ``modules.specs.stack_spec`` with the same virtual width.
        virtual_width: the stream.
        pg_collection: process groups; Megatron's global ones if None.
        kwargs: those of HybridModel.

    Raises:
        VirtualWidthError: if backbone or layout cannot carry the stream.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hybrid_stack_spec: ModuleSpec,
        *args,
        virtual_width: VirtualWidthConfig,
        pg_collection: ProcessGroupCollection | None = None,
        share_embeddings_and_output_weights: bool = False,
        **kwargs,
    ):
        virtual_width.check_model(hidden_size=config.hidden_size, tied_embeddings=share_embeddings_and_output_weights)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        embedding = partial(OverWidthEmbedding, virtual_width=virtual_width, pg_collection=pg_collection)
        with _embedding_built_by(embedding):
            super().__init__(
                config,
                hybrid_stack_spec,
                *args,
                pg_collection=pg_collection,
                share_embeddings_and_output_weights=share_embeddings_and_output_weights,
                **kwargs,
            )
        self.virtual_width = virtual_width


@contextmanager
def _embedding_built_by(builder: partial) -> Iterator[None]:
    """HybridModel names its embedding class and takes no spec for it; replacing it afterwards would build the table
    twice."""
    stock = hybrid_model.LanguageModelEmbedding
    hybrid_model.LanguageModelEmbedding = builder
    try:
        yield
    finally:
        hybrid_model.LanguageModelEmbedding = stock
