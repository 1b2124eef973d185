"""A loss over the tokens of the tokenizer alone.

Megatron pads a vocabulary until tensor-parallel ranks can share it, and its softmax takes the rows that pad for tokens
that never come. Another number of ranks, which pads otherwise, then changes the loss, by ln(504/500) at 500 tokens, and
none of these losses is that of the exported model, which has no such rows.
"""

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor


def leave_out_padding(model: LanguageModule, tokens: int) -> None:
    """Take the rows that pad a vocabulary out of the softmax of a model's losses: the next token's, further ones'.

    Without such rows on this rank nothing is done, so that no bit changes.

    Args:
        model: a pipeline stage with a head of ``model.vocab_size`` rows, or one without a head.
        tokens: rows that are tokens; the others pad.
    """
    if not model.post_process:
        return
    compute_loss, rank = model.compute_language_model_loss, model.pg_collection.tp.rank()

    def compute_loss_of_tokens(labels: Tensor, logits: Tensor) -> Tensor:
        rows = logits.shape[-1]
        start = 0 if rows == model.vocab_size else rank * rows  # gathered, or this rank's share
        if start + rows > tokens:
            logits = _Impossible.apply(logits, max(tokens - start, 0))
        return compute_loss(labels, logits)

    model.compute_language_model_loss = compute_loss_of_tokens


class _Impossible(torch.autograd.Function):
    """Logits [..., rows] whose rows from ``first`` on have probability zero. In place, because they are the largest
    tensor of a step; the softmax then sends these rows a gradient of exactly zero."""

    @staticmethod
    def forward(ctx, logits: Tensor, first: int) -> Tensor:
        ctx.mark_dirty(logits)
        logits[..., first:] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None
