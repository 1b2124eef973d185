"""Documents out of text and JSONL files, compressed or not, in bounded memory.

Reading is cut in two so that the reader is never the bottleneck: ``read_batches`` only finds where documents begin and
end in the bytes, and ``Record.text`` decodes and checks one of them, in whichever process tokenises it.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_vwn.config import VirtualWidthError

TEXT_SUFFIXES = (".txt",)
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_BAD_ARCHIVE = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)

# A document is held in memory whole; a corpus without separators must not be.
MAX_DOCUMENT_BYTES = 1 << 28
_READ_BYTES = 1 << 20
# One batch is one message to a worker: big enough to make its cost small, small enough to share a little corpus.
_BATCH_BYTES = 1 << 18
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Format:
    """How the inputs are cut into documents.

    Attributes:
        separator: what stands between two documents of a text file, UTF-8.
        json_key: the key of the text in a line of a JSONL file.
    """

    separator: bytes
    json_key: str


class Record(NamedTuple):
    """The bytes of one document as they stand in a file.

    Attributes:
        path: the file.
        line: its line, 1-based, in a JSONL file; 0 in a text file.
        offset: where the bytes begin in the (decompressed) text file.
        raw: the bytes.
    """

    path: str
    line: int
    offset: int
    raw: bytes

    def text(self, json_key: str) -> str:
        """The text of the document.

        Raises:
            VirtualWidthError: when the bytes are no UTF-8, the line is no JSON object, or it has no text under the key.
        """
        where = f"{self.path}:{self.line}" if self.line else self.path
        try:
            text = self.raw.decode()
        except UnicodeDecodeError as error:
            place = where if self.line else f"{where}, byte {self.offset + error.start:,}"
            raise VirtualWidthError(f"{place}: the text is not UTF-8; convert the file first.") from None
        if not self.line:
            return text.strip("\r\n")
        try:
            value = json.loads(text)
        except ValueError as error:
            raise VirtualWidthError(f"{where}: the line is not valid JSON ({error}).") from None
        except RecursionError:
            raise VirtualWidthError(f"{where}: the line is not usable JSON (nested too deeply).") from None
        if not isinstance(value, dict) or json_key not in value:
            raise VirtualWidthError(f'{where}: there is no key "{json_key}"; name the key of the text with --json-key.')
        if not isinstance(value[json_key], str):
            raise VirtualWidthError(
                f'{where}: "{json_key}" holds {type(value[json_key]).__name__}, not text; give another --json-key.'
            )
        try:
            value[json_key].encode()
        except UnicodeEncodeError:
            raise VirtualWidthError(
                f"{where}: the text holds half of a surrogate pair, which is no character; repair or drop the line."
            ) from None
        return value[json_key]


class Batch(NamedTuple):
    """Some documents, and how many bytes on disk (compressed or not) were read for them."""

    records: list[Record]
    bytes_read: int


def find_files(inputs: list[str]) -> list[Path]:
    """The files that the inputs name: files as given, folders searched for known suffixes, sorted by path.

    Raises:
        VirtualWidthError: for a missing input, a file of an unknown kind, or a folder without a usable file.
    """
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
            if not found:
                raise VirtualWidthError(f"{path} holds no text: it has no file that ends in {_known_suffixes()}.")
            files += found
        elif not path.exists():
            raise VirtualWidthError(f"{path} does not exist: check the path of the input.")
        elif not _kind(path):
            raise VirtualWidthError(f"{path} is of an unknown kind: rename it to end in {_known_suffixes()}.")
        else:
            files.append(path)
    return files


def read_batches(files: list[Path], form: Format) -> Iterator[Batch]:
    """Cut the files into documents, in order, without decoding them.

    Raises:
        VirtualWidthError: for a broken archive or a document above ``MAX_DOCUMENT_BYTES``.
    """
    for path in files:
        with path.open("rb") as disk:
            opener = _OPENERS.get(path.suffix)
            stream = opener(disk) if opener else disk
            records = _jsonl_records if _kind(path) in JSONL_SUFFIXES else _text_records
            try:
                yield from _batches(disk, records(str(path), stream, form.separator))
            except _BAD_ARCHIVE as error:
                raise VirtualWidthError(f"{path} cannot be decompressed ({error}): copy or make it again.") from None


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation split.

    Decided by a hash of the text, so that the answer depends on neither order nor process, and copies of one document
    never stand on both sides.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest) < fraction * 2**64


def _kind(path: Path) -> str:
    """The suffix under a compression, where it is a known one; otherwise empty."""
    inner = path.with_suffix("") if path.suffix in _OPENERS else path
    return inner.suffix if inner.suffix in TEXT_SUFFIXES + JSONL_SUFFIXES else ""


def _known_suffixes() -> str:
    return f"{', '.join(TEXT_SUFFIXES + JSONL_SUFFIXES)} (or one of these and {', '.join(_OPENERS)})"


def _batches(disk: BinaryIO, records: Iterator[Record]) -> Iterator[Batch]:
    batch, size, start = [], 0, 0
    for record in records:
        batch.append(record)
        size += len(record.raw)
        if size >= _BATCH_BYTES:
            position = disk.tell() if disk.seekable() else 0  # a named pipe has no position
            yield Batch(batch, position - start)
            batch, size, start = [], 0, position
    yield Batch(batch, os.fstat(disk.fileno()).st_size - start)


def _jsonl_records(path: str, stream: BinaryIO, _separator: bytes) -> Iterator[Record]:
    number = 0
    while raw := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(_BYTE_ORDER_MARK)
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise VirtualWidthError(
                f"{path}:{number}: the line is longer than {MAX_DOCUMENT_BYTES >> 20} MiB; split it."
            )
        if raw.strip():
            yield Record(path, number, 0, raw)


def _text_records(path: str, stream: BinaryIO, separator: bytes) -> Iterator[Record]:
    buffer, offset = bytearray(), 0  # offset of the buffer in the file
    while chunk := stream.read(_READ_BYTES):
        if not offset and not buffer and chunk.startswith(_BYTE_ORDER_MARK):
            chunk, offset = chunk.removeprefix(_BYTE_ORDER_MARK), len(_BYTE_ORDER_MARK)
        # A separator may lie across two chunks.
        start, search_from = 0, max(0, len(buffer) - len(separator) + 1)
        buffer += chunk
        while (end := buffer.find(separator, search_from)) >= 0:
            yield Record(path, 0, offset + start, bytes(buffer[start:end]))
            start = search_from = end + len(separator)
        del buffer[:start]
        offset += start
        if len(buffer) > MAX_DOCUMENT_BYTES:
            raise VirtualWidthError(
                f"{path}, byte {offset:,}: a document is longer than {MAX_DOCUMENT_BYTES >> 20} MiB; say what stands "
                "between documents with --document-separator."
            )
    yield Record(path, 0, offset, bytes(buffer))
