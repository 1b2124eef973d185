"""Run a training as a child process: its whole output in a file, one compact line per log interval on the screen."""

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vwn.tracker import last_step
from megatron_vwn.training.log_lines import ENVIRONMENT, read_step, read_validation

_FURTHER_LOSS = re.compile(r"(mtp_\d+ loss): ([\d.E+-]+)")
_OURS = re.compile(r"^megatron_vwn(?:\.cpu)?: (.*)")
_TAIL = 25
# From a launch to the first step, mostly imports; only for the estimate of what remains.
_START_SECONDS = 20


class RunFailedError(Exception):
    """A step of the quickstart that failed; the text is for the user."""


class Clock:
    """Time since the start, and an estimate of what remains of all runs.

    Args:
        work: what the steps of all runs will still cost together, in a unit of the caller's choice.
        starts: how often a run will be started.
        end: seconds from the last step to the end.
    """

    def __init__(self, work: float, starts: int = 0, end: float = 0.0):
        self._start = time.monotonic()
        self._work, self._starts, self._end = work, starts, end

    @property
    def elapsed(self) -> str:
        """Time since the start."""
        return minutes(time.monotonic() - self._start)

    def finish_start(self) -> None:
        """State that a run makes steps now."""
        self._starts -= 1

    def finish(self, work: float) -> None:
        """State that so much of the work is behind us."""
        self._work -= work

    def remaining(self, seconds: float, work: float) -> str:
        """Time for all that remains if this much work takes so many seconds."""
        return minutes(self._work * seconds / work + self._starts * _START_SECONDS + self._end)

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
            command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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


def train(folder: Path, command: Sequence[str], until: int, clock: Clock, step_cost: float = 1.0) -> None:
    """Train in ``folder`` from its last checkpoint, if any, to step ``until``; does nothing if that is behind it.

    Args:
        folder: log, checkpoints and event files of the run; its name is shown.
        command: the launch.
        until: the step at which the command ends.
        clock: is told about the work done.
        step_cost: work of one step, in the clock's unit.

    Raises:
        RunFailedError: the command failed or ended earlier.
    """
    done = first = last_checkpoint(folder)
    if first >= until:
        clock.say(folder.name, f"step {until} was reached earlier")
        return
    folder.mkdir(exist_ok=True)
    log, first_step_began = folder / "log.txt", None
    clock.say(folder.name, f"{'resuming from' if first else 'starting at'} step {first}; the full log is {log}")
    for line in run_logged(command, log):
        if said := _OURS.match(line):
            clock.say(folder.name, said[1])
        elif logged := read_step(line):
            clock.finish((logged.step - done) * step_cost)
            done, now = logged.step, time.monotonic()
            if first_step_began is None:
                clock.finish_start()
                first_step_began = now - (done - first) * logged.seconds
            # Megatron's time per step leaves out validations and checkpoints, which what remains will have too.
            pace = (now - first_step_began) / (done - first)
            further = "".join(f"  {name} {float(loss):.4f}" for name, loss in _FURTHER_LOSS.findall(line))
            clock.say(
                folder.name,
                f"step {done:4}/{logged.steps}  loss {logged.loss:.4f}{further}  {logged.seconds * 1e3:5.0f} ms/step  "
                f"left: this run {minutes((until - done) * pace)}, all {clock.remaining(pace, step_cost)}",
            )
        elif validation := read_validation(line):
            clock.say(folder.name, f"step {validation[0]:4}  validation loss {validation[1]:.4f}")
    if last_checkpoint(folder) < until:
        raise RunFailedError(f"{folder.name} ended before step {until}; see {log}.")


def last_checkpoint(folder: Path) -> int:
    """Step of the last complete checkpoint of a run, 0 without one."""
    return last_step(folder / "checkpoints")
