"""Rebuild austen.txt.xz from Debian's package r-cran-janeaustenr: six novels, one document per chapter.

    apt-get download r-cran-janeaustenr
    python extract_austen.py r-cran-janeaustenr_*_all.deb austen.txt.xz

Needs dpkg-deb and nothing else: R's lazy-load database is a row of compressed, serialised R objects, and the strings in
one are records of a fixed form, so neither R nor root is needed.
"""

import bz2
import lzma
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
SEPARATOR = "\n\f\n"

# A serialised string: flags (level, gp, type CHARSXP = 9), then a big-endian length, then the bytes.
STRING = re.compile(rb"\x00[\x00-\xff][\x00-\xff]\x09(?=([\x00-\xff]{4}))")
VOLUME = re.compile(r"VOLUME [IVX]+")
CHAPTER = re.compile(r"(?:CHAPTER|Chapter) (?:[IVXL]+|\d+)")
# The only editorial text in the package: a note of the modern edition behind the end of Northanger Abbey.
EDITORIAL = "A NOTE ON THE TEXT"


def objects(database: bytes) -> list[bytes]:
    """Decompress the objects of a lazy-load database: uint32 length, an optional type byte, a compressed stream."""
    found, start = [], 0
    while start < len(database):
        kind = database[start + 4 : start + 5]
        if kind == b"x":  # the first byte of a zlib stream itself: R writes no type byte before zlib
            stream, decompressor = start + 4, zlib.decompressobj()
        elif kind == b"2":
            stream, decompressor = start + 5, bz2.BZ2Decompressor()
        else:
            filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 23}]
            stream, decompressor = start + 5, lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
        found.append(decompressor.decompress(database[stream:]))
        start = len(database) - len(decompressor.unused_data)
    return found


def lines(serialised: bytes) -> list[str]:
    """The strings of one serialised character vector, in order: the lines of a novel."""
    found, position = [], 0
    while match := STRING.search(serialised, position):
        (length,) = struct.unpack(">i", match[1])
        position = match.end() + 4
        if 0 <= length <= len(serialised) - position:
            found.append(serialised[position : position + length].decode())
            position += length
    return found


def chapters(novel: list[str]) -> list[str]:
    """Cut a novel before every chapter; title page and volume headings go with the chapter that follows them."""
    if EDITORIAL in novel:
        novel = novel[: novel.index(EDITORIAL)]
    starts = [0]
    has_chapter = False
    for number, line in enumerate(novel):
        if VOLUME.fullmatch(line) or CHAPTER.fullmatch(line):
            if has_chapter:
                starts.append(number)
            has_chapter = bool(CHAPTER.fullmatch(line))
    ends = [*starts[1:], len(novel)]
    return ["\n".join(novel[start:end]).strip("\n") for start, end in zip(starts, ends, strict=True)]


def main() -> None:
    """Write the chapters of all novels to the xz file named second on the command line."""
    package, target = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
        database = (Path(folder) / DATABASE).read_bytes()
    documents = [chapter for blob in objects(database) if (novel := lines(blob)) for chapter in chapters(novel)]
    text = (SEPARATOR.join(documents) + "\n").encode()
    Path(target).write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    print(f"{target}: {len(documents)} chapters, {len(text):,} bytes of text")


if __name__ == "__main__":
    main()
