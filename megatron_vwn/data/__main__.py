"""vwn-prepare-data: text, JSON lines or Parquet to the .bin/.idx data sets that Megatron trains on.

Documents are read, tokenised in worker processes, given an end-of-document token and written in their order, so the
result does not depend on the number of workers. Everything is written to a hidden folder and moved to its final names
at the end.
"""

import argparse
import os
import shutil
import sys
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from megatron_vwn.atomic import publish, staging_folder
from megatron_vwn.cli import exit_code
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.apart import call_apart
from megatron_vwn.data.documents import LONGEST_SEED, Format, parse_separator, read_batches
from megatron_vwn.data.encode import EncoderSettings, encode_batches
from megatron_vwn.data.files import find_corpus
from megatron_vwn.data.indexed import Description, default_index_cache
from megatron_vwn.data.tokenizer import load, save
from megatron_vwn.data.train_tokenizer import (
    LARGEST_VOCABULARY,
    MAX_WORD_BYTES,
    SMALLEST_VOCABULARY,
    Trained,
    train_tokenizer,
)
from megatron_vwn.data.writer import DatasetWriter

PROGRAM = "vwn-prepare-data"
EPILOG = """\
inputs
  .txt                one document per file, or several with a form feed between them (--document-separator).
                      Line breaks at both ends of a document are dropped.
  .jsonl, .ndjson     one JSON object per line, the text under --json-key; also .json, if every line is an object.
  .gz .xz .bz2 .zst   any of these, compressed.
  .parquet            one document per row, the text in the column --json-key.
  a folder            every such file under it, in the order of their paths, behind links as well. What is left out is
                      said, and what is named twice is read once.
  .zst and .parquet need pyarrow: pip install 'megatron_vwn[data]'.

outputs
  PREFIX.bin, PREFIX.idx, PREFIX.json; with --validation-fraction PREFIX_train.* and PREFIX_valid.*
  PREFIX_tokenizer/   with --train-tokenizer; words of more than 1,000 bytes are learnt from in pieces

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
        description="Tokenise text, JSON lines or Parquet into the .bin/.idx data sets that Megatron trains on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, or folders of them")
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
    parser.add_argument("--json-key", default="text", metavar="KEY", help="of the text (default: %(default)s)")
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
    except OSError as error:  # a folder that cannot be read or written, a full disk
        where = "" if error.filename else f"{arguments.output}: "
        raise VirtualWidthError(f"{where}{error}") from error


def _prepare(arguments: argparse.Namespace) -> None:
    form = _check_arguments(arguments)
    files, notes = find_corpus(arguments.inputs, form.json_key)
    output = Path(arguments.output)
    suffixes = ("_train", "_valid") if arguments.validation_fraction else ("",)
    names = [output.name + suffix for suffix in suffixes]
    finals = [output.with_name(name + kind) for name in names for kind in (".bin", ".idx", ".json")]
    if arguments.train_tokenizer:
        finals.append(output.with_name(f"{output.name}_tokenizer"))
    existing = [path for path in finals if path.exists()]
    if existing and not arguments.overwrite:
        raise VirtualWidthError(f"{existing[0]} exists: choose another --output or add --overwrite.")

    for note in notes:
        print(f"{note}.", flush=True)
    tokenizer = None if arguments.tokenizer is None else load(Path(arguments.tokenizer))
    trained = None
    with staging_folder(output) as staging:
        if tokenizer is None:
            trained = _train(files, form, arguments)
            folder = staging / f"{output.name}_tokenizer"
            save(trained.json, folder)
            tokenizer = load(folder)
        settings = EncoderSettings(tokenizer, form.json_key, arguments.validation_fraction, arguments.seed)
        writers, empty = _tokenise(files, form, settings, arguments.workers, [staging / name for name in names])
        written = {writer.path.name: (writer.finish(), writer.dtype.__name__) for writer in writers}
        for name in names:
            # Of the data that is replaced here; Megatron's own programs would go on using them.
            shutil.rmtree(default_index_cache(str(output.with_name(name))), ignore_errors=True)
        publish(staging, output.parent)
    _summarise(output, written, empty, trained, arguments.train_tokenizer)


def _check_arguments(arguments: argparse.Namespace) -> Format:
    if arguments.workers < 1:
        raise VirtualWidthError(f"--workers is {arguments.workers}: give at least 1.")
    if not 0 <= arguments.validation_fraction < 1:
        raise VirtualWidthError(
            f"--validation-fraction is {arguments.validation_fraction}: give a share from 0 to below 1."
        )
    if arguments.train_tokenizer is not None and arguments.train_tokenizer < SMALLEST_VOCABULARY:
        raise VirtualWidthError(
            f"--train-tokenizer {arguments.train_tokenizer} is too small: 256 bytes and 2 special tokens need at least "
            f"{SMALLEST_VOCABULARY}."
        )
    if arguments.train_tokenizer is not None and arguments.train_tokenizer > LARGEST_VOCABULARY:
        raise VirtualWidthError(
            f"--train-tokenizer {arguments.train_tokenizer} is too large: give at most {LARGEST_VOCABULARY}."
        )
    if len(str(arguments.seed)) > LONGEST_SEED:
        raise VirtualWidthError(f"--seed {arguments.seed} is too long: give at most {LONGEST_SEED} digits.")
    # The last part as it is typed: pathlib takes .. for a name, and data/ or data/. for data.
    if os.path.basename(arguments.output) in ("", ".", ".."):
        raise VirtualWidthError(f"--output {arguments.output} is no prefix: end it with a name, as in data/corpus.")
    return Format(parse_separator(arguments.document_separator), arguments.json_key)


def _progress(files: list[Path], task: str) -> tqdm:
    total = sum(path.stat().st_size for path in files)
    # disable=None: no bar where nobody looks at it, in a log file.
    return tqdm(total=total, desc=task, unit="B", unit_scale=True, disable=None, leave=False)


def _train(files: list[Path], form: Format, arguments: argparse.Namespace) -> Trained:
    settings = arguments.validation_fraction, arguments.seed, arguments.train_tokenizer
    with _progress(files, "tokenizer") as progress:
        return call_apart(train_tokenizer, files, form, *settings, progress=progress.update)


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
                writers = [DatasetWriter(path, settings.tokenizer) for path in paths]
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


def _summarise(
    output: Path, written: dict[str, tuple[Description, str]], empty: int, trained: Trained | None, asked: int | None
) -> None:
    for name, (facts, dtype) in written.items():
        print(
            f"{output.with_name(name)}.{{bin,idx,json}}: {facts.documents:,} documents, {facts.tokens:,} tokens "
            f"({dtype}), {facts.bytes_per_token:.3f} bytes per token"
        )
    if trained is not None:
        short = f" of {asked:,} asked for: the text has no more pairs to merge" if facts.vocabulary_size < asked else ""
        print(f"{output.with_name(f'{output.name}_tokenizer')}: {facts.vocabulary_size:,} tokens{short}")
        if trained.long_words:
            print(f"words of more than {MAX_WORD_BYTES:,} bytes, learnt from in pieces: {trained.long_words:,}")
    if empty:
        print(f"{empty:,} empty documents were dropped")


if __name__ == "__main__":
    sys.exit(main())
