"""Finished runs as small text files that a repository can hold, and from which the report comes out the same.

OUTPUT/study.json
OUTPUT/<variant>/timing.json
OUTPUT/<variant>/seed-<s>/{run.json,scalars.csv,facts.json}    flags and versions; curves; arguments and samples
"""

import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_vwn.atomic import atomic_folder, write_json
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.study.compare import METRICS
from megatron_vwn.study.events import KEPT, KEPT_FACTS, Curve, LoggedRun, find_runs
from megatron_vwn.study.folder import RECORD, STUDY, TIMING, read_json
from megatron_vwn.study.growth import SCHEDULE
from megatron_vwn.study.routing import TAGS

_TAGS = (*(metric.tag for metric in METRICS), "iteration-time", *TAGS)
# Beside all of the virtual width's.
_ARGUMENTS = ("seq_length", "global_batch_size", *SCHEDULE)


def keep(folder: Path, output: Path) -> list[str]:
    """Write every finished run below ``folder`` that has not been written, each whole or not at all.

    Args:
        folder: of a study, or any with event files below.
        output: another folder; what it holds of other runs stays.

    Returns:
        Lines for the screen.

    Raises:
        VirtualWidthError: no runs, or no place for them.
    """
    if output.resolve() == folder.resolve() or folder.resolve() in output.resolve().parents:
        raise VirtualWidthError(f"{output} is where the runs are: give an --output beside {folder}.")
    lines, kept = [], 0
    try:
        for run in find_runs([folder]):
            state = run.record.get("state", "done")
            if state == "done":
                _write(run, output / run.name)
                kept += 1
            else:
                lines.append(f"{run.name} is {state}, so it is left out.")
        for path in [folder / STUDY, *folder.glob(f"*/{TIMING}")]:
            # A variant without a finished run has no folder.
            if path.is_file() and (target := output / path.relative_to(folder)).parent.is_dir():
                write_json(target, read_json(path))
    except OSError as error:
        raise VirtualWidthError(f"{output} cannot be written ({error.strerror}): give another --output.") from None
    return [*lines, f"{kept} runs are in {output}. Compare them: vwn-study report {output}"]


def _write(run: LoggedRun, folder: Path) -> None:
    with atomic_folder(folder) as staging:
        with (staging / KEPT).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["tag", "step", "value"])
            for tag, curve in run.scalars.items():
                if tag.startswith(_TAGS) and not tag.endswith(" vs samples"):
                    # As many digits as tell fp32 numbers apart.
                    writer.writerows([tag, step, f"{np.float32(value):.9g}"] for step, value in sorted(curve.items()))
        read = {name: text for name, text in run.arguments.items() if name.startswith("vwn_") or name in _ARGUMENTS}
        facts = {"arguments": read, "samples": _corners(run.samples), "notes": run.notes}
        write_json(staging / KEPT_FACTS, facts)
        if run.record:
            write_json(staging / RECORD, run.record)


def _corners(samples: Curve) -> Sequence[tuple[int, float]]:
    """Samples by step without those that lie on the line between their neighbours."""
    points = sorted(samples.items())
    slopes = [_slope(*pair) for pair in pairwise(points)]
    inner = [point for point, pair in zip(points[1:], pairwise(slopes), strict=False) if pair[0] != pair[1]]
    return [*points[:1], *inner, *points[1:][-1:]]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
