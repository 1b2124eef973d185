"""Seconds per step of every variant, measured with nothing else beside.

Runs of a study share a machine and disturb each other's clock. Short runs of all variants are therefore interleaved, so
that what changes on the machine over time meets all alike. What else a machine does only makes steps slower: the
fastest round counts.
"""

import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_vwn.atomic import write_json
from megatron_vwn.study.child import Child, tail
from megatron_vwn.study.folder import TIMING, own_defaults, read_json
from megatron_vwn.study.plan import Run, Study, Variant
from megatron_vwn.study.report.events import read_scalars
from megatron_vwn.study.run import Gpus, machine

ROUNDS, STEPS, SKIPPED = 2, 30, 8
_SECONDS_BETWEEN_LOOKS = 0.5
_NEVER = 1_000_000_000


def time_variants(study: Study, output: Path, variants: Sequence[Variant], place: Gpus, lock: int) -> list[str]:
    """Measure the variants that have no measurement with the same flags yet; each writes its ``timing.json``.

    Args:
        study: whose they are.
        output: its folder.
        variants: those to measure.
        place: where, as ``_study_run.slots`` gives it.
        lock: the descriptor that children inherit.

    Returns:
        Names of the variants that failed.
    """
    missing = [each for each in variants if read_json(output / each.name / TIMING).get("flags") != each.arguments()]
    medians: dict[str, list[float]] = {each.name: [] for each in missing}
    load, failed = os.getloadavg()[0], []
    for number in range(ROUNDS):
        for variant in missing:
            if variant.name in failed:
                continue
            try:
                medians[variant.name].append(_median(study, output / variant.name, variant, place, lock))
            except RuntimeError as error:
                failed.append(variant.name)
                print(f"timing {variant.name} failed; the end of its log is\n{error}", flush=True)
                continue
            milliseconds = medians[variant.name][-1] * 1e3
            print(f"timing, round {number + 1} of {ROUNDS}: {variant.name:22} {milliseconds:.0f} ms/step", flush=True)
    for variant in missing:
        if variant.name not in failed:
            content = {
                "seconds_per_step": min(medians[variant.name]),
                "rounds": medians[variant.name],
                "steps": STEPS - SKIPPED,
                "flags": variant.arguments(),
                "hardware": machine(study.ranks),
                "load_before": load,
                "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            write_json(output / variant.name / TIMING, content)
    return failed


def _median(study: Study, folder: Path, variant: Variant, place: Gpus, lock: int) -> float:
    """Of one short run's steps, without the first ones."""
    work = folder / ".timing"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    steps = min(STEPS, variant.steps)
    run = Run(variant, study.seeds[0])
    words = [*run.arguments(), *own_defaults(run, work), "--tensorboard-dir", str(work)]
    # The schedule stays the run's own; it only ends early, saves nothing and writes every step's time.
    words += ["--exit-interval", str(steps), "--eval-interval", str(_NEVER), "--log-interval", "1"]
    child = Child(words, study.ranks, work / "log.txt", place, keep_open=(lock,))
    try:
        while child.poll() is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        child.end()
    seconds = read_scalars(work).get("iteration-time", {}) if child.poll() == 0 else {}
    counted = [value for step, value in seconds.items() if step > min(SKIPPED, steps // 2)]
    if not counted:
        raise RuntimeError(tail(work / "log.txt"))
    shutil.rmtree(work)
    return statistics.median(counted)
