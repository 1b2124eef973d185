"""A tokenizer as a Hugging Face folder: that of a trained one is written, and that of any fast one is loaded.

Training and the exported model read a folder with transformers, so data are encoded as transformers encodes, and a
folder that the ``tokenizers`` library alone would read otherwise is refused. The folder of a trained tokenizer has the
two files that every reader needs; tokenizer_config.json names PreTrainedTokenizerFast because that is the one class
name that transformers 4 and 5 both know.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

from megatron_vwn.config import VirtualWidthError

END_OF_DOCUMENT = "<|endoftext|>"  # id 0
# id 1. Megatron masks the loss of padding, so padding must not be the end of document; and without any padding token it
# cannot fill up the last sample of a validation set.
PADDING = "<|padding|>"
_FILES = ("tokenizer.json", "tokenizer_config.json")
_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_DOCUMENT,
    "eos_token": END_OF_DOCUMENT,
    "pad_token": PADDING,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1 << 20,
}
# What tokenizers disagree about: blanks, line ends, digits, contractions, marks, scripts, accents that are composed or
# not, characters that others use as blanks, and the beginning and the end of a text.
_PROBES = (
    "The quick brown fox, isn't it? I'M sure THEY'LL (1234567.89) go: x=y+z; https://a.b/c_d?e=f#g [x](y) {'k': 'v'}",
    " leading,  two   three    spaces \t tab\r\n\n\n  line ends \n \n",
    "caf\u00e9 cafe\u0301 \ufb01 \u00c5 \u4e2d\u6587\uff0c\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u0e44\u0e17\u0e22 \u0627\u0644 \U0001f600\U0001f468\u200d\U0001f469 \u00a0no-break\u3000wide\u200b\x00\x7f",
    "\u2581under\u2581 \u0120G <s></s> <unk> [UNK] <|endoftext|> <pad>",
)


class LoadedTokenizer:
    """A tokenizer that takes text literally; worker processes can be handed it.

    Attributes:
        tokenizer: of the library.
        end_of_document: id of the token behind every document.
    """

    def __init__(self, tokenizer_json: str, end_of_document: int):
        self.tokenizer = _literal(tokenizer_json)
        self.end_of_document = end_of_document

    def __reduce__(self):
        return LoadedTokenizer, (self.tokenizer.to_str(), self.end_of_document)

    @property
    def token_of_id(self) -> dict[int, str]:
        """The vocabulary, added tokens included."""
        return {token_id: token for token, token_id in self.tokenizer.get_vocab(with_added_tokens=True).items()}

    def encode(self, text: str) -> list[int]:
        """Token ids of a document with the end of document behind them; no other special token is added."""
        return [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.end_of_document]


def save(tokenizer_json: str, folder: Path) -> None:
    """Write a tokenizer of ``train_tokenizer`` as a folder that AutoTokenizer of transformers 4 and 5 reads.

    Raises:
        OSError: when it cannot be written.
    """
    folder.mkdir()
    (folder / _FILES[0]).write_text(tokenizer_json)  # the library's own writer raises no OSError
    (folder / _FILES[1]).write_text(json.dumps(_CONFIG, indent=2) + "\n")


def load(folder: Path) -> LoadedTokenizer:
    """Load a Hugging Face folder with a fast tokenizer, special tokens included that only its configuration names.

    Raises:
        VirtualWidthError: when there is no folder, it lacks a file, a file cannot be read, transformers cannot load it
            or encodes otherwise than tokenizer.json says, or no end of document is named.
    """
    if not folder.is_dir():
        raise VirtualWidthError(
            f"{folder} is no folder here: give that of a Hugging Face fast tokenizer, one of the hub downloaded first "
            "(hf download NAME --local-dir FOLDER)."
        )
    for name in _FILES:
        if not (folder / name).is_file():
            raise VirtualWidthError(f"{folder} has no {name}: give the folder of a Hugging Face fast tokenizer.")
    try:
        plain = Tokenizer.from_file(str(folder / _FILES[0])).to_str()
    except Exception as error:  # the library raises plain Exception
        raise VirtualWidthError(
            f"{folder / _FILES[0]} is no tokenizer that the library reads ({one_line(error)})."
        ) from None
    try:
        config = json.loads((folder / _FILES[1]).read_text())
    except (ValueError, RecursionError) as error:
        raise VirtualWidthError(f"{folder / _FILES[1]} is no JSON ({one_line(error)}).") from None
    if config == _CONFIG and {path.name for path in folder.iterdir()} == set(_FILES):
        # Of ``save``, which needs no transformers: its import takes seconds.
        loaded, end = plain, _literal(plain).token_to_id(END_OF_DOCUMENT)
    else:
        loaded, end = _as_transformers_loads(folder, config)
    if end is None:
        raise VirtualWidthError(
            f'{folder / _FILES[1]} names no "eos_token" of the vocabulary: add one, as it stands behind every document.'
        )
    if not _encode_alike(plain, loaded):
        raise VirtualWidthError(
            f"transformers encodes text otherwise than {folder / _FILES[0]} says, because {_FILES[1]} names the class "
            f"{config.get('tokenizer_class')}: name PreTrainedTokenizerFast, under which {_FILES[0]} counts, or save "
            "the folder anew with transformers."
        )
    return LoadedTokenizer(loaded, end)


def one_line(error: BaseException | str, most: int = 200) -> str:
    """What a library says of a fault, without line ends, full stop and excess."""
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return words if len(words) <= most else f"{words[:most]}..."


def _as_transformers_loads(folder: Path, config: object) -> tuple[str, int | None]:
    """The JSON of the tokenizer that transformers makes of a folder, and the id of its end of document."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
    except Exception as error:  # whatever the files make it stumble over
        own = isinstance(config, dict) and "auto_map" in config
        what = "names code of its own, which is not run" if own else f"cannot be loaded ({one_line(error)})"
        raise VirtualWidthError(
            f"{folder} {what}: give a folder that transformers loads as a fast tokenizer without trust_remote_code."
        ) from None


def _encode_alike(*tokenizers: str) -> bool:
    try:
        encodings = [
            [tokenizer.encode(text, add_special_tokens=False).ids for text in _PROBES]
            for tokenizer in map(_literal, tokenizers)
        ]
    except Exception:  # of the library, where a model has no token for what it does not know
        return False
    return encodings[0] == encodings[1]


def _literal(tokenizer_json: str) -> Tokenizer:
    """A tokenizer that neither cuts nor fills up what it encodes, and takes the spelling of a special token for text.

    Otherwise a web page about tokenizers would end a document in the middle of a sentence.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
