"""A byte-level BPE tokenizer as a Hugging Face folder, trained or loaded with the ``tokenizers`` library alone.

The folder has the two files that every reader needs. tokenizer_config.json names PreTrainedTokenizerFast because that
is the one class name that transformers 4 and 5 both know.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_vwn.config import VirtualWidthError

END_OF_DOCUMENT = "<|endoftext|>"  # id 0
# id 1. Megatron masks the loss of padding, so padding must not be the end of document; and without any padding token it
# cannot fill up the last sample of a validation set.
PADDING = "<|padding|>"
SMALLEST_VOCABULARY = 256 + 2
_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer that takes text literally, and the id of the token behind every document."""

    tokenizer: Tokenizer
    end_of_document: int

    @property
    def token_of_id(self) -> dict[int, str]:
        """The vocabulary, added tokens included."""
        return {token_id: token for token, token_id in self.tokenizer.get_vocab(with_added_tokens=True).items()}

    def encode(self, text: str) -> list[int]:
        """Token ids of a document with the end of document behind them; no other special token is added."""
        return [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.end_of_document]


def train(texts: Iterator[str], vocabulary_size: int) -> Tokenizer:
    """Train on an iterator of documents; the result is smaller than asked when the text has no more pairs to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(END_OF_DOCUMENT, special=True), AddedToken(PADDING, special=True)],
        # All 256 bytes, seen or not: no text can then be unknown.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer of ``train`` as a folder that AutoTokenizer of transformers 4 and 5 reads."""
    folder.mkdir()
    tokenizer.save(str(folder / _FILES[0]))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    (folder / _FILES[1]).write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> LoadedTokenizer:
    """Load a Hugging Face folder with a fast tokenizer.

    Raises:
        VirtualWidthError: when the folder lacks a file, a file cannot be read, or no end of document is named.
    """
    for name in _FILES:
        if not (folder / name).is_file():
            raise VirtualWidthError(f"{folder} has no {name}: give the folder of a Hugging Face fast tokenizer.")
    try:
        tokenizer = Tokenizer.from_file(str(folder / _FILES[0]))
    except Exception as error:  # the library raises plain Exception
        raise VirtualWidthError(f"{folder / _FILES[0]} is no tokenizer that the library reads ({error}).") from None
    try:
        token = json.loads((folder / _FILES[1]).read_text())["eos_token"]
        token = token["content"] if isinstance(token, dict) else token
        end_of_document = tokenizer.token_to_id(token)
    except (ValueError, KeyError, TypeError):
        end_of_document = None
    if end_of_document is None:
        raise VirtualWidthError(
            f'{folder / _FILES[1]} names no "eos_token" of the vocabulary: add one, as it stands behind every document.'
        )
    # A saved tokenizer may cut or fill up what it encodes, and turns the spelling of a special token into that token: a
    # web page about tokenizers would end a document in the middle of a sentence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return LoadedTokenizer(tokenizer, end_of_document)
