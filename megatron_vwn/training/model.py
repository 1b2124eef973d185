"""Model configuration and builder in the form that Megatron's ``pretrain()`` takes them.

``pretrain()`` asks the configuration for its builder and the builder for one model per pipeline stage. With a virtual
width that is a ``VirtualWidthModel``; without one it is Megatron's ``HybridModel``, built by the same lines from the
same layers, so that a comparison of the two differs in nothing else.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, override

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import core_transformer_config_from_args, hybrid_config_from_args
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.model import VirtualWidthModel
from megatron_vwn.modules.specs import stack_spec
from megatron_vwn.modules.vocabulary import leave_out_padding


@dataclass(kw_only=True)
class VirtualWidthModelConfig(HybridModelConfig):
    """A ``HybridModelConfig`` with a virtual width; None is the ordinary model.

    ``hybrid_stack_spec`` (Megatron's ``--spec``) replaces the layers of the ordinary model only.
    """

    builder: ClassVar[str] = "megatron_vwn.training.model.VirtualWidthModelBuilder"
    virtual_width: VirtualWidthConfig | None = None
    tokens: int | None = None
    """Tokens of the tokenizer, which the losses are over; None: all rows of the vocabulary, those that pad it too."""


def model_config_from_args(
    args: argparse.Namespace, virtual_width: VirtualWidthConfig | None, tokens: int | None = None
) -> VirtualWidthModelConfig:
    """The model that Megatron's validated arguments, a virtual width and the tokens of a tokenizer describe."""
    transformer = core_transformer_config_from_args(args)
    config = hybrid_config_from_args(args, config=transformer, model_config_cls=VirtualWidthModelConfig)
    config.virtual_width, config.tokens = virtual_width, tokens
    return config


class VirtualWidthModelBuilder(HybridModelBuilder):
    """Builds the stages of a ``VirtualWidthModelConfig``; wrapping for data parallelism is inherited."""

    @override
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> HybridModel:
        """Build one pipeline stage.

        Args:
            pg_collection: process groups of the model.
            pre_process: whether the stage has the embedding; None asks the pipeline group.
            post_process: whether the stage has the head; None asks the pipeline group.
            vp_stage: virtual pipeline stage.
        """
        config = self._model_config
        transformer = config.transformer
        vocab_size = config.vocab_size
        if config.should_pad_vocab:
            vocab_size = calculate_padded_vocab_size(
                vocab_size, config.make_vocab_size_divisible_by, transformer.tensor_model_parallel_size
            )
        model_class = HybridModel
        if config.virtual_width is not None:
            model_class = partial(VirtualWidthModel, virtual_width=config.virtual_width)
        model = model_class(
            config=transformer,
            hybrid_stack_spec=config.hybrid_stack_spec or stack_spec(config.virtual_width, transformer),
            vocab_size=vocab_size,
            max_sequence_length=config.seq_length,
            hybrid_layer_pattern=config.hybrid_layer_pattern,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            pre_process=is_pp_first_stage(pg_collection.pp) if pre_process is None else pre_process,
            post_process=is_pp_last_stage(pg_collection.pp) if post_process is None else post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if config.tokens is not None:
            leave_out_padding(model, config.tokens)
        return model
