"""Write the tasks of this folder and their data for a corpus: python examples/evaluate/make_data.py --output FOLDER

The documents that vwn-prepare-data holds out become heldout.jsonl, and sentences of them questions in
next_sentence.jsonl. Nothing else is read, so that a model trained on the rest has seen neither a right answer nor a
wrong one. The tasks lie beside the data and name it by its path. The same inputs give the same files.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_vwn.cli import exit_code
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.documents import Format, is_held_out, parse_separator, read_batches
from megatron_vwn.data.files import find_corpus

PROGRAM = "make_data.py"
HERE = Path(__file__).parent
NOVELS = HERE.parent / "quickstart" / "data" / "austen.txt.xz"
OUTPUT = HERE.parent / "quickstart" / "out" / "evaluate"
QUESTIONS = 300
CHOICES = 4
# Characters. Context and answer together stay below the 128 tokens that the quickstart's model sees at once.
CONTEXT = range(100, 260)
ANSWER = range(40, 120)
# A wrong answer is about as long as the right one, whose probability would else be told by its length.
LENGTHS_APART = 0.15
# The end of a sentence, with the quotation marks that close it; what follows it here begins the next one. Titles are
# abbreviated with a full stop and go before a capital too.
_SENTENCE_END = re.compile(r"""(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?]["')]*\s+(?=["'(]?[A-Z])""")


class Sentence(NamedTuple):
    """One sentence, the number of its document, and what stands before it in its paragraph."""

    document: int
    text: str
    before: str


def held_out_documents(inputs: list[str], form: Format, fraction: float, seed: int) -> list[str]:
    """The validation split of vwn-prepare-data, in its order."""
    files, notes = find_corpus(inputs, form.json_key)
    for note in notes:
        print(f"{note}.")
    texts = (record.text(form.json_key) for batch in read_batches(files, form) for record in batch.records)
    return [text for text in texts if text.strip() and is_held_out(text, fraction, seed)]


def sentences(documents: list[str]) -> Iterator[Sentence]:
    """Sentences of a fitting length that have a fitting context."""
    for number, document in enumerate(documents):
        for paragraph in re.split(r"\n\s*\n", document):
            # Line ends become blanks: where a line of the book is full would tell the right answer from the others.
            words = " ".join(paragraph.split())
            starts = [0, *(end.end() for end in _SENTENCE_END.finditer(words)), len(words)]
            for at in range(1, len(starts) - 1):
                text = words[starts[at] : starts[at + 1]].strip()
                # As many whole sentences as fit.
                begin = next((start for start in starts[:at] if starts[at] - start < CONTEXT.stop), starts[at])
                before = words[begin : starts[at]].strip()
                if len(text) in ANSWER and len(before) in CONTEXT:
                    yield Sentence(number, text, before)


def questions(documents: list[str], most: int = QUESTIONS) -> list[dict]:
    """Which sentence comes next: the right one among others from other documents."""
    random_ = random.Random(0)
    found = list(sentences(documents))
    asked = []
    for right in random_.sample(found, len(found)):
        others = [
            sentence.text
            for sentence in found
            if sentence.document != right.document
            and abs(len(sentence.text) - len(right.text)) <= LENGTHS_APART * len(right.text)
            and sentence.text != right.text
        ]
        others = sorted(set(others))
        if len(others) < CHOICES - 1:
            continue
        choices, answer = random_.sample(others, CHOICES - 1), random_.randrange(CHOICES)
        choices.insert(answer, right.text)
        asked.append({"context": right.before, "choices": choices, "answer": answer})
    return asked[:most]


def write_tasks(folder: Path, heldout: list[dict], next_sentence: list[dict]) -> None:
    """Write the rows of both tasks, and beside them the tasks with the path of their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("heldout", heldout), ("next_sentence", next_sentence)):
        path = folder.resolve() / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        task = (HERE / f"{name}.yaml").read_text()
        path.with_suffix(".yaml").write_text(task.replace("DATA", json.dumps(str(path))))
        print(f"{path}: {len(rows)} lines")


def main(argv: list[str] | None = None) -> int:
    """Write data and tasks; returns the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="*", help="as of vwn-prepare-data (default: the quickstart's novels)")
    parser.add_argument("--validation-fraction", type=float, default=0.05, help="as there (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="as there (default: %(default)s)")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="as there (default: %(default)s)")
    parser.add_argument("--document-separator", default=r"\f", metavar="TEXT", help="as there (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of tasks and data (default, without inputs: beside the quickstart's)",
    )
    options = parser.parse_args(argv)
    if options.inputs and options.output is None:
        parser.error("--output is missing: give a folder for the tasks of your corpus.")
    return exit_code(PROGRAM, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    form = Format(parse_separator(options.document_separator), options.json_key)
    fraction, seed = options.validation_fraction, options.seed
    documents = held_out_documents(options.inputs or [str(NOVELS)], form, fraction, seed)
    if not documents:
        raise VirtualWidthError(
            f"no document is held out with --validation-fraction {fraction} and --seed {seed}: give those of "
            "vwn-prepare-data."
        )
    try:
        write_tasks(options.output or OUTPUT, [{"text": text} for text in documents], questions(documents))
    except OSError as error:
        raise VirtualWidthError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
