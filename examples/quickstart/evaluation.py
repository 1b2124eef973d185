"""The end of the quickstart: both runs as Hugging Face folders, held-out bits per byte, and a paragraph of each.

Each half is a process of its own: the tools need Megatron, and what reads their folders must not.
"""

import json
import sys
import textwrap
from pathlib import Path

from progress import Clock, run_logged

FOLDER = "huggingface"
RESULTS = "heldout.json"
PROGRAMS = Path(__file__).parent
_COLUMNS = 96


def evaluate(baseline: Path, wide: Path, text: str, log: Path, clock: Clock) -> list[dict]:
    """Export and score what was not exported and scored before.

    Args:
        baseline: the run without a virtual width.
        wide: the run with one.
        text: path of the tokenised validation text without suffix.
        log: where the output of the programs goes.
        clock: says what is done.

    Returns:
        Per run its "bits_per_byte" and its "paragraph".

    Raises:
        RunFailedError: a program failed.
    """
    runs = baseline, wide
    steps = (
        (FOLDER, "export.py", (baseline, wide), "writing both runs as Hugging Face folders"),
        (RESULTS, "score.py", (text, *runs), "what both make of the held-out text, and a paragraph of each"),
    )
    for made, program, arguments, what in steps:
        if all((run / made).exists() for run in runs):
            clock.say("evaluation", f"{made} of both runs was written earlier")
            continue
        clock.say("evaluation", what)
        for _ in run_logged([sys.executable, str(PROGRAMS / program), *map(str, arguments)], log):
            pass  # into the log
    results = [json.loads((run / RESULTS).read_text()) for run in runs]
    for run, result in zip(runs, results, strict=True):
        clock.say(run.name, f"held-out text: {result['bits_per_byte']:.4f} bits per byte")
    return results


def quote(titles: list[str], results: list[dict]) -> str:
    """The paragraphs, each under the title of its model."""
    lines = [f'Asked to go on after "{results[0]["prompt"]} ...":', ""]
    for title, result in zip(titles, results, strict=True):
        lines += [title, textwrap.indent(textwrap.fill(f"... {result['paragraph']} ...", _COLUMNS), "    "), ""]
    return "\n".join(lines)
