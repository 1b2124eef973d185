"""Tokenised data on disk, checked before a run starts: PREFIX.bin, PREFIX.idx and, where it exists, PREFIX.json.

Megatron maps PREFIX.bin and trusts PREFIX.idx. A copy that stopped half-way therefore shows up hours later, in the
middle of an epoch, and a token id beyond the vocabulary when it is met. What the sizes, the index and a part of the
tokens tell is checked here, with struct and numpy alone: nothing imports Megatron.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_vwn.config import VirtualWidthError

# The .idx file: magic, version (uint64), dtype code (uint8), number of sequences and of document marks (uint64 each),
# then per sequence its length in tokens (int32) and its offset in bytes (int64), then the document marks (int64).
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FLOAT_CODES = (6, 7)
# Sequences looked at in one go: bounds the memory of a check at some tens of MB.
_CHUNK = 1 << 20
# Tokens that are read in one piece.
_BLOCK = 1 << 16


class IndexedDatasetSize(NamedTuple):
    """What an index promises: counts, and the type of one token."""

    documents: int
    tokens: int
    dtype: np.dtype


@dataclass(frozen=True, kw_only=True)
class Description:
    """PREFIX.json: what the index cannot say about a prepared data set.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, the end of each document included.
        text_bytes: UTF-8 bytes of the text; a loss of L nats per token is L / ln 2 * tokens / text_bytes bits per byte.
        vocabulary_size: largest token id of the tokenizer plus one.
        vocabulary_sha256: ``vocabulary_fingerprint`` of the tokenizer.
        end_of_document: id of the token behind every document.
    """

    documents: int
    tokens: int
    text_bytes: int
    vocabulary_size: int
    vocabulary_sha256: str
    end_of_document: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.text_bytes / self.tokens

    def fault(self) -> str | None:
        """What cannot be true of a data set, in words."""
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                return f"{field.name} is no {'number' if field.type is int else 'text'}"
            if field.type is int and value < (field.name not in ("text_bytes", "end_of_document")):
                return f"{field.name} is {value}"
        return None

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_description(prefix: str) -> Description | None:
    """Read PREFIX.json; None where there is none, as with data that another program prepared.

    Raises:
        VirtualWidthError: when the file exists and is no description.
    """
    path = Path(f"{prefix}.json")
    if not path.exists():
        return None
    try:
        description = Description(**json.loads(path.read_text()))
        fault = description.fault()
    except (ValueError, TypeError, RecursionError):
        fault = "it is no JSON object with the keys of one"
    if fault:
        raise VirtualWidthError(
            f"{path} does not describe a data set ({fault}): prepare the data again with vwn-prepare-data, or remove "
            "the file to train without the check of the vocabulary."
        )
    return description


def vocabulary_fingerprint(token_of_id: Mapping[int, str]) -> str:
    """SHA-256 (hex) of a vocabulary, equal for equal tokens under equal ids however the tokenizer was saved."""
    digest = hashlib.sha256()
    for token_id in sorted(token_of_id):
        digest.update(f"{token_id}\t{token_of_id[token_id]}\n".encode())
    return digest.hexdigest()


def check_indexed_dataset(prefix: str) -> IndexedDatasetSize:
    """Check that PREFIX.idx, PREFIX.bin and PREFIX.json, where it exists, are complete and belong together.

    Reads the index once (12 bytes per sequence) and only the size of the .bin file.

    Args:
        prefix: path without the suffix, as given to --data-path.

    Returns:
        The counts and the token type that the index states.

    Raises:
        VirtualWidthError: when a file is missing, cut short, too long, of another format or inconsistent, or when there
            are no tokens.
    """
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, bin_):
        if not path.is_file():
            hint = " (give the path without its suffix)" if Path(prefix).suffix in (".idx", ".bin") else ""
            raise VirtualWidthError(f"{path} does not exist: check the data path {prefix}{hint}.")
    dtype, num_sequences, num_marks = _read_header(idx)
    marks_at = _HEADER.size + 12 * num_sequences
    _check_size(idx, marks_at + 8 * num_marks)

    index = np.memmap(idx, mode="r", dtype=np.uint8)
    lengths = index[_HEADER.size : _HEADER.size + 4 * num_sequences].view("<i4")
    offsets = index[_HEADER.size + 4 * num_sequences : marks_at].view("<i8")
    marks = index[marks_at:].view("<i8")
    tokens = 0
    for start in range(0, num_sequences, _CHUNK):
        piece = lengths[start : start + _CHUNK].astype(np.int64)
        ends = tokens + np.cumsum(piece)
        if piece.min() < 0 or not np.array_equal(offsets[start : start + _CHUNK], (ends - piece) * dtype.itemsize):
            raise VirtualWidthError(
                f"{idx} is damaged: the places of its sequences contradict their lengths; copy or prepare the data "
                "again."
            )
        tokens = int(ends[-1])
    if marks[0] != 0 or marks[-1] != num_sequences or np.any(np.diff(marks) < 0):
        raise VirtualWidthError(
            f"{idx} is damaged: its document marks do not run from 0 to its {num_sequences} sequences; copy or prepare "
            "the data again."
        )
    _check_size(bin_, tokens * dtype.itemsize)
    if tokens == 0:
        raise VirtualWidthError(f"{bin_} holds no tokens: prepare the data again from text that is not empty.")
    description = read_description(prefix)
    if description is not None and (description.documents, description.tokens) != (num_marks - 1, tokens):
        raise VirtualWidthError(
            f"{prefix}.json is of other data: it tells of {description.documents:,} documents and "
            f"{description.tokens:,} tokens, {idx} of {num_marks - 1:,} and {tokens:,}; copy all three files, or "
            "prepare the data again."
        )
    return IndexedDatasetSize(num_marks - 1, tokens, dtype)


def token_range(prefix: str, most: int) -> tuple[int, int]:
    """The smallest and the largest token id in a part of PREFIX.bin, which has passed ``check_indexed_dataset``.

    Args:
        prefix: path without the suffix.
        most: tokens to look at, in blocks from beginning to end; all of them if there are no more.
    """
    tokens = np.memmap(f"{prefix}.bin", _read_header(Path(f"{prefix}.idx"))[0], "r")
    block = min(_BLOCK, most)
    count = -(-len(tokens) // block) if len(tokens) <= most else most // block
    starts = np.linspace(0, max(0, len(tokens) - block), count, dtype=np.int64)
    pieces = [tokens[start : start + block] for start in starts]
    return int(min(piece.min() for piece in pieces)), int(max(piece.max() for piece in pieces))


def check_token_ids(smallest: int, largest: int, vocabulary_size: int, where: str) -> None:
    """Refuse token ids that the embedding has no row for, or one that no token of the tokenizer has.

    Args:
        smallest: token id.
        largest: token id.
        vocabulary_size: tokens of the tokenizer.
        where: what holds the ids.

    Raises:
        VirtualWidthError: says where.
    """
    if smallest < 0 or largest >= vocabulary_size:
        wrong = smallest if smallest < 0 else largest
        raise VirtualWidthError(
            f"{where} holds the token id {wrong}, and those of the tokenizer of this run are 0 to "
            f"{vocabulary_size - 1}: give the tokenizer that the data was prepared with."
        )


def map_sequences(prefix: str) -> tuple[np.memmap, np.memmap, np.memmap]:
    """Map PREFIX.bin and what PREFIX.idx says about its sequences; both must have passed ``check_indexed_dataset``.

    Returns:
        Tokens [tokens] in the type that the index states, and of every sequence its length in tokens [sequences] int32
        and its offset in bytes [sequences] int64.
    """
    idx = Path(f"{prefix}.idx")
    dtype, count, _ = _read_header(idx)
    lengths = np.memmap(idx, "<i4", "r", _HEADER.size, (count,))
    offsets = np.memmap(idx, "<i8", "r", _HEADER.size + lengths.nbytes, (count,))
    return np.memmap(f"{prefix}.bin", dtype, "r"), lengths, offsets


def default_index_cache(prefix: str) -> Path:
    """Where GPTDataset keeps its indices without --data-cache-path."""
    return Path(prefix) / "cache" / "GPTDataset_indices"


def _read_header(idx: Path) -> tuple[np.dtype, int, int]:
    """Token type, number of sequences, number of document marks."""
    with idx.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if not header.startswith(_MAGIC[: len(header)]) or not header:
        what = "is empty" if not header else "is no Megatron index: it does not begin with MMIDIDX"
        raise VirtualWidthError(f"{idx} {what}; prepare the data with vwn-prepare-data.")
    if len(header) < _HEADER.size:
        raise VirtualWidthError(
            f"{idx} is cut short: it ends after {len(header)} bytes, inside its header; copy or prepare the data again."
        )
    _, version, code, num_sequences, num_marks = _HEADER.unpack(header)
    if version != _VERSION:
        raise VirtualWidthError(
            f"{idx} has version {version} and Megatron reads version {_VERSION}: prepare the data again."
        )
    if code not in _TOKEN_DTYPES:
        what = "floating-point numbers" if code in _FLOAT_CODES else f"numbers of the unknown type {code}"
        raise VirtualWidthError(f"{idx} promises {what} where token ids belong: prepare the data again.")
    if num_marks < 1:
        raise VirtualWidthError(f"{idx} is damaged: it has no document marks; copy or prepare the data again.")
    return np.dtype(_TOKEN_DTYPES[code]), num_sequences, num_marks


def _check_size(path: Path, expected: int) -> None:
    """Refuse a file that is shorter or longer than its index says."""
    size = path.stat().st_size
    if size != expected:
        what = "cut short" if size < expected else "too long"
        raise VirtualWidthError(
            f"{path} is {what}: it has {size:,} bytes where its index promises {expected:,}; copy or prepare the data "
            "again."
        )
