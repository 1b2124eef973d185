"""The fit of losses against log2 r, loss = a + b log2 r, by least squares, with a confidence band from seeds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress

from megatron_vwn.study.report.curves import Estimate, estimate, half_interval

# Of two widths every line is a perfect fit.
LEAST_WIDTHS = 3


@dataclass(frozen=True)
class Fit:
    """A line through the mean losses.

    Attributes:
        label: which variants.
        r: widths, increasing.
        losses: mean losses there, paired by seed: every seed's difference from its own loss at r = 1, where there is
            one, on the mean of these.
        names: variants.
        intercept, slope: of the line; the slope is a loss per doubling of the width.
        r_squared: the line's share of the variance of ``losses``.
        seed_slopes: of the lines through single seeds, with the slope's interval.
        seed_lines: intercept and slope of each seed.
        errors: half intervals of the paired losses; None for one seed.
        seeds: those that have all widths.
    """

    label: str
    r: np.ndarray
    losses: np.ndarray
    names: tuple[str, ...]
    intercept: float
    slope: float
    r_squared: float
    seed_slopes: Estimate
    seed_lines: np.ndarray
    errors: np.ndarray | None
    seeds: tuple[int | None, ...]

    def band(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The 95 % confidence band of the line at some widths, from the lines of single seeds; None for one seed."""
        values = self.seed_lines[:, :1] + self.seed_lines[:, 1:] * np.log2(r)
        half = half_interval(values)
        return None if half is None else (values.mean(axis=0) - half, values.mean(axis=0) + half)


def fit_widths(label: str, losses: Mapping[str, Mapping[int | None, float]], widths: Mapping[str, float]) -> Fit | None:
    """Fit the losses of variants that differ in their width only.

    Pairing takes out what a seed does to all widths alike. With one seed there is a line and no band.

    Args:
        label: of the fit.
        losses: by variant, by seed.
        widths: r by variant.

    Returns:
        The fit; None with fewer than three widths or no seed that has them all.
    """
    names = sorted(losses, key=widths.__getitem__)
    r = np.array([widths[name] for name in names], dtype=float)
    common = set.intersection(*(set(losses[name]) for name in names)) if names else set()
    if len(set(r)) < LEAST_WIDTHS or not common:
        return None
    seeds = tuple(sorted(common, key=lambda seed: (seed is None, seed)))
    table = np.array([[losses[name][seed] for name in names] for seed in seeds])
    if r[0] == 1:
        table = table - table[:, :1] + table[:, 0].mean()
    lines = [linregress(np.log2(r), row) for row in table]
    means = table.mean(axis=0)
    line = linregress(np.log2(r), means)
    return Fit(
        label=label,
        r=r,
        losses=means,
        names=tuple(names),
        intercept=float(line.intercept),
        slope=float(line.slope),
        r_squared=float(line.rvalue**2),
        seed_slopes=estimate([each.slope for each in lines]),
        seed_lines=np.array([(each.intercept, each.slope) for each in lines]),
        errors=half_interval(table),
        seeds=seeds,
    )
