"""Finished runs as small text files that a repository can hold, and from which the report comes out the same.

OUTPUT/study.json
OUTPUT/<variant>/timing.json
OUTPUT/<variant>/seed-<s>/{run.json,scalars.csv,facts.json}    flags and versions; curves; arguments and samples

Of a run that is not done only run.json is written, so that the report says what became of it. Of paths from the root of
this machine the last part stays.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_vwn.atomic import atomic_folder, write_json
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.study.folder import RECORD, STUDY, TIMING, foreign, read_json
from megatron_vwn.study.report.compare import METRICS, TRAINING
from megatron_vwn.study.report.events import EVENTS, KEPT, KEPT_FACTS, VALIDATION, Curve, LoggedRun, find_runs
from megatron_vwn.study.report.growth import SCHEDULE
from megatron_vwn.study.report.routing import TAGS

# Beside all of the virtual width's.
_ARGUMENTS = ("seq_length", "global_batch_size", *SCHEDULE)
# Of a path from the root, at the start of a word or behind a mark: all but its last part.
_FOLDERS = re.compile(r"""(?<![^\s='"(\[,:])(?:~|/[^\s/'"]+)(?:/[^\s/'"]+)*/(?=[^\s/'"])""")


def keep(folder: Path, output: Path) -> list[str]:
    """Write every finished run below ``folder``, each whole or not at all, and how others ended.

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
    if live := next(output.rglob(EVENTS), None):
        raise VirtualWidthError(f"{output} holds runs themselves ({live}): give an --output of kept runs alone.")
    study = read_json(folder / STUDY)
    # Also those that ended before they wrote an event file.
    names = [f"{variant}/seed-{seed}" for variant in study.get("variants", ()) for seed in study.get("seeds", ())]
    records = {name: read_json(folder / name / RECORD) for name in names}
    try:
        runs = find_runs([folder])
        records |= {run.name: run.record for run in runs}
        done = [run for run in runs if _is_done(run.record)]
        for run in done:
            if path := foreign(output / run.name, (KEPT, KEPT_FACTS, RECORD)):
                raise VirtualWidthError(
                    f"{path} is nothing that vwn-study keep wrote: move it or give another --output."
                )
        for run in done:
            _write(run, output / run.name)
            if run.timing:
                write_json((output / run.name).parent / TIMING, _without_folders(run.timing))
        unfinished = {name: record for name, record in records.items() if not _is_done(record)}
        earlier = [name for name in unfinished if (output / name / KEPT).exists()]
        for name, record in unfinished.items():
            if name not in earlier:
                (output / name).mkdir(parents=True, exist_ok=True)
                write_json(output / name / RECORD, _without_folders(record))
        if study:
            write_json(output / STUDY, _without_folders(study))
    except OSError as error:
        raise VirtualWidthError(f"{output} cannot be written ({error.strerror}): give another --output.") from None
    lines = [
        f"{name} is {record['state']}, so "
        + ("what was kept of it before stays." if name in earlier else "its curves are left out.")
        for name, record in unfinished.items()
    ]
    return [*lines, f"{len(done)} runs are in {output}. Compare them: vwn-study report {output}"]


def _is_done(record: Mapping) -> bool:
    """Runs of others have no record, and are taken as they are."""
    return record.get("state", "done") == "done"


def _write(run: LoggedRun, folder: Path) -> None:
    with atomic_folder(folder) as staging:
        with (staging / KEPT).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["tag", "step", "value"])
            for tag in _tags(run):
                # As many digits as tell fp32 numbers apart.
                points = sorted(run.scalars[tag].items())
                writer.writerows([tag, step, f"{np.float32(value):.9g}"] for step, value in points)
        read = {name: text for name, text in run.arguments.items() if name.startswith("vwn_") or name in _ARGUMENTS}
        facts = {"arguments": read, "samples": _corners(run.samples), "seconds_per_step": run.seconds_per_step}
        write_json(staging / KEPT_FACTS, facts | {"notes": run.notes})
        if run.record:
            write_json(staging / RECORD, _without_folders(run.record))


def _tags(run: LoggedRun) -> list[str]:
    """Those that a report reads: the training loss only of a run that was not validated."""
    losses = [metric.tag for metric in METRICS]
    if VALIDATION in run.scalars:
        losses.remove(TRAINING)
    return [tag for tag in run.scalars if tag in losses or tag.startswith(TAGS)]


def _without_folders(content):
    """A JSON value whose texts name no folders of this machine: .../prose_train for /home/me/data/prose_train."""
    if isinstance(content, dict):
        return {key: _without_folders(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_folders(value) for value in content]
    return _FOLDERS.sub(".../", content) if isinstance(content, str) else content


def _corners(samples: Curve) -> Sequence[tuple[int, float]]:
    """Samples by step without those that lie on the line between their neighbours."""
    points = sorted(samples.items())
    slopes = [_slope(*pair) for pair in pairwise(points)]
    inner = [point for point, pair in zip(points[1:], pairwise(slopes), strict=False) if pair[0] != pair[1]]
    return [*points[:1], *inner, *points[1:][-1:]]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
