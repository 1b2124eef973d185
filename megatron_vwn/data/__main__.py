"""vwn-prepare-data: text or JSONL to the .bin/.idx data sets that Megatron trains on.

Documents are read, tokenised in worker processes, given an end-of-document token and written in their order, so the
result does not depend on the number of workers. Everything is written to a hidden folder and moved to its final names
at the end.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from megatron_vwn.atomic import publish, staging_folder
from megatron_vwn.cli import exit_code
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data import tokenizer as _tokenizer
from megatron_vwn.data.documents import Format, find_files, is_held_out, read_batches
from megatron_vwn.data.encode import EncoderSettings, encode_batches
from megatron_vwn.data.indexed import Description, default_index_cache
from megatron_vwn.data.writer import DatasetWriter

PROGRAM = "vwn-prepare-data"
EPILOG = """\
inputs
  .txt                one document per file, or several with a form feed between them (--document-separator).
                      Line breaks at both ends of a document are dropped.
  .jsonl, .ndjson     one JSON object per line, the text under --json-key.
  .gz .xz .bz2        any of these, compressed.
  a folder            every such file under it, in the order of their paths.

outputs
  PREFIX.bin, PREFIX.idx, PREFIX.json; with --validation-fraction PREFIX_train.* and PREFIX_valid.*
  PREFIX_tokenizer/   with --train-tokenizer

example
  vwn-prepare-data corpus/ --train-tokenizer 32000 --validation-fraction 0.01 --output data/corpus
  then: --train-data-path data/corpus_train --valid-data-path data/corpus_valid
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/corpus_tokenizer
"""


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 2 for a refusal, 128 + the signal that ended it."""
    arguments = _parser().parse_args(argv)
    return exit_code(PROGRAM, lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Tokenise text or JSONL into the .bin/.idx data sets that Megatron trains on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text or JSONL files, or folders of them")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the results without suffix")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="DIR", help="Hugging Face folder of a fast tokenizer")
    tokenizer.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB",
        help="train a byte-level BPE of this many tokens on the training documents",
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.0, metavar="F", help="hold out this share of documents"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="default: %(default)s")
    parser.add_argument(
        "--document-separator",
        default=r"\f",
        metavar="TEXT",
        help=r"between documents of a .txt file; knows \n, \t, \f, \x1e ... (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    try:
        _prepare(arguments)
    except OSError as error:  # a file that cannot be read, a full disk: the error names it
        raise VirtualWidthError(str(error)) from error


def _prepare(arguments: argparse.Namespace) -> None:
    form = _check_arguments(arguments)
    files = find_files(arguments.inputs)
    output = Path(arguments.output)
    suffixes = ("_train", "_valid") if arguments.validation_fraction else ("",)
    names = [output.name + suffix for suffix in suffixes]
    finals = [output.with_name(name + kind) for name in names for kind in (".bin", ".idx", ".json")]
    if arguments.train_tokenizer:
        finals.append(output.with_name(f"{output.name}_tokenizer"))
    existing = [path for path in finals if path.exists()]
    if existing and not arguments.overwrite:
        raise VirtualWidthError(f"{existing[0]} exists: choose another --output or add --overwrite.")

    with staging_folder(output) as staging:
        tokenizer_folder = Path(arguments.tokenizer or staging / f"{output.name}_tokenizer")
        if arguments.train_tokenizer:
            texts = _training_texts(files, form, arguments.validation_fraction, arguments.seed)
            _tokenizer.save(_tokenizer.train(texts, arguments.train_tokenizer), tokenizer_folder)
        settings = EncoderSettings(tokenizer_folder, form.json_key, arguments.validation_fraction, arguments.seed)
        writers, empty = _tokenise(files, form, settings, arguments.workers, [staging / name for name in names])
        written = {writer.path.name: (writer.finish(), writer.dtype.__name__) for writer in writers}
        for name in names:
            # Megatron would go on using sample indices of the data that is replaced here.
            shutil.rmtree(default_index_cache(str(output.with_name(name))), ignore_errors=True)
        publish(staging, output.parent)
    _summarise(output, written, empty, arguments.train_tokenizer)


def _check_arguments(arguments: argparse.Namespace) -> Format:
    if arguments.workers < 1:
        raise VirtualWidthError(f"--workers is {arguments.workers}: give at least 1.")
    if not 0 <= arguments.validation_fraction < 1:
        raise VirtualWidthError(
            f"--validation-fraction is {arguments.validation_fraction}: give a share from 0 to below 1."
        )
    if arguments.train_tokenizer is not None and arguments.train_tokenizer < _tokenizer.SMALLEST_VOCABULARY:
        raise VirtualWidthError(
            f"--train-tokenizer {arguments.train_tokenizer} is too small: 256 bytes and 2 special tokens need at least "
            f"{_tokenizer.SMALLEST_VOCABULARY}."
        )
    if not Path(arguments.output).name:
        raise VirtualWidthError(f"--output {arguments.output} is no prefix: end it with a name, as in data/corpus.")
    try:
        # Escapes are resolved, every other character stays what it is.
        separator = arguments.document_separator.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()
    except UnicodeError:
        raise VirtualWidthError(
            f"--document-separator {arguments.document_separator} has an unknown escape: write a backslash as two."
        ) from None
    if not separator:
        raise VirtualWidthError(r"--document-separator is empty: give the text between documents, such as \f.")
    return Format(separator, arguments.json_key)


def _progress(files: list[Path], task: str) -> tqdm:
    total = sum(path.stat().st_size for path in files)
    # disable=None: no bar where nobody looks at it, in a log file.
    return tqdm(total=total, desc=task, unit="B", unit_scale=True, disable=None, leave=False)


def _training_texts(files: list[Path], form: Format, held_out_fraction: float, seed: int) -> Iterator[str]:
    """The documents a tokenizer may learn from: held-out text must not shape the vocabulary it is measured with."""
    with _progress(files, "tokenizer") as progress:
        for batch in read_batches(files, form):
            for record in batch.records:
                text = record.text(form.json_key)
                if text.strip() and not is_held_out(text, held_out_fraction, seed):
                    yield text
            progress.update(batch.bytes_read)


def _tokenise(
    files: list[Path], form: Format, settings: EncoderSettings, workers: int, paths: list[Path]
) -> tuple[list[DatasetWriter], int]:
    """Write the tokens of all documents under the staged paths; returns the writers and the number of empty ones."""
    writers, empty = [], 0
    # closing: an interrupted program must not leave its workers to the garbage collector.
    with (
        _progress(files, "tokens") as progress,
        closing(encode_batches(read_batches(files, form), settings, workers)) as batches,
    ):
        for batch in batches:
            if not writers:  # with the first result, not before: the workers are busy while Megatron is imported
                tokenizer = _tokenizer.load(settings.tokenizer)
                writers = [DatasetWriter(path, tokenizer) for path in paths]
            for document in batch.documents:
                writers[document.held_out].add(document)
            empty += batch.empty
            progress.update(batch.bytes_read)
    total = sum(writer.documents for writer in writers)
    if not total:
        raise VirtualWidthError(f"the input holds no text: all of its {empty:,} documents are empty.")
    for writer, task in zip(writers, ("training", "validation"), strict=False):
        if not writer.documents:
            raise VirtualWidthError(
                f"none of {total:,} documents fell to {task} with --validation-fraction {settings.held_out_fraction}: "
                "change it, give another --seed, or cut the text into more documents."
            )
    return writers, empty


def _summarise(output: Path, written: dict[str, tuple[Description, str]], empty: int, asked: int | None) -> None:
    for name, (facts, dtype) in written.items():
        print(
            f"{output.with_name(name)}.{{bin,idx,json}}: {facts.documents:,} documents, {facts.tokens:,} tokens "
            f"({dtype}), {facts.bytes_per_token:.3f} bytes per token"
        )
    if asked:
        short = f" of {asked:,} asked for: the text has no more pairs to merge" if facts.vocabulary_size < asked else ""
        print(f"{output.with_name(f'{output.name}_tokenizer')}: {facts.vocabulary_size:,} tokens{short}")
    if empty:
        print(f"{empty:,} empty documents were dropped")


if __name__ == "__main__":
    sys.exit(main())
