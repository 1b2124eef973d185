"""Lines of progress of a study, with an estimate of what remains."""

import time
from collections import defaultdict
from collections.abc import Mapping

from megatron_vwn.study.plan import Run
from megatron_vwn.training.log_lines import LoggedStep

# From a launch to the first step, mostly imports; only for the estimate.
_START_SECONDS = 20
_SECONDS_BETWEEN_LINES = 15


class Progress:
    """Counts steps of all runs and says how it goes.

    Args:
        runs: by name, with the steps that they have behind them.
        slots: runs at once.
    """

    def __init__(self, runs: Mapping[str, tuple[Run, int]], slots: int):
        self._begin = time.monotonic()
        self._slots = slots
        self._runs = {name: run for name, (run, _) in runs.items()}
        self._left = {name: run.variant.steps - step for name, (run, step) in runs.items()}
        self._started: dict[str, tuple[float, int]] = {}
        self._said: defaultdict[str, float] = defaultdict(float)
        # Of a variant: wall seconds of its steps so far, validations included, and their number.
        self._paces: dict[str, float] = {}

    def say(self, name: str, text: str) -> None:
        """One line."""
        print(f"[{minutes(time.monotonic() - self._begin)}] {name:22} {text}", flush=True)

    def step(self, run: Run, logged: LoggedStep) -> None:
        """A run has reached a step."""
        now, step = time.monotonic(), logged.step
        self._left[run.name] = run.variant.steps - step
        begin, first = self._started.setdefault(run.name, (now, step))
        pace = (now - begin) / (step - first) if step > first else logged.seconds
        self._paces[run.variant.name] = pace
        if now - self._said[run.name] < _SECONDS_BETWEEN_LINES:
            return
        self._said[run.name] = now
        this, everything = minutes(self._left[run.name] * pace), minutes(self._remaining())
        self.say(
            run.name,
            f"step {step}/{run.variant.steps}  loss {logged.loss:.4f}  {logged.seconds * 1e3:.0f} ms/step  "
            f"left: this run {this}, all {everything}",
        )

    def finish(self, run: Run) -> None:
        """A run has ended, well or not."""
        self._left[run.name] = 0

    def _remaining(self) -> float:
        usual = sum(self._paces.values()) / len(self._paces)
        works = [
            steps * self._paces.get(self._runs[name].variant.name, usual)
            + (0 if name in self._started else _START_SECONDS)
            for name, steps in self._left.items()
            if steps
        ]
        return max([sum(works) / self._slots, *works], default=0.0)


def minutes(seconds: float) -> str:
    """A duration as m:ss, or h:mm:ss."""
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
