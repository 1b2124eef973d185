"""Over-width embedding: from token ids to the first over-width state."""

import copy

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vwn import ops
from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.fp8_linear import fp8_linear, product
from megatron_vwn.modules.ngram_embedding import NGramEmbedding
from megatron_vwn.modules.stream_module import PartitionedModule
from megatron_vwn.parallel.partition import StreamPartition


class Expansion(PartitionedModule):
    """H = W_expand X with W_expand = tiling + weight [N, E, D] / sqrt(D), so that it starts as a copy.

    Divided for the reason that Reduction gives, unless --vwn-linear is plain. Three dimensions, because under the width
    partition a rank owns its channels of every segment, which in a [D', D] matrix would be no contiguous block.
    """

    def __init__(
        self, config: TransformerConfig, virtual_width: VirtualWidthConfig, pg_collection: ProcessGroupCollection
    ):
        super().__init__(config, virtual_width, pg_collection)
        self.divisor = virtual_width.linear_divisor(config.hidden_size)
        self.add_parameter("weight", virtual_width.n, self.segment_size, config.hidden_size, channel_dim=1)
        self.fp8 = fp8_linear(config, config.hidden_size, virtual_width.n * self.local_segment_size, end="first")

    def forward(self, x_sbD: Tensor) -> Tensor:
        """X [s, b, D], whole on every rank, to this rank's state [s, b, N, E]."""
        vw = self.virtual_width
        copies = ops.tile(self.partition.scatter_channels(x_sbD.unflatten(-1, (vw.m, -1))), vw.n)
        # A rank's product sees only its own rows of W_expand, so the gradient of X has to be summed over ranks.
        x_sbD = self.partition.complete_gradient(x_sbD).to(self.weight.dtype)
        return copies + (product(x_sbD, self.weight.flatten(0, 1), self.fp8) / self.divisor).view(copies.shape)


class OverWidthEmbedding(LanguageModelEmbedding):
    """Megatron's embedding, whose output is this rank's over-width state [s, b, N * E].

        wide        the table itself is [vocab, D']
        projected   a table [vocab, D], then W_expand
        tiled       a table [vocab, D], copied: segment j is segment j mod m of the token's vector

    to which hashed n-gram embeddings are added where ``virtual_width.ngrams`` asks for them.

    Dropout comes before tiling. The wide table is split by vocabulary like any other; under the width partition the
    summed vector is then cut to this rank's channels, so the checkpoint's layout is the same for every partition.

    Args:
        config: the backbone's config.
        virtual_width: the stream.
        pg_collection: process groups; ``tp`` is used.
        first_stage: whether this is the trunk's input. A stage that only predicts further tokens has a copy of the
            word embedding, brings its own W_expand, and leaves n-grams to the trunk: their tables would be the only
            other parameters to keep equal on two stages.
        kwargs: those of LanguageModelEmbedding.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args,
        virtual_width: VirtualWidthConfig,
        pg_collection: ProcessGroupCollection,
        first_stage: bool = True,
        **kwargs,
    ):
        table_config = config
        if virtual_width.embedding == "wide":
            # The stock embedding takes every width, of the table and of learned positions, from hidden_size.
            table_config = copy.copy(config)
            table_config.hidden_size = virtual_width.over_width(config.hidden_size)
        super().__init__(table_config, *args, **kwargs)
        self.virtual_width = virtual_width
        self.partition = StreamPartition.of(config, virtual_width, pg_collection.tp)
        self.expansion = None
        if virtual_width.embedding == "projected" and first_stage:
            self.expansion = Expansion(config, virtual_width, pg_collection)
        self.ngram_embeddings = None
        if virtual_width.ngrams and first_stage:
            self.ngram_embeddings = NGramEmbedding(config, virtual_width, pg_collection)

    def forward(self, input_ids: Tensor, position_ids: Tensor, *, history: Tensor | None = None) -> Tensor:
        """The trunk's input: token ids [b, s] to this rank's over-width state [s, b, N * E].

        Args:
            input_ids: token ids [b, s].
            position_ids: positions [b, s].
            history: token ids [b, h] before these, where a sequence arrives in parts; only n-grams look at them.
        """
        embedding = self.embed(input_ids, position_ids, expansion=self.expansion)
        if self.ngram_embeddings is None:
            return embedding
        ngrams_sbF = self._drop(self.ngram_embeddings(input_ids, history)).to(embedding.dtype)
        segments = self.partition.scatter_channels(ngrams_sbF.unflatten(-1, (self.virtual_width.n, -1)))
        return embedding + segments.flatten(-2)

    def embed(self, input_ids: Tensor, position_ids: Tensor, *, expansion: Expansion | None) -> Tensor:
        """Token ids [b, s] to this rank's over-width state [s, b, N * E] without n-grams.

        Args:
            input_ids: token ids [b, s].
            position_ids: positions [b, s].
            expansion: W_expand of a projected embedding.
        """
        x = super().forward(input_ids, position_ids)
        vw = self.virtual_width
        if vw.embedding == "projected":
            return expansion(x).flatten(-2)
        segments = self.partition.scatter_channels(x.unflatten(-1, (vw.n if vw.embedding == "wide" else vw.m, -1)))
        return ops.tile(segments, vw.n).flatten(-2)

    def _drop(self, embedding: Tensor) -> Tensor:
        """Embedding dropout, from the generators that the stock embedding takes."""
        if not self.config.sequence_parallel:
            return self.embedding_dropout(embedding)
        with get_cuda_rng_tracker().fork():  # each rank has other tokens
            return self.embedding_dropout(embedding)
