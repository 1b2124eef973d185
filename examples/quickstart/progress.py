"""Run a training as a child process: its whole output in a file, one compact line per log interval on the screen."""

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_STEP = re.compile(r"iteration +(\d+)/ *(\d+) .*per iteration \(ms\): ([\d.]+).* lm loss: ([\d.E+-]+)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+) .*lm loss value: ([\d.E+-]+)")
_OURS = re.compile(r"^megatron_vwn(?:\.cpu)?: (.*)")
_TAIL = 25
# One thread per rank: they share the machine. Megatron wants the second for tensor parallelism on a GPU.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONUNBUFFERED": "1"}


class RunFailedError(Exception):
    """A step of the quickstart that failed; the text is for the user."""


class Clock:
    """Time since the start and an estimate of what remains, from the pace of the steps so far."""

    def __init__(self):
        self._start = time.monotonic()
        self._expected = 0
        self._done = 0

    @property
    def elapsed(self) -> str:
        """Time since the start."""
        return minutes(time.monotonic() - self._start)

    def expect(self, steps: int, runs: int) -> None:
        """State how many steps all runs will make together."""
        self._expected = steps * runs

    def reach(self, done: int) -> None:
        """State how many of them are behind us."""
        self._done = done

    def remaining(self, seconds_per_step: float) -> str:
        """Time for all remaining steps at this pace."""
        return minutes((self._expected - self._done) * seconds_per_step)

    def say(self, name: str, text: str) -> None:
        """Print one line of progress."""
        print(f"[{self.elapsed}] {name:13} {text}", flush=True)


def minutes(seconds: float) -> str:
    """A duration as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_logged(command: Sequence[str], log: Path) -> Iterator[str]:
    """Run a command and yield its lines, stdout and stderr together, as they come; they are appended to ``log``.

    Raises:
        RunFailedError: when it fails, with the end of the log.
    """
    with log.open("a") as file:
        child = subprocess.Popen(
            command, env=os.environ | _ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            for line in child.stdout:
                file.write(line)
                yield line.rstrip()
            code = child.wait()
        finally:  # also when this process is interrupted
            child.terminate()
            child.wait()
    if code != 0:
        tail = "".join(log.read_text().splitlines(keepends=True)[-_TAIL:])
        raise RunFailedError(f"exit code {code}; the end of {log} is\n{tail}")


def train(folder: Path, command: Sequence[str], until: int, clock: Clock) -> None:
    """Train in ``folder`` from its last checkpoint, if any, to step ``until``; does nothing if that is behind it."""
    first = last_checkpoint(folder)
    if first >= until:
        clock.say(folder.name, f"step {until} was reached earlier")
        return
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    clock.say(folder.name, f"{'resuming from' if first else 'starting at'} step {first}; the full log is {log}")
    began, counted_from = None, first
    for line in run_logged(command, log):
        if said := _OURS.match(line):
            clock.say(folder.name, said[1])
        elif step := _STEP.search(line):
            number, total, loss = int(step[1]), int(step[2]), float(step[4])
            if began is None:  # start-up and the first, slower, steps say nothing about the pace
                began, counted_from = time.monotonic(), number
                clock.say(folder.name, f"step {number:4}/{total}  loss {loss:.4f}")
                continue
            pace = (time.monotonic() - began) / (number - counted_from)
            clock.say(
                folder.name,
                f"step {number:4}/{total}  loss {loss:.4f}  {float(step[3]):5.0f} ms/step  "
                f"{minutes((total - number) * pace)} left of this run",
            )
        elif validation := _VALIDATION.search(line):
            clock.say(folder.name, f"step {int(validation[1]):4}        validation loss {float(validation[2]):.4f}")
    if last_checkpoint(folder) < until:
        raise RunFailedError(f"{folder.name} ended before step {until}; see {log}.")


def last_checkpoint(folder: Path) -> int:
    """Step of the last complete checkpoint, 0 without one."""
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0
