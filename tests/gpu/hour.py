"""The first GPU hour: runs steps.py's steps one after another and keeps what each of them says.

python tests/gpu/hour.py [--minutes 9] [--output FOLDER] [--only STEP ...] [--rehearse]

FOLDER/results.json is written anew after every step, whole, so that a machine that is taken away loses one step.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from gpu.steps import Step, steps

from megatron_vwn.atomic import write_json
from megatron_vwn.benchmark.report import table
from megatron_vwn.benchmark.results import GPU_HOUR
from megatron_vwn.cli import exit_code
from megatron_vwn.config import VirtualWidthError

ROOT = Path(__file__).parents[2]
PASSED, FAILED, OUT_OF_TIME, SKIPPED, NOT_REACHED = "passed", "failed", "out of time", "skipped", "not reached"
# A step that would have less is not begun.
_LEAST_SECONDS = 5
_KEPT_OF_A_LOG = 3000
# Of results.json, which must travel: about 20 steps in 8 MB.
_LARGEST_RESULT = 400_000


def main() -> int:
    """Run all steps; 0, or 1 if one failed or ran out of time."""
    return exit_code("tests/gpu/run.sh", _run)


def _run() -> int:
    options = _options()
    wanted = _chosen(steps(options.output, rehearse=options.rehearse), options.only)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VirtualWidthError(
            f"--output {options.output} cannot be made ({error.strerror}): choose another."
        ) from None
    end = time.monotonic() + 60 * options.minutes - options.spent
    content = {
        "program": GPU_HOUR,
        "schema": 1,
        "rehearsed": options.rehearse,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "steps": [],
    }
    for number, step in enumerate(wanted):
        folder = options.output / f"{number:02}"
        row = run_step(step, folder, end - time.monotonic(), content["steps"])
        content["steps"].append(row)
        write_json(options.output / "results.json", content)
        print(f"{row['name']:<28} {row['state']:<12} {row['seconds']:6.1f} s  {row.get('said', '')}", flush=True)
    print()
    print(table(("step", "state", "s", "what it says"), [_cells(row) for row in content["steps"]]))
    print(f"{options.output / 'results.json'} has all of it: python -m megatron_vwn.benchmark results FILE")
    return int(any(row["state"] in (FAILED, OUT_OF_TIME) for row in content["steps"]))


def run_step(step: Step, folder: Path, left: float, done: list[dict]) -> dict:
    """One step's row for results.json.

    Args:
        step: what to do.
        folder: for its logs and files.
        left: seconds until the end of all.
        done: rows of the steps before.
    """
    row = {"name": step.name, "seconds": 0.0}
    if step.lacks:
        return row | {"state": SKIPPED, "said": step.lacks}
    if left < _LEAST_SECONDS:
        return row | {"state": NOT_REACHED, "said": "no time was left"}
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"log-{number}.txt" for number in range(len(step.commands))]
    began = time.monotonic()
    codes = _together(step, logs, began + min(step.seconds, left))
    row |= {"seconds": round(time.monotonic() - began, 1), "commands": step.commands}
    row["state"] = OUT_OF_TIME if None in codes else FAILED if any(codes) else PASSED
    outputs = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    try:
        result, row["said"] = step.collect(outputs, {each["name"]: each.get("result") for each in done})
        size = len(json.dumps(result))
        row["result"] = result if size <= _LARGEST_RESULT else f"{size} bytes, left in {folder}"
    except Exception as fault:  # a step's output may be anything; the next one must begin all the same
        row["state"] = FAILED if row["state"] == PASSED else row["state"]
        row["said"] = f"{type(fault).__name__}: {str(fault).strip()[:200]}"
    if row["state"] != PASSED:
        row["logs"] = [output[-_KEPT_OF_A_LOG:] for output in outputs]
    return row


def _together(step: Step, logs: list[Path], deadline: float) -> list[int | None]:
    """Exit codes of a step's commands, as many at a time as it allows; None of one that was killed or never began."""
    codes: list[int | None] = [None] * len(step.commands)
    running: dict[int, subprocess.Popen] = {}
    waiting = list(enumerate(step.commands))
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < step.at_once:
                number, command = waiting.pop(0)
                with logs[number].open("w") as log:
                    running[number] = subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=os.environ | step.environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
            time.sleep(0.05)
            for number in [number for number, child in running.items() if child.poll() is not None]:
                codes[number] = running.pop(number).returncode
    finally:
        for child in running.values():
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return codes


def _chosen(all_steps: list[Step], only: list[str] | None) -> list[Step]:
    names = [step.name for step in all_steps]
    if unknown := [name for name in only or () if name not in names]:
        raise VirtualWidthError(f"--only {unknown[0]!r} is none of {', '.join(map(repr, names))}: choose of them.")
    return [step for step in all_steps if not only or step.name in only]


def _cells(row: dict) -> list[str]:
    return [row["name"], row["state"], f"{row['seconds']:.0f}", row.get("said", "")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="for all steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/gpu-hour"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--rehearse", action="store_true", help="every step on a CPU, with tiny shapes")
    parser.add_argument("--spent", type=float, default=0, help="seconds that the installation took")
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}: give more than 0")
    options.output = options.output.absolute()
    return options


if __name__ == "__main__":
    sys.exit(main())
