"""The report of a study as a folder: Markdown, one HTML file, CSV and plots, which appears when it is complete."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_vwn.atomic import atomic_folder
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.study.folder import RECORD, STUDY, foreign, read_json
from megatron_vwn.study.report.compare import AXES, Comparison, compare
from megatron_vwn.study.report.events import LoggedRun, find_runs
from megatron_vwn.study.report.plots import NAMES, draw, draw_routing
from megatron_vwn.study.report.render import as_html, as_markdown
from megatron_vwn.study.report.routing import routings

# What may be in the folder of an older report, which is replaced.
_WRITTEN = {"report.md", "report.html", "results.csv", "curves.csv"} | {
    f"{name}.{end}" for name in NAMES for end in ("png", "svg")
}


def write_report(folders: Sequence[Path], output: Path, baseline: str | None, command: str) -> list[str]:
    """Read runs and write a report about them, whole or not at all; an older report there is replaced.

    Args:
        folders: of a study, or any with event files below.
        output: folder of the report, of an older one, or empty.
        baseline: its name; None for a study's own, or the only variant without a virtual width.
        command: what is stated in the report.

    Returns:
        Lines for the screen.

    Raises:
        VirtualWidthError: no runs, no baseline, nothing that can be compared, or no place for the report.
    """
    if output.exists() and not output.is_dir():
        raise VirtualWidthError(f"{output} is there and is no report: give another --output.")
    if path := foreign(output, _WRITTEN):
        raise VirtualWidthError(f"{output} holds {path.name}, which no report wrote: give another --output.")
    runs = find_runs(list(folders))
    study = read_json(folders[0] / STUDY) if len(folders) == 1 else {}
    comparison = compare(runs, baseline or study.get("baseline"), list(study.get("variants", ())))
    comparison.notes += _unfinished(folders[0], study) if study else []
    routed = routings(comparison)
    try:
        with atomic_folder(output) as staging:
            plots = draw(comparison, staging) | draw_routing(comparison, routed, staging)
            text = as_markdown(comparison, runs, routed, plots, study, command)
            (staging / "report.md").write_text(text)
            (staging / "report.html").write_text(as_html(text, study.get("title") or "Comparison of runs", staging))
            _write_csv(staging / "results.csv", _results(comparison))
            _write_csv(staging / "curves.csv", _curves(comparison))
    except OSError as error:
        raise VirtualWidthError(f"{output} cannot be written ({error.strerror}): give another --output.") from None
    return [*(f"Note: {note}" for note in comparison.notes), f"The report is {output / 'report.html'}."]


def _unfinished(folder: Path, study: dict) -> list[str]:
    """Of a study's runs, what is missing."""
    notes = []
    for variant in study.get("variants", ()):
        for seed in study.get("seeds", ()):
            name = f"{variant}/seed-{seed}"
            record = read_json(folder / name / RECORD)
            state = record.get("state", "not started")
            if state in ("refused", "failed"):
                said = (record.get("said", "").strip().splitlines() or ["no output"])[-1]
                notes.append(f"{name} {'was refused' if state == 'refused' else 'failed'}: {said}")
            elif state != "done":
                notes.append(f"{name} is {'not finished' if state == 'running' else state}.")
    return notes


def _results(comparison: Comparison) -> Iterable[dict[str, object]]:
    """One row per run."""
    for variant in comparison.variants.values():
        for seed, run in variant.runs.items():
            row: dict[str, object] = {
                "run": run.name,
                "variant": variant.name,
                "seed": seed,
                "r": variant.r,
                "m": run.width and run.width[0],
                "n": run.width and run.width[1],
                "tokens_per_step": run.tokens_per_step,
                "seconds_per_step": _per_step(variant.seconds_per_token, run, comparison),
                "clock": variant.clock,
                **_counted(run),
            }
            for result in comparison.results:
                key, curve = result.metric.key, result.curves.get(variant.name, {}).get(seed)
                here = result.compared.get(variant.name)
                row |= {f"{key}_{comparison.unit}": curve and curve.end, f"{key}_final_loss": curve and curve.final}
                for axis in AXES:
                    losses = here.losses.get(axis, {}) if here else {}
                    row[f"{key}_loss_at_equal_{axis}"] = losses.get(seed)
                row[f"{key}_{comparison.unit}_to_baseline_loss"] = here.reached.get(seed) if here else None
            yield row


def _per_step(per_token: float | None, run: LoggedRun, comparison: Comparison) -> float | None:
    if per_token is None or comparison.unit == "steps":
        return per_token
    return per_token * run.tokens_per_step


def _counted(run: LoggedRun) -> dict[str, object]:
    counted = run.record.get("counted") or {}
    return {key: counted.get(key) for key in ("flops_per_token", "parameters", "trunk_parameters")}


def _curves(comparison: Comparison) -> Iterable[dict[str, object]]:
    """One row per point of the compared curves."""
    for result in comparison.results:
        for name, seeds in result.curves.items():
            for seed, curve in seeds.items():
                for x, y in zip(curve.x, curve.y, strict=True):
                    yield {
                        "metric": result.metric.key,
                        "run": comparison.variants[name].runs[seed].name,
                        "variant": name,
                        "seed": seed,
                        comparison.unit: f"{x:.0f}",
                        "loss": f"{y:.6f}",
                    }


def _write_csv(path: Path, rows: Iterable[dict[str, object]]) -> None:
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
