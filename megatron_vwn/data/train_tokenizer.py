"""A byte-level BPE tokenizer, trained on the documents of a corpus with the ``tokenizers`` library."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_vwn.data.documents import Format, is_held_out, read_batches
from megatron_vwn.data.tokenizer import END_OF_DOCUMENT, PADDING

SMALLEST_VOCABULARY = 256 + 2
# The library makes room for as many tokens as are asked for: these, more than any tokenizer has, cost 33 MB.
LARGEST_VOCABULARY = 1 << 24
# The time of training grows with the square of the length of a word: hours for a file without a blank.
MAX_WORD_BYTES = 1000
# No character has more than 4 bytes, so shorter runs hold no word that is too long.
_LONG_RUN = re.compile(rf"\S{{{MAX_WORD_BYTES // 4}}}|\s{{{MAX_WORD_BYTES // 4}}}")


class Trained(NamedTuple):
    """A trained tokenizer as the JSON of the library, and how many words were longer than ``MAX_WORD_BYTES``."""

    json: str
    long_words: int


def train_tokenizer(
    files: list[Path], form: Format, held_out_fraction: float, seed: int, size: int, progress: Callable[[int], None]
) -> Trained:
    """Train on the documents that are not held out: held-out text must not shape the vocabulary it is measured with.

    Args:
        files: of the corpus.
        form: how they are cut into documents.
        held_out_fraction: share of documents for validation.
        seed: of the split.
        size: tokens of the vocabulary.
        progress: called with bytes that have been read.
    """
    long = 0

    def texts() -> Iterator[str]:
        nonlocal long
        for batch in read_batches(files, form):
            for record in batch.records:
                text = record.text(form.json_key)
                if text.strip() and not is_held_out(text, held_out_fraction, seed):
                    long += _long_words(text)
                    yield text
            progress(batch.bytes_read)

    return Trained(train(texts(), size).to_str(pretty=True), long)


def train(texts: Iterator[str], size: int) -> Tokenizer:
    """Train on an iterator of documents; the result is smaller than asked when the text has no more pairs to merge.

    Words longer than ``MAX_WORD_BYTES`` are learnt from in pieces; the tokenizer encodes them whole.
    """
    tokenizer = Tokenizer(models.BPE())
    words = _words()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(MAX_WORD_BYTES)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(END_OF_DOCUMENT, special=True), AddedToken(PADDING, special=True)],
        # All 256 bytes, seen or not: no text can then be unknown.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return tokenizer


def _words() -> pre_tokenizers.PreTokenizer:
    """Cuts text into words, whose bytes it writes as one character each."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _long_words(text: str) -> int:
    if not _LONG_RUN.search(text):
        return 0
    return sum(len(word) > MAX_WORD_BYTES for word, _ in _words().pre_tokenize_str(text))
