"""Arithmetic on loss curves: read them off, smooth them, find where they reach a loss, average seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """A loss over what was spent.

    Attributes:
        x: increasing; tokens (or steps, where tokens are unknown).
        y: losses, as many.
    """

    x: np.ndarray
    y: np.ndarray

    @property
    def end(self) -> float:
        """The last x."""
        return float(self.x[-1])

    @property
    def final(self) -> float:
        """The last loss."""
        return float(self.y[-1])

    def at(self, x: float) -> float | None:
        """The loss at x, linear between points; None outside of them (but for rounding)."""
        slack = 1e-9 * max(abs(x), 1.0)
        if not self.x[0] - slack <= x <= self.x[-1] + slack:
            return None
        return float(np.interp(x, self.x, self.y))

    def reach(self, loss: float) -> float | None:
        """Where it first falls to ``loss``, linear between points; None if it does not."""
        below = np.flatnonzero(self.y <= loss)
        if not len(below):
            return None
        first = int(below[0])
        if first == 0:
            return float(self.x[0])
        x0, x1, y0, y1 = *self.x[first - 1 : first + 1], *self.y[first - 1 : first + 1]
        return float(x0 + (x1 - x0) * (y0 - loss) / (y0 - y1))

    def smooth(self, window: float) -> "Curve":
        """The mean over the last ``window`` of x, where there is so much behind a point; at least the last point."""
        begins = np.searchsorted(self.x, self.x - window, side="right")
        sums = np.concatenate([[0.0], np.cumsum(self.y)])
        ends = np.arange(1, len(self.x) + 1)
        means = (sums[ends] - sums[begins]) / (ends - begins)
        spacing = float(self.x[0]) if len(self.x) < 2 else float(np.median(np.diff(self.x)))
        whole = self.x - window >= self.x[0] - 1.001 * spacing
        if not whole.any():
            whole[-1] = True
        return Curve(self.x[whole], means[whole])


@dataclass(frozen=True)
class Spread:
    """Several curves as one.

    Attributes:
        x: points.
        mean: of the curves there.
        half: half of the mean's 95 % interval there (Student's t); None for one curve.
    """

    x: np.ndarray
    mean: np.ndarray
    half: np.ndarray | None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        half: half of the 95 % confidence interval (Student's t); None for one value.
        count: how many values.
    """

    mean: float
    half: float | None
    count: int

    @property
    def clear(self) -> bool:
        """Whether the interval is known and does not hold zero."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of values with its interval; None of nothing."""
    if not len(values):
        return None
    array = np.asarray(values, dtype=float)
    return Estimate(float(array.mean()), half_interval(array), len(array))


def half_interval(values: np.ndarray, axis: int = 0) -> float | np.ndarray | None:
    """Half of the confidence interval of a mean, t times the standard error; None for fewer than two values."""
    count = values.shape[axis]
    if count < 2:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(values, axis=axis)
    return float(half) if np.ndim(half) == 0 else half


def spread(curves: Sequence[Curve]) -> Spread:
    """Mean and interval at all points of the curves, as far as all of them reach."""
    first, last = max(curve.x[0] for curve in curves), min(curve.end for curve in curves)
    points = np.unique(np.concatenate([curve.x for curve in curves]))
    points = points[(points >= first) & (points <= last)]
    values = np.array([np.interp(points, curve.x, curve.y) for curve in curves])
    return Spread(points, values.mean(axis=0), half_interval(values))


def difference(curve: Curve, other: Curve) -> Curve | None:
    """``curve`` minus ``other`` at the points of the former, as far as both reach; None where they share nothing."""
    inside = (curve.x >= other.x[0]) & (curve.x <= other.end)
    if not inside.any():
        return None
    points = curve.x[inside]
    return Curve(points, curve.y[inside] - np.interp(points, other.x, other.y))
