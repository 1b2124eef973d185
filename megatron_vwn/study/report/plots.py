"""Plots of a comparison, each as PNG and SVG. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from megatron_vwn.study.report.compare import AXES, METRICS, Comparison, MetricResult
from megatron_vwn.study.report.curves import Curve, difference, spread
from megatron_vwn.study.report.fit import Fit
from megatron_vwn.study.report.routing import Routing
from megatron_vwn.training.monitoring.reference import fresh_window

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#5B4FA2")
_BASELINE, _GRID = "#222222", "#d9d9d9"
_MARKERS = "osD^vPX*"
_SETTINGS = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "vwn-study",
    "figure.dpi": 130,
}
# What the beginning of training looks like is no question of a study.
_SHOWN_FROM = 0.25


def draw(comparison: Comparison, folder: Path) -> dict[str, str]:
    """Write all plots of a comparison.

    Returns:
        Names of files without suffix, and what is to be seen there, in the order of the report.
    """
    plots: dict[str, str] = {}
    with pyplot.rc_context(_SETTINGS):
        for result in comparison.results:
            for kind, (make, caption) in _OF_A_METRIC.items():
                if (figure := make(comparison, result)) is not None:
                    name = f"{result.metric.key}-{kind}"
                    _save(figure, folder / name)
                    plots[name] = caption.format(title=result.metric.title, unit=comparison.unit)
        if (figure := _speedups(comparison)) is not None:
            _save(figure, folder / "speedup")
            plots["speedup"] = f"How many times fewer {comparison.unit} reach the baseline's final loss"
    return plots


def draw_routing(comparison: Comparison, routed: Mapping[str, Routing], folder: Path) -> dict[str, str]:
    """Write the picture of what monitored variants have learned, if there are any; returns as ``draw`` does."""
    if not routed:
        return {}
    with pyplot.rc_context(_SETTINGS):
        figure, (segments, windows) = pyplot.subplots(1, 2, figsize=(11.0, 4.2))
        for name, each in routed.items():
            style = _style(comparison, name)
            segments.plot(each.independent.x, each.independent.y, **style, linewidth=1.7)
            segments.fill_between(
                each.least.x, each.least.y, each.most.y, color=style["color"], alpha=0.13, linewidth=0
            )
            segments.axhline(each.n, color=style["color"], linewidth=0.8, linestyle=":")
            windows.plot(
                *zip(*each.windows.items(), strict=True), **style, marker=_marker(comparison, name), label=name
            )
        places = sorted({place for each in routed.values() for place in each.windows})
        fresh = [fresh_window(place) for place in places]
        windows.plot(places, fresh, color=_BASELINE, linestyle="--", label="a fresh model")
        _label_x(segments, comparison, max(each.independent.end for each in routed.values()))
        segments.set_yscale("log", base=2)
        segments.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        segments.set_ylabel("independent segments")
        segments.set_title(
            "Mean of the layers, bands from the least\nto the largest layer; dotted: all segments", loc="left"
        )
        windows.set_xlabel("sublayer, by its place in the pattern")
        windows.set_ylabel("sublayers back")
        windows.set_title("How far back a sublayer reads on average", loc="left")
        _legend(windows)
        figure.tight_layout()
        _save(figure, folder / "routing")
    return {"routing": "Independent segments over the training, and the depth window of each sublayer at its end"}


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"), bbox_inches="tight")
    figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _style(comparison: Comparison, name: str) -> dict:
    if name == comparison.baseline:
        return {"color": _BASELINE, "linestyle": "--"}
    index = [each for each in comparison.variants if each != comparison.baseline].index(name)
    return {"color": _COLOURS[index % len(_COLOURS)], "linestyle": ("-", "-.", ":")[index // len(_COLOURS) % 3]}


def _marker(comparison: Comparison, name: str) -> str:
    return _MARKERS[list(comparison.variants).index(name) % len(_MARKERS)]


def _losses(comparison: Comparison, result: MetricResult) -> Figure:
    figure, axes = pyplot.subplots(figsize=(7.4, 4.4))
    shown = []
    for name in result.curves:
        seeds = list(result.longest(name).values())
        # The seeds themselves: what they have in common tells no variant from another, and is no band of one.
        for curve in seeds if len(seeds) > 1 else ():
            axes.plot(curve.x, curve.y, **_style(comparison, name), linewidth=0.7, alpha=0.4)
        shown += _mean(axes, comparison, result, name, seeds, f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})")
    _frame(axes, comparison, result, shown, margin=0.04)
    axes.set_ylabel(result.metric.title)
    axes.set_title("Mean of the seeds; thin lines are single seeds", loc="left")
    return figure


def _gaps(comparison: Comparison, result: MetricResult) -> Figure | None:
    plain = result.longest(comparison.baseline)
    figure, axes = pyplot.subplots(figsize=(7.4, 4.4))
    shown = []
    for name in result.curves:
        pairs = [difference(curve, plain[seed]) for seed, curve in result.longest(name).items() if seed in plain]
        pairs = [pair for pair in pairs if pair is not None]
        if name == comparison.baseline or not pairs:
            continue
        mark = {} if result.metric.smoothed else {"marker": _marker(comparison, name), "markersize": 4}
        shown += _mean(axes, comparison, result, name, pairs, name, band=True, **mark)
    if not axes.lines:
        pyplot.close(figure)
        return None
    axes.axhline(0, color=_BASELINE, linestyle="--", linewidth=1.2, label=f"{comparison.baseline} (0)")
    _frame(axes, comparison, result, [0.0, *shown], margin=0.05)
    axes.set_ylabel(f"{result.metric.title}\nminus the baseline's")
    axes.set_title("Below 0 is better; pairs of equal seeds, bands are 95 % intervals over seeds", loc="left")
    return figure


def _growths(comparison: Comparison, result: MetricResult) -> Figure | None:
    figure, axes = pyplot.subplots(figsize=(7.4, 4.4))
    shown = []
    for name, here in result.compared.items():
        curves = list(here.growth.values())
        if curves:
            shown += _mean(axes, comparison, result, name, curves, name, band=True, marker=_marker(comparison, name))
    if not shown:
        pyplot.close(figure)
        return None
    axes.axhline(1, color=_BASELINE, linestyle="--", linewidth=1.2, label=f"{comparison.baseline} (1)")
    if result.constant_until is not None:
        axes.axvline(result.constant_until, color=_GRID, linewidth=1.5, label="the learning rate begins to decay")
    _frame(axes, comparison, result, [1.0, *shown], margin=0.05)
    axes.set_ylabel(f"{comparison.unit} of the baseline over those\nto the same {result.metric.title}")
    axes.set_title("Above 1 is better; a line that rises is an advantage that grows", loc="left")
    return figure


def _mean(
    axes,
    comparison: Comparison,
    result: MetricResult,
    name: str,
    curves: list[Curve],
    label: str,
    *,
    band: bool = False,
    **line,
) -> list[float]:
    """Draw the mean of a variant's curves, and its interval; returns the values that should be in sight.

    Those are the curves' own: the interval of two seeds may be ten times as wide, and leaves the picture.
    """
    each, style = spread(curves), _style(comparison, name)
    if not len(each.x):
        return []
    axes.plot(each.x, each.mean, **style, **line, label=label, linewidth=1.7)
    if band and each.half is not None:
        low, high = each.mean - each.half, each.mean + each.half
        axes.fill_between(each.x, low, high, color=style["color"], alpha=0.13, linewidth=0)
    begin = _SHOWN_FROM * result.budget
    return [float(y) for curve in curves for y in curve.y[(curve.x >= begin) & (curve.x <= result.budget)]]


def _frame(axes, comparison: Comparison, result: MetricResult, shown: list[float], margin: float) -> None:
    if shown:
        room = margin * (max(shown) - min(shown)) or 0.01
        axes.set_ylim(min(shown) - room, max(shown) + room)
    _label_x(axes, comparison, result.budget)
    _legend(axes)


def _widths(comparison: Comparison, result: MetricResult) -> Figure | None:
    shown = [axis for axis in AXES if result.fits.get(axis)]
    if not shown:
        return None
    figure, row = pyplot.subplots(
        1, len(shown), figsize=(1.2 + 3.5 * len(shown), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, axis in zip(row[0], shown, strict=True):
        for index, fit in enumerate(result.fits[axis]):
            _fit(axes, fit, _COLOURS[index % len(_COLOURS)], len(result.fits[axis]) > 1)
        ticks = sorted({float(r) for fit in result.fits[axis] for r in fit.r})
        axes.set_xticks(np.log2(ticks), [f"{tick:g}" for tick in ticks])
        axes.set_xlabel("r (log scale)")
        named = f"at equal {comparison.named(axis)}"
        if len(result.fits[axis]) == 1:
            fit = result.fits[axis][0]
            named += f"\nslope {fit.slope:+.4f}, $R^2$ = {fit.r_squared:.3f}"
        axes.set_title(named, loc="left")
    row[0][0].set_ylabel(result.metric.title)
    handles, labels = row[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _fit(axes, fit: Fit, colour: str, several: bool) -> None:
    name = f"{fit.label}: " if several else ""
    line = np.geomspace(fit.r[0], fit.r[-1], 50)
    axes.plot(np.log2(line), fit.intercept + fit.slope * np.log2(line), color=colour, label=f"{name}least squares")
    if (band := fit.band(line)) is not None:
        axes.fill_between(np.log2(line), *band, color=colour, alpha=0.15, linewidth=0, label=f"{name}95 % of the line")
    axes.errorbar(
        np.log2(fit.r), fit.losses, yerr=fit.errors, fmt="o", color=colour, capsize=3, label=f"{name}mean, 95 %"
    )


def _budgets(comparison: Comparison, result: MetricResult) -> Figure | None:
    names = [name for name in result.compared if name != comparison.baseline]
    axes_with = [axis for axis in AXES if any(result.compared[name].gaps.get(axis) for name in names)]
    if not names or not axes_with:
        return None
    figure, axes = pyplot.subplots(figsize=(7.4, 1.3 + 0.55 * len(names)))
    for index, axis in enumerate(axes_with):
        for place, name in enumerate(names):
            gap = result.compared[name].gaps.get(axis)
            if gap is None:
                continue
            y = place + (index - (len(axes_with) - 1) / 2) * 0.22
            label = f"equal {comparison.named(axis)}"
            known = axes.get_legend_handles_labels()[1]
            axes.errorbar(
                gap.mean,
                y,
                xerr=gap.half,
                fmt="osD"[index],
                markersize=6,
                color=_COLOURS[index],
                capsize=3,
                label=None if label in known else label,
            )
    _names_down(axes, names, 0)
    axes.set_xlabel(f"{result.metric.title} minus the baseline's")
    axes.set_title("Left of 0 is better; lines are 95 % intervals over seeds", loc="left")
    _legend(axes)
    return figure


def _speedups(comparison: Comparison) -> Figure | None:
    results = [
        result for result in comparison.results if result.metric.key != "training" or len(comparison.results) < 2
    ]
    names = [
        name
        for name in comparison.variants
        if name != comparison.baseline
        and any(name in result.compared and result.compared[name].speedup for result in results)
    ]
    if not names:
        return None
    figure, axes = pyplot.subplots(figsize=(7.4, 1.3 + 0.5 * len(names)))
    height = 0.76 / len(results)
    for index, result in enumerate(results):
        for place, name in enumerate(names):
            here = result.compared.get(name)
            if here is None or here.speedup is None:
                continue
            y = place + (index - (len(results) - 1) / 2) * height
            label = result.metric.title if place == 0 else None
            axes.barh(y, here.speedup.mean, height=0.92 * height, color=_COLOURS[index], alpha=0.55, label=label)
            each = list(here.ratios.values())
            axes.plot(each, [y] * len(each), "o", color=_BASELINE, markersize=3.5, alpha=0.8)
    _names_down(axes, names, 1)
    axes.set_xlabel(f"{comparison.unit} of the baseline to its final loss over those of the variant")
    axes.set_title("Right of 1 is better; dots are seeds that reach it", loc="left")
    _legend(axes)
    return figure


def _names_down(axes, names: list[str], baseline: float) -> None:
    """One row per variant, the first on top, and a line where a variant is like the baseline."""
    axes.axvline(baseline, color=_BASELINE, linestyle="--", linewidth=1.2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _label_x(axes, comparison: Comparison, budget: float) -> None:
    axes.set_xlim(0, 1.01 * budget)
    if comparison.unit == "steps":
        axes.set_xlabel("steps")
        return
    units = (("billion ", 1e9), ("million ", 1e6), ("thousand ", 1e3), ("", 1.0))
    unit, size = next((each for each in units if budget >= each[1]), units[-1])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / size:g}")
    axes.set_xlabel(f"{unit}training tokens")


def _legend(axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


# By the end of its name, what makes a plot of a metric, and its caption.
_OF_A_METRIC = {
    "loss": (_losses, "The {title} against {unit}"),
    "gap": (_gaps, "Difference in {title} from the baseline"),
    "growth": (_growths, "How many times fewer {unit} reach the baseline's {title}, all along its training"),
    "width": (_widths, "The {title} against log2 r at equal budgets"),
    "budgets": (_budgets, "Difference in {title} at equal budgets"),
}
NAMES = {f"{metric.key}-{kind}" for metric in METRICS for kind in _OF_A_METRIC} | {"speedup", "routing"}
"""Of all files that a report may have, without suffix."""
