"""Whether an advantage grows: the baseline's tokens over a variant's at the same loss, all along the training.

At each point t of the baseline's curve the variant has reached the baseline's loss there after x(t) tokens; t / x(t)
is how many times fewer it needed. While the learning rate is constant both are in the same state. A decay that the
baseline has had and the variant, which is read earlier, has not makes the ratio too small: the phases are told apart.
"""

from collections.abc import Mapping

import numpy as np

from megatron_vwn.study.report.curves import Curve, Estimate, estimate
from megatron_vwn.study.report.events import LoggedRun

Seed = int | None
# Of the baseline's training; what is read there is in the report's first table.
SHARES = (0.25, 0.5, 0.75, 1.0)
# Megatron's arguments that say when the learning rate begins to decay.
SCHEDULE = ("lr_decay_style", "train_iters", "lr_decay_iters", "lr_wsd_decay_iters")


def ratios(baseline: Mapping[Seed, Curve], variant: Mapping[Seed, Curve]) -> dict[Seed, Curve]:
    """t / x(t) at the points of the baseline's curve that the variant reaches, of seeds that both have.

    Args:
        baseline: its curves by seed.
        variant: the other's.
    """
    found = {}
    for seed in baseline.keys() & variant.keys():
        plain, wide = baseline[seed], variant[seed]
        # A point where the loss is not lower than before says nothing about when it was reached first.
        points = [(t, wide.reach(loss)) for t, loss in _falling(plain)]
        # The variant's first point was not reached "after" anything.
        points = [(t, t / x) for t, x in points if x is not None and x > wide.x[0]]
        if points:
            found[seed] = Curve(*(np.array(each, dtype=float) for each in zip(*points, strict=True)))
    return found


def at_shares(curves: Mapping[Seed, Curve], budget: float) -> dict[float, Estimate | None]:
    """The ratios at some shares of the baseline's budget, linear between points."""
    return {
        share: estimate([y for curve in curves.values() if (y := curve.at(share * budget)) is not None])
        for share in SHARES
    }


def change(curves: Mapping[Seed, Curve], begin: float, end: float) -> Estimate | None:
    """How much the ratios change between two points of the baseline's training; None if no seed reaches both.

    Args:
        curves: as ``ratios`` gives them.
        begin: the first point.
        end: the last; each curve is read at its last point until there.
    """
    found = []
    for curve in curves.values():
        early, inside = curve.at(begin), curve.x <= end
        if early is not None and inside.any() and curve.x[inside][-1] > begin:
            found.append(float(curve.y[inside][-1]) - early)
    return estimate(found)


def constant_until(run: LoggedRun) -> float | None:
    """The tokens after which a learning rate that had been constant decays (--lr-decay-style WSD); None of others."""
    style, steps, end, decaying = (run.arguments.get(name, "") for name in SCHEDULE)
    # Without --lr-decay-iters the schedule ends with the training.
    end = end if end.isdecimal() else steps
    if style != "WSD" or not (end.isdecimal() and decaying.isdecimal()) or int(decaying) >= int(end):
        return None
    tokens = run.tokens(np.array([float(int(end) - int(decaying))]))
    return None if tokens is None else float(tokens[0])


def _falling(curve: Curve) -> list[tuple[float, float]]:
    lowest, points = np.inf, []
    for x, y in zip(curve.x, curve.y, strict=True):
        if y < lowest:
            points.append((float(x), float(y)))
            lowest = y
    return points
