"""How many rows of a vocabulary are tokens; Megatron pads it with others until tensor-parallel ranks can share it.

Training leaves the rows that pad out of every softmax (``modules.vocabulary``), so an exported model does without them.
A run records the size of its tokenizer beside Megatron's arguments, which do not tell it: ``--vocab-size`` is that of
some kinds of tokenizers alone.
"""

import argparse

from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_vwn.training.flags.defaults import megatron_defaults

TOKENS = "vwn_tokens"
"""The argument by which ``training.run`` records it."""


def tokens_of(args: argparse.Namespace) -> int:
    """The rows of a run's model that are tokens: all that it has where it did not record them, as Megatron's own runs
    do not, whose softmax has all rows."""
    rows, tokens = args.padded_vocab_size, getattr(args, TOKENS, None)
    return rows if tokens is None else min(tokens, rows)


def padded_size(tokens: int, rows: int | None) -> int:
    """The rows of a model in Megatron that is made of one with ``tokens`` rows.

    Args:
        tokens: rows that no padding is among.
        rows: of a model in Megatron with the same tokens, whose padding fitted its ranks; None if there was none.
    """
    if rows is not None and rows >= tokens:
        return rows
    multiple = megatron_defaults()["make_vocab_size_divisible_by"]
    return calculate_padded_vocab_size(tokens, multiple, 1, logging_enabled=False)
