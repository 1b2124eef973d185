"""The files of a corpus: which of them are read, what they hold, and how a compressed one is opened.

Nothing is passed over in silence: what a folder holds besides text is left out by name, and what is named twice, in two
inputs or through a link, is read once and said.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_vwn.config import VirtualWidthError

TEXT, JSON_LINES, PARQUET = "text", "JSON lines", "Parquet"
_KINDS = {".txt": TEXT, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".json": JSON_LINES, ".parquet": PARQUET}
# The only suffix that is also that of other things: in a folder the first line decides.
_MAY_BE_OTHER = ".json"
_FIRST_LINE_BYTES = 1 << 24
_NAMED = 5


def _open_zstandard(disk: BinaryIO) -> BinaryIO:
    import pyarrow

    # The library notices a file that was cut short; it reads no lines by itself.
    return io.BufferedReader(pyarrow.CompressedInputStream(disk, "zstd"), 1 << 20)


_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstandard}


class Corpus(NamedTuple):
    """The files to read, in order, and a note each on what is not read as it was named."""

    files: list[Path]
    notes: list[str]


def find_corpus(inputs: list[str], json_key: str) -> Corpus:
    """The files that the inputs name: files as given, folders searched for known suffixes, sorted by path.

    Links are followed. Suffixes may be in upper case.

    Args:
        inputs: files and folders.
        json_key: the key of the text; tells JSON lines from other .json files of a folder.

    Raises:
        VirtualWidthError: for a missing input, a file of an unknown kind, a folder without a usable file, or a file
            that a missing library would read.
    """
    search = _Search(json_key)
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            if not search.read_folder(path):
                what = f"{path} holds no text: it has no file that ends in {_known_suffixes()}"
                raise VirtualWidthError(f"{'; '.join([what, *search.notes()])}.")
        elif not path.exists():
            raise VirtualWidthError(f"{path} does not exist: check the path of the input.")
        elif not kind_of(path):
            raise VirtualWidthError(f"{path} is of an unknown kind: its name must end in {_known_suffixes()}.")
        else:
            search.read_file(path)
    for path in search.files:
        if kind_of(path) == PARQUET or _compression(path) == ".zst":
            _require_pyarrow(path)
    return Corpus(search.files, search.notes())


def kind_of(path: Path) -> str:
    """What a file holds by its name, a compression apart: one of the three kinds, or empty."""
    kind = _KINDS.get(_inner_suffix(path), "")
    return "" if kind == PARQUET and _compression(path) else kind


@contextmanager
def decompressed(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file on disk, whose position tells how far it is read, and its content.

    Raises:
        VirtualWidthError: names a file that cannot be read or decompressed.
    """
    opener = _OPENERS.get(_compression(path))
    with naming(path), path.open("rb") as disk:
        if opener and disk.seekable() and not os.fstat(disk.fileno()).st_size:
            raise EOFError("it is empty")  # which gzip takes for an archive
        yield disk, opener(disk) if opener else disk


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what the libraries raise about a broken file into one sentence that names it."""
    try:
        yield
    except VirtualWidthError:
        raise
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of a library
            raise VirtualWidthError(f"{path} cannot be read ({error.strerror}).") from None
        what = "decompressed" if _compression(path) else "read"
        raise VirtualWidthError(f"{path} cannot be {what} ({reason}): copy or make it again.") from None


class _Search:
    """What the inputs named so far hold."""

    def __init__(self, json_key: str):
        self.json_key = json_key
        self.files: list[Path] = []
        self.twice: list[Path] = []
        self.other: list[Path] = []
        self.no_lines: list[Path] = []
        self.seen: set[tuple[int, int]] = set()

    def read_file(self, path: Path) -> None:
        """Take a file, unless it was taken under this or another name."""
        if self._is_new(path):
            self.files.append(path)

    def read_folder(self, folder: Path) -> bool:
        """Take the files under a folder; whether it has any that can be read."""
        usable = False
        for path in sorted(self._files_under(folder)):
            if not path.is_file() or not kind_of(path):  # a link to nothing is no file
                self.other.append(path)
            elif _inner_suffix(path) == _MAY_BE_OTHER and not self._has_lines(path):
                self.no_lines.append(path)
            else:
                usable = True
                self.read_file(path)
        return usable or folder in self.twice

    def notes(self) -> list[str]:
        """A note on every kind of file that is not read, or not twice."""
        return [
            f"{what} ({len(paths):,}): {_some(paths)}"
            for what, paths in (
                ("left out, because their suffixes are of no text", self.other),
                (f'left out, because the first line is no JSON object with the key "{self.json_key}"', self.no_lines),
                ("named twice, by two inputs or through a link, and read once", self.twice),
            )
            if paths
        ]

    def _is_new(self, path: Path) -> bool:
        status = path.stat()
        identity = status.st_dev, status.st_ino
        if identity in self.seen:
            self.twice.append(path)
            return False
        self.seen.add(identity)
        return True

    def _files_under(self, folder: Path) -> Iterator[Path]:
        """Every file below; links to folders come last, so that a folder has its own name where it has two."""
        waiting = [folder]
        while waiting:
            top = waiting.pop(0)
            if not self._is_new(top):
                continue
            for parent, folders, names in os.walk(top, onerror=_raise):
                links = {name for name in folders if os.path.islink(os.path.join(parent, name))}
                waiting += (Path(parent, name) for name in sorted(links))
                folders[:] = [n for n in sorted(set(folders) - links) if self._is_new(Path(parent, n))]
                yield from (Path(parent, name) for name in names)

    def _has_lines(self, path: Path) -> bool:
        try:
            with decompressed(path) as (_, content):
                lines = iter(lambda: content.readline(_FIRST_LINE_BYTES), b"")
                line = next(filter(bytes.strip, lines), b"null")
        except VirtualWidthError:
            return True  # a broken file is refused by name when it is read
        try:
            value = json.loads(line.removeprefix(codecs.BOM_UTF8), parse_int=float)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and self.json_key in value


def _inner_suffix(path: Path) -> str:
    return (path.with_suffix("") if _compression(path) else path).suffix.lower()


def _compression(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if suffix in _OPENERS else ""


def _known_suffixes() -> str:
    packed = [suffix for suffix, kind in _KINDS.items() if kind != PARQUET]
    return f"{', '.join(packed)} (or one of these and {', '.join(_OPENERS)}) or .parquet"


def _require_pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise VirtualWidthError(
            f"{path} needs pyarrow, which cannot be imported ({error}): pip install 'megatron_vwn[data]'."
        ) from None


def _some(paths: list[Path]) -> str:
    more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
    return ", ".join(map(str, paths[:_NAMED])) + more


def _raise(error: OSError) -> None:
    raise error
