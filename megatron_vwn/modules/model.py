"""HybridModel with an over-width stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from megatron.core import __version__
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.hybrid import hybrid_model
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.modules.embedding import OverWidthEmbedding
from megatron_vwn.modules.multi_token_prediction import VirtualWidthMTPBlock
from megatron_vwn.modules.muon import choose_for_muon
from megatron_vwn.modules.ngram_embedding import remember_tokens
from megatron_vwn.modules.stack import VirtualWidthStack


class VirtualWidthModel(HybridModel):
    """A HybridModel whose residual stream is n/m times as wide as its backbone.

    Args:
        config: the backbone's config; nothing in it is widened.
        hybrid_stack_spec: from ``modules.specs.stack_spec`` with the same virtual width.
        virtual_width: the stream.
        pre_process: whether this pipeline stage embeds the tokens.
        pg_collection: process groups; Megatron's global ones if None.
        kwargs: those of HybridModel.

    Raises:
        VirtualWidthError: if backbone or layout cannot carry the stream, or if Megatron built parts of its own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hybrid_stack_spec: ModuleSpec,
        *args,
        virtual_width: VirtualWidthConfig,
        pre_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        share_embeddings_and_output_weights: bool = False,
        **kwargs,
    ):
        virtual_width.check_model(hidden_size=config.hidden_size, tied_embeddings=share_embeddings_and_output_weights)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        embedding = partial(
            OverWidthEmbedding, virtual_width=virtual_width, pg_collection=pg_collection, first_stage=pre_process
        )
        with _built_by(LanguageModelEmbedding=embedding, MultiTokenPredictionBlock=VirtualWidthMTPBlock):
            super().__init__(
                config,
                hybrid_stack_spec,
                *args,
                pre_process=pre_process,
                pg_collection=pg_collection,
                share_embeddings_and_output_weights=share_embeddings_and_output_weights,
                **kwargs,
            )
        _check_parts(self)
        if self.mtp_process:
            self.decoder.predicts_further_tokens = True
            self.mtp.finish_trunk = self.decoder.finish
        self.virtual_width = virtual_width
        choose_for_muon(self)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        """As HybridModel; generation hands n-grams the tokens that earlier steps brought."""
        if inference_context is not None and decoder_input is None and self.pre_process and self.virtual_width.ngrams:
            history = remember_tokens(inference_context, input_ids, max(self.virtual_width.ngrams) - 1)
            decoder_input = self.embedding(input_ids, position_ids, history=history)
        return super().forward(
            input_ids, position_ids, attention_mask, decoder_input, labels, inference_context, *args, **kwargs
        )


@contextmanager
def _built_by(**builders: Callable) -> Iterator[None]:
    """HybridModel names these classes and takes no spec for them; replacing them afterwards would build them twice."""
    stock = {name: getattr(hybrid_model, name, None) for name in builders}
    if missing := [name for name, builder in stock.items() if builder is None]:
        raise VirtualWidthError(
            f"megatron-core {__version__} does not build its hybrid model from {' and '.join(missing)}: "
            "install megatron-core 0.19.2."
        )
    try:
        for name, builder in builders.items():
            setattr(hybrid_model, name, builder)
        yield
    finally:
        for name, builder in stock.items():
            setattr(hybrid_model, name, builder)


def _check_parts(model: VirtualWidthModel) -> None:
    """Refuse a model whose parts have the backbone's width because Megatron took its classes from elsewhere."""
    expected = {"decoder": VirtualWidthStack}
    if model.pre_process or model.mtp_process:
        expected["embedding"] = OverWidthEmbedding
    if model.mtp_process:
        expected["mtp"] = VirtualWidthMTPBlock
    for name, ours in expected.items():
        built = type(getattr(model, name, None))
        if not issubclass(built, ours):
            raise VirtualWidthError(
                f"megatron-core {__version__} built the model's {name} as {built.__name__}, not as {ours.__name__}: "
                "install megatron-core 0.19.2 and take the layers from stack_spec."
            )
