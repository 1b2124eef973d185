"""Timing of several variants in turn, A B A B, with cold caches and medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# The GPU waits this much longer than the CPU needs to queue a call, so that launches leave no gaps in what is timed.
_LAUNCH_MARGIN, _LAUNCH_MARGIN_SECONDS = 1.5, 50e-6
_CYCLES_PER_SECOND = 2e9


@dataclass(frozen=True)
class Timed:
    """One variant.

    Attributes:
        call: what is timed, given what ``prepare`` returned.
        prepare: not timed; gets the number of a set of buffers.
    """

    call: Callable[[Any], object]
    prepare: Callable[[int], Any] = lambda number: number


@dataclass(frozen=True)
class Spread:
    """Seconds of several samples: median, first and last decile."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        """Of at least one sample."""
        ordered = sorted(seconds)
        tenth = (len(ordered) - 1) // 10
        return cls(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))


class CpuClock:
    """Wall time.

    Args:
        cache_bytes: size of the last cache; twice as much is written before a sample, None leaves caches alone.
    """

    def __init__(self, cache_bytes: int | None):
        self._scratch = None if cache_bytes is None else torch.zeros(2 * cache_bytes, dtype=torch.uint8)

    def seconds(self, timed: Timed, number: int) -> float:
        """One sample on the set of buffers ``number``."""
        prepared = timed.prepare(number)
        if self._scratch is not None:
            self._scratch.add_(1)
        start = time.perf_counter()
        timed.call(prepared)
        return time.perf_counter() - start


class CudaClock:
    """Time on the GPU between two events.

    Args:
        cache_bytes: as for ``CpuClock``.
        hide_launches: keep the GPU waiting until the CPU has queued the whole call: what single kernels take. Without
            it the gaps between launches count, as they do in training.
    """

    def __init__(self, cache_bytes: int | None, *, hide_launches: bool):
        self._scratch = None
        if cache_bytes is not None:
            self._scratch = torch.zeros(2 * cache_bytes, dtype=torch.uint8, device="cuda")
        self._hide_launches = hide_launches
        self._queueing: dict[int, float] = {}

    def seconds(self, timed: Timed, number: int) -> float:
        """One sample on the set of buffers ``number``."""
        prepared = timed.prepare(number)
        if self._scratch is not None:
            self._scratch.add_(1)
        torch.cuda.synchronize()
        if self._hide_launches:
            wait = _LAUNCH_MARGIN * self._queueing.get(id(timed), 0.0) + _LAUNCH_MARGIN_SECONDS
            torch.cuda._sleep(int(wait * _CYCLES_PER_SECOND))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin = time.perf_counter()
        start.record()
        timed.call(prepared)
        end.record()
        self._queueing[id(timed)] = time.perf_counter() - begin
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def interleave(
    variants: Mapping[str, Timed], clock: CpuClock | CudaClock, *, sets: int, warmup: int, rounds: int
) -> dict[str, Spread]:
    """Time all variants in turn, in their order, once per round.

    Args:
        variants: by name.
        clock: of the device.
        sets: number of sets of buffers; rounds use them in turn.
        warmup: rounds that do not count.
        rounds: rounds that do.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, timed in variants.items():
            sample = clock.seconds(timed, number % sets)
            if number >= warmup:
                seconds[name].append(sample)
    return {name: Spread.of(samples) for name, samples in seconds.items()}
