"""A training as it looks from outside: the environment of its processes, the lines of its log."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

# One thread per rank: they share the machine.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
_ORDERED = ("--tensor-model-parallel-size", "--context-parallel-size")

_STEP = re.compile(r"iteration +(\d+)/ *(\d+) .*per iteration \(ms\): ([\d.]+).* lm loss: ([\d.E+-]+)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+) .*lm loss value: ([\d.E+-]+)")


def launch_order(flags: Sequence[str]) -> dict[str, str]:
    """What the environment of a training with these flags says of the order of a GPU's launches.

    Before Blackwell Megatron stops without it under tensor or context parallelism, whose overlap depends on that order.
    Elsewhere it would only keep the messages of experts and gradients from overlapping.
    """
    ordered = any(flag in _ORDERED and value != "1" for flag, value in pairwise(flags))
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if ordered else {}


class LoggedStep(NamedTuple):
    """A line of Megatron's progress: the step, how many there will be, seconds per step since the last line, loss."""

    step: int
    steps: int
    seconds: float
    loss: float


def read_step(line: str) -> LoggedStep | None:
    """A line of a log as progress; None if it is another."""
    found = _STEP.search(line)
    return LoggedStep(int(found[1]), int(found[2]), float(found[3]) / 1e3, float(found[4])) if found else None


def read_validation(line: str) -> tuple[int, float] | None:
    """Step and loss of a validation; None if the line says none."""
    found = _VALIDATION.search(line)
    return (int(found[1]), float(found[2])) if found else None
