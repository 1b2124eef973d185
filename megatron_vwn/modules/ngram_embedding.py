"""Over-encoding: hashed n-gram embeddings that fill a wide input with more than copies of the token's vector.

One table holds the rows of all lengths, one block after another, and is split by vocabulary like Megatron's own. Its
rows are as wide as the stream, so each segment learns its own part of an n-gram; they start at zero, so that a fresh
model still computes its baseline. The method is that of "Over-Tokenized Transformer" (arXiv 2501.16975).
"""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.ops.ngrams import ngram_rows
from megatron_vwn.parallel.context import own_share, whole_sequence


class NGramEmbedding(VocabParallelEmbedding):
    """The sum of the embeddings of the n-grams that end at each token, one per length in ``virtual_width.ngrams``.

    Args:
        config: the backbone's config.
        virtual_width: the stream; its ``document_end`` must be known.
        pg_collection: process groups; ``tp`` and ``cp`` are used.

    Raises:
        VirtualWidthError: if the id that ends a document is not known, or ranks do not divide the table.
    """

    def __init__(
        self, config: TransformerConfig, virtual_width: VirtualWidthConfig, pg_collection: ProcessGroupCollection
    ):
        if virtual_width.document_end is None:
            raise VirtualWidthError(
                "--vwn-ngrams must know where a document ends: use a tokenizer that has an end-of-document token."
            )
        super().__init__(
            num_embeddings=len(virtual_width.ngrams) * virtual_width.ngram_vocab,
            embedding_dim=virtual_width.over_width(config.hidden_size),
            # No random number is drawn, so the backbone is its baseline's, seed for seed.
            init_method=torch.nn.init.zeros_,
            config=config,
            tp_group=pg_collection.tp,
        )
        self.virtual_width = virtual_width
        self.cp_group = pg_collection.cp
        # Megatron's --decoupled-lr is for embeddings and heads.
        self.weight.is_embedding_or_output_parameter = True

    def forward(self, tokens_bs: Tensor, history_bs: Tensor | None = None) -> Tensor:
        """This rank's token ids [b, s] to [s, b, N * E], all channels; under sequence parallelism this rank's tokens.

        Args:
            tokens_bs: token ids, under context parallelism this rank's chunks.
            history_bs: what comes before them, where a sequence arrives in parts (decoding).
        """
        # Summed over lengths first: ranks then exchange one embedding per token, not one per length.
        out_bsF = sum(self._own_rows(rows_bs) for rows_bs in self._rows(tokens_bs, history_bs).unbind(-1))
        out_sbF = out_bsF.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(out_sbF, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(out_sbF, group=self.tp_group)

    def _rows(self, tokens_bs: Tensor, history_bs: Tensor | None) -> Tensor:
        """Rows of the joint table [b, s, G]."""
        vw = self.virtual_width
        whole = whole_sequence(tokens_bs, self.cp_group)
        if history_bs is not None:
            whole = torch.cat([history_bs, whole], dim=1)
        rows = ngram_rows(whole, vw.ngrams, vw.ngram_vocab, vw.document_end)
        if history_bs is not None:
            rows = rows[:, history_bs.shape[1] :]
        offsets = torch.arange(len(vw.ngrams), device=rows.device) * vw.ngram_vocab
        return own_share(rows, self.cp_group) + offsets

    def _own_rows(self, rows_bs: Tensor) -> Tensor:
        """Embeddings [b, s, N * E] of the rows that this rank holds, zero for the others."""
        mine = (rows_bs >= self.vocab_start_index) & (rows_bs < self.vocab_end_index)
        local = (rows_bs - self.vocab_start_index) * mine
        # The backward pass of F.embedding adds in any order on a GPU.
        found = self.weight[local] if self.deterministic_mode else torch.nn.functional.embedding(local, self.weight)
        return found * mine.unsqueeze(-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As the stock table, but one of another size does not fit: no row would mean the same."""
        return {
            f"{prefix}weight": make_tp_sharded_tensor_for_checkpoint(
                tensor=self.weight,
                key=f"{prefix}weight",
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        }


def remember_tokens(context: BaseInferenceContext, tokens_bs: Tensor, distance: int) -> Tensor:
    """Keep a generation step's tokens with its context, and return those before them.

    Args:
        context: a static inference context, which knows how many tokens it has seen.
        tokens_bs: the step's tokens.
        distance: how far back the longest n-gram reaches.

    Returns:
        [b, at most distance].

    Raises:
        VirtualWidthError: for dynamic batching, where a batch is no matrix of sequences.
    """
    if not context.is_static_batching():
        raise VirtualWidthError("n-gram embeddings cannot generate with dynamic batching: use the static engine.")
    if not hasattr(context, "vwn_tokens"):
        shape = (context.max_batch_size, context.max_sequence_length)
        context.vwn_tokens = torch.zeros(shape, dtype=torch.long, device=tokens_bs.device)
    batch, length = tokens_bs.shape
    seen = context.vwn_tokens[context.batch_size_offset : context.batch_size_offset + batch]
    start = context.sequence_len_offset
    seen[:, start : start + length] = tokens_bs
    return seen[:, max(0, start - distance) : start]
