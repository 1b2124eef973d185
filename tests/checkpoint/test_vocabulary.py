"""Which rows of a vocabulary are tokens, and how many a model in Megatron has for them."""

from argparse import Namespace

import pytest

from megatron_vwn.checkpoint.vocabulary import padded_size, tokens_of


def test_rows_that_are_tokens():
    assert tokens_of(Namespace(padded_vocab_size=512, vwn_tokens=500)) == 500
    assert tokens_of(Namespace(padded_vocab_size=512)) == 512  # an earlier version's, or Megatron's own
    assert tokens_of(Namespace(padded_vocab_size=512, vwn_tokens=None)) == 512
    assert tokens_of(Namespace(padded_vocab_size=256, vwn_tokens=500)) == 256  # --padded-vocab-size below the tokenizer


@pytest.mark.parametrize(
    ("tokens", "rows", "padded"),
    [(96, 96, 96), (500, 1024, 1024), (500, None, 512), (520, 512, 640), (128_256, None, 128_256)],
)
def test_rows_for_so_many_tokens(tokens, rows, padded):
    assert padded_size(tokens, rows) == padded
