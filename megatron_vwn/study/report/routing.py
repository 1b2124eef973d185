"""What the routing of runs with ``--vwn-log-interval`` has learned: how much of the width carries something of its own,
and how far back sublayers read. ``training.monitoring`` defines the numbers and writes them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_vwn.study.report.compare import Comparison
from megatron_vwn.study.report.curves import Curve
from megatron_vwn.study.report.events import LoggedRun
from megatron_vwn.training.monitoring.reference import fresh_window

_INDEPENDENT, _EFFECTIVE, _WINDOW = "independent_segments", "effective_segments", "depth_window"
_LAYER = re.compile(r"vwn_layers/(\w+)/layer_(\d+)")
# Of event files; the trunk's connections, not those of further predictions.
TAGS = tuple(f"vwn{kind}/{name}/" for name in (_INDEPENDENT, _EFFECTIVE, _WINDOW) for kind in ("", "_layers"))


@dataclass(frozen=True)
class Routing:
    """One variant's routing, as means over seeds.

    Attributes:
        n: segments of the stream.
        independent, least, most: independent segments over tokens: mean, least and largest of the layers.
        effective: segments that carry energy at the end, copies included; mean of the layers.
        independent_at_birth: in a fresh model; None where the embedding decides it.
        windows: by place in the layer pattern, how many sublayers back that one reads on average, at the end.
    """

    n: int
    independent: Curve
    least: Curve
    most: Curve
    effective: float
    independent_at_birth: float | None
    windows: Mapping[int, float]

    @property
    def window(self) -> float:
        """The mean of all layers that have one."""
        return float(np.mean(list(self.windows.values())))

    @property
    def window_at_birth(self) -> float:
        """The same in a fresh model."""
        return float(np.mean([fresh_window(place) for place in self.windows]))


def routings(comparison: Comparison) -> dict[str, Routing]:
    """By name, of the variants whose every run was monitored; of unfinished runs where no run is at its end."""
    found, first = {}, comparison.results[0]
    for name in first.curves:
        variant = comparison.variants[name]
        runs = [variant.runs[seed] for seed in first.longest(name)]
        if all(f"vwn/{_INDEPENDENT}/mean" in run.scalars for run in runs) and variant.first.width:
            found[name] = _routing(runs, comparison.unit, variant.first.width[1])
    return found


def _routing(runs: list[LoggedRun], unit: str, n: int) -> Routing:
    birth = runs[0].scalars.get(f"vwn/{_INDEPENDENT}/birth")
    layers = [_at_the_end(run, _WINDOW) for run in runs]
    return Routing(
        n=n,
        **{
            field: _mean_curve(runs, f"vwn/{_INDEPENDENT}/{what}", unit)
            for field, what in (("independent", "mean"), ("least", "min"), ("most", "max"))
        },
        effective=float(np.mean([_last(run.scalars[f"vwn/{_EFFECTIVE}/mean"]) for run in runs])),
        independent_at_birth=_last(birth) if birth else None,
        windows={place: float(np.mean([each[place] for each in layers])) for place in sorted(layers[0])},
    )


def _mean_curve(runs: list[LoggedRun], tag: str, unit: str) -> Curve:
    """Over the steps that all runs have."""
    steps = sorted(set.intersection(*(set(run.scalars[tag]) for run in runs)))
    x = np.array(steps, dtype=float)
    y = np.mean([[run.scalars[tag][step] for step in steps] for run in runs], axis=0)
    return Curve(x if unit == "steps" else runs[0].tokens(x), y)


def _at_the_end(run: LoggedRun, name: str) -> dict[int, float]:
    found = ((_LAYER.fullmatch(tag), curve) for tag, curve in run.scalars.items())
    return {int(match[2]): _last(curve) for match, curve in found if match and match[1] == name}


def _last(curve: Mapping[int, float]) -> float:
    return curve[max(curve)]
