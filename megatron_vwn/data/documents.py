"""Documents out of text, JSON lines and Parquet files, compressed or not, in bounded memory.

Reading is cut in two so that the reader is never the bottleneck: ``read_batches`` only finds where documents begin and
end in the bytes, and ``Record.text`` decodes and checks one of them, in whichever process tokenises it.
"""

import codecs
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.files import JSON_LINES, PARQUET, TEXT, decompressed, kind_of, naming

# A document is held in memory whole; a corpus without separators must not be.
MAX_DOCUMENT_BYTES = 1 << 28
# The seed of the split is the key of a hash.
LONGEST_SEED = hashlib.blake2b.MAX_KEY_SIZE
_READ_BYTES = 1 << 20
# One batch is one message to a worker: big enough to make its cost small, small enough to share a little corpus.
_BATCH_BYTES = 1 << 18
# Rows of a Parquet file that are decoded at once.
_ROWS = 128
_NAMED_KEYS = 10
# A backslash with as much behind it as its kind of escape has, known or not.
_ESCAPE = re.compile(r"\\(?:[0-7]{1,3}|x..|u.{4}|U.{8}|N\{[^}]*\}|.|$)", re.DOTALL)
# What Python calls the values of JSON is not what JSON calls them.
_JSON_NAMES = {float: "a number", bool: "true or false", list: "an array", dict: "an object", type(None): "null"}


@dataclass(frozen=True)
class Format:
    """How the inputs are cut into documents.

    Attributes:
        separator: what stands between two documents of a text file, UTF-8.
        json_key: the key of the text in a JSON line, or its column in a Parquet file.
    """

    separator: bytes
    json_key: str


def parse_separator(text: str) -> bytes:
    """The bytes between two documents from what is typed: escapes are resolved, every other character stays.

    Raises:
        VirtualWidthError: for an unknown escape, or nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the decoder only warns of an unknown letter, and keeps it
            separator = _ESCAPE.sub(lambda escape: escape[0].encode("ascii").decode("unicode_escape"), text).encode()
    except (UnicodeError, Warning):
        raise VirtualWidthError(
            f"--document-separator {text} has an unknown escape: write a backslash as two."
        ) from None
    if not separator:
        raise VirtualWidthError(r"--document-separator is empty: give the text between documents, such as \f.")
    return separator


class Record(NamedTuple):
    """The bytes of one document as they stand in a file.

    Attributes:
        path: the file.
        kind: what the file holds, one of the kinds of ``files``.
        place: where the bytes begin in the (decompressed) text file; otherwise the line or the row, 1-based.
        raw: the bytes: a piece of text, a line, or the text of a row.
    """

    path: str
    kind: str
    place: int
    raw: bytes

    def text(self, json_key: str) -> str:
        """The text of the document.

        Raises:
            VirtualWidthError: when the bytes are no UTF-8, the line is no JSON object, or it has no text under the key.
        """
        try:
            text = self.raw.decode()
        except UnicodeDecodeError as error:
            place = f"{self.path}, byte {self.place + error.start:,}" if self.kind == TEXT else self._where()
            raise VirtualWidthError(f"{place}: the text is not UTF-8; convert the file first.") from None
        if self.kind == TEXT:
            return text.strip("\r\n")
        return self._value(text, json_key) if self.kind == JSON_LINES else text

    def _where(self) -> str:
        return f"{self.path}, row {self.place:,}" if self.kind == PARQUET else f"{self.path}:{self.place}"

    def _value(self, line: str, json_key: str) -> str:
        """The text in a JSON line."""
        where = self._where()
        try:
            value = json.loads(line, parse_int=float)  # int refuses numbers of more than 4300 digits
        except ValueError as error:
            hint = "" if Path(self.path).suffix.lower() != ".json" else ", and of a .json file every line must be"
            raise VirtualWidthError(f"{where}: the line is not valid JSON{hint} ({error}).") from None
        except RecursionError:
            raise VirtualWidthError(f"{where}: the line is not usable JSON (nested too deeply).") from None
        if not isinstance(value, dict):
            kind = _JSON_NAMES.get(type(value), "a string")
            raise VirtualWidthError(f"{where}: the line holds {kind}, not an object; write one object per line.")
        if json_key not in value:
            raise VirtualWidthError(_no_key(where, json_key, value))
        text = value[json_key]
        if not isinstance(text, str):
            kind = _JSON_NAMES[type(text)]
            raise VirtualWidthError(f'{where}: "{json_key}" holds {kind}, not text; give another --json-key.')
        try:
            text.encode()
        except UnicodeEncodeError:
            raise VirtualWidthError(
                f"{where}: the text holds half of a surrogate pair, which is no character; repair or drop the line."
            ) from None
        return text


class Batch(NamedTuple):
    """Some documents, and how many bytes on disk (compressed or not) were read for them."""

    records: list[Record]
    bytes_read: int


def read_batches(files: list[Path], form: Format) -> Iterator[Batch]:
    """Cut the files into documents, in order, without decoding them.

    Raises:
        VirtualWidthError: for a broken file, a document above ``MAX_DOCUMENT_BYTES``, or a Parquet file that has no
            text in the column.
    """
    for path in files:
        kind = kind_of(path)
        if kind == PARQUET:
            with naming(path):
                yield from _row_batches(path, form.json_key)
            continue
        records = _lines if kind == JSON_LINES else _pieces
        with decompressed(path) as (disk, content):
            # A named pipe has no position.
            position = disk.tell if disk.seekable() else lambda: 0
            size = os.fstat(disk.fileno()).st_size
            yield from _batches(records(str(path), content, form.separator), position, size)


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation split.

    Decided by a hash of the text, so that the answer depends on neither order nor process, and copies of one document
    never stand on both sides.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest) < fraction * 2**64


def _no_key(where: str, key: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    named = ", ".join(json.dumps(each, ensure_ascii=False) for each in keys[:_NAMED_KEYS]) or "none"
    more = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
    return f'{where}: there is no key "{key}"; name the key of the text with --json-key (there are {named}{more}).'


def _batches(records: Iterator[Record], position: Callable[[], int], file_bytes: int) -> Iterator[Batch]:
    batch, size, start = [], 0, 0
    for record in records:
        batch.append(record)
        size += len(record.raw)
        if size >= _BATCH_BYTES:
            end = position()
            yield Batch(batch, end - start)
            batch, size, start = [], 0, end
    yield Batch(batch, file_bytes - start)


def _row_batches(path: Path, column: str) -> Iterator[Batch]:
    import pyarrow
    from pyarrow import parquet

    # buffer_size: a row group may be larger than memory.
    with (
        path.open("rb") as disk,
        parquet.ParquetFile(disk, buffer_size=_READ_BYTES, page_checksum_verification=True) as file,
    ):
        schema = file.schema_arrow
        if schema.names.count(column) != 1:
            raise VirtualWidthError(_no_key(str(path), column, schema.names))
        held, types = schema.field(column).type, pyarrow.types
        held = held.value_type if types.is_dictionary(held) else held
        if not any(is_text(held) for is_text in (types.is_string, types.is_large_string, types.is_string_view)):
            raise VirtualWidthError(f'{path}: the column "{column}" holds {held}, not text; give another --json-key.')
        file_bytes, rows, read = os.fstat(disk.fileno()).st_size, max(1, file.metadata.num_rows), 0

        def records() -> Iterator[Record]:
            nonlocal read
            for batch in file.iter_batches(_ROWS, columns=[column]):
                for raw in batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist():
                    read += 1
                    if raw is None:
                        raise VirtualWidthError(f'{path}, row {read:,}: "{column}" holds null, not text; drop the row.')
                    if len(raw) > MAX_DOCUMENT_BYTES:
                        raise VirtualWidthError(
                            f"{path}, row {read:,}: the text is longer than {MAX_DOCUMENT_BYTES >> 20} MiB; split it."
                        )
                    yield Record(str(path), PARQUET, read, raw)

        yield from _batches(records(), lambda: file_bytes * read // rows, file_bytes)


def _lines(path: str, stream: BinaryIO, _separator: bytes) -> Iterator[Record]:
    number = 0
    while raw := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise VirtualWidthError(
                f"{path}:{number}: the line is longer than {MAX_DOCUMENT_BYTES >> 20} MiB; split it."
            )
        if raw.strip():
            yield Record(path, JSON_LINES, number, raw)


def _pieces(path: str, stream: BinaryIO, separator: bytes) -> Iterator[Record]:
    buffer, offset = bytearray(), 0  # offset of the buffer in the file
    while chunk := stream.read(_READ_BYTES):
        if not offset and not buffer and chunk.startswith(codecs.BOM_UTF8):
            chunk, offset = chunk.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        # A separator may lie across two chunks.
        start, search_from = 0, max(0, len(buffer) - len(separator) + 1)
        buffer += chunk
        while (end := buffer.find(separator, search_from)) >= 0:
            yield Record(path, TEXT, offset + start, bytes(buffer[start:end]))
            start = search_from = end + len(separator)
        del buffer[:start]
        offset += start
        if len(buffer) > MAX_DOCUMENT_BYTES:
            raise VirtualWidthError(
                f"{path}, byte {offset:,}: a document is longer than {MAX_DOCUMENT_BYTES >> 20} MiB; say what stands "
                "between documents with --document-separator."
            )
    yield Record(path, TEXT, offset, bytes(buffer))
