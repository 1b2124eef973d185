"""Comparison of variants with a baseline: at equal tokens, seconds and FLOPs, and tokens to the baseline's final loss.

Seeds are paired: what a seed does to the data's order and to the backbone's first weights, it does to all variants.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.study.report.curves import Curve, Estimate, estimate
from megatron_vwn.study.report.events import VALIDATION, LoggedRun
from megatron_vwn.study.report.families import fit_families
from megatron_vwn.study.report.fit import Fit
from megatron_vwn.study.report.growth import Seed, constant_until, ratios

AXES = ("tokens", "seconds", "FLOPs")
# Of the baseline's whole training; single steps say little.
SMOOTHING = 0.05
TRAINING, _SECOND = "lm loss", "mtp_1 loss"


@dataclass(frozen=True)
class Metric:
    """A loss that is compared.

    Attributes:
        key: in file names.
        tag: of the event files.
        title: of plots and tables.
        smoothed: whether single steps are averaged.
    """

    key: str
    tag: str
    title: str
    smoothed: bool


METRICS = (
    Metric("validation", VALIDATION, "validation loss", smoothed=False),
    Metric("next2", _SECOND, "next-2-token training loss (smoothed)", smoothed=True),
    Metric("training", TRAINING, "training loss (smoothed)", smoothed=True),
)


@dataclass
class Variant:
    """All seeds of one setting.

    Attributes:
        name: without the seed.
        runs: by seed.
        r: its width; None where unknown.
        seconds_per_token, flops_per_token: None where unknown.
        clock: where the seconds come from.
    """

    name: str
    runs: dict[Seed, LoggedRun]
    r: float | None
    seconds_per_token: float | None = None
    flops_per_token: float | None = None
    clock: str = ""

    @property
    def first(self) -> LoggedRun:
        """Any of its runs, for what they share."""
        return next(iter(self.runs.values()))


@dataclass
class Compared:
    """One variant in one metric, against the baseline.

    Attributes:
        losses: by axis, by seed: the loss at the baseline's budget; None where the run ends before it.
        gaps: by axis: loss minus the baseline's final loss, of pairs of equal seeds.
        reached: by seed of a pair, tokens after which the baseline's final loss is first reached; None where it is not.
        ratios: by seed, the baseline's own ``reached`` over these: a noisy curve is at its last loss before its end.
        speedup: their mean.
        growth: by seed, the same ratio all along the baseline's training (see ``growth``).
        constant_gap: loss minus the baseline's where its learning rate begins to decay; None if it never was constant.
    """

    losses: dict[str, dict[Seed, float | None]] = field(default_factory=dict)
    gaps: dict[str, Estimate | None] = field(default_factory=dict)
    reached: dict[Seed, float | None] = field(default_factory=dict)
    ratios: dict[Seed, float] = field(default_factory=dict)
    speedup: Estimate | None = None
    growth: dict[Seed, Curve] = field(default_factory=dict)
    constant_gap: Estimate | None = None

    def reached_losses(self, axis: str) -> dict[Seed, float]:
        """The losses of the seeds that reach the budget."""
        return {seed: loss for seed, loss in self.losses.get(axis, {}).items() if loss is not None}

    def loss(self, axis: str) -> Estimate | None:
        """The mean loss of the seeds that reach the budget."""
        return estimate(list(self.reached_losses(axis).values()))

    @property
    def pairs(self) -> int:
        """Seeds whose speed-up is known or will not be any more."""
        ended = self.losses.get("tokens", {})
        return sum(x is not None or ended.get(seed) is not None for seed, x in self.reached.items())


@dataclass
class MetricResult:
    """One metric of all variants.

    Attributes:
        metric: which.
        curves: by variant, by seed.
        budget: x of the baseline's end.
        constant_until: x where the baseline's learning rate begins to decay after it was constant; None of others.
        compared: by variant, the baseline included.
        fits: by axis.
    """

    metric: Metric
    curves: dict[str, dict[Seed, Curve]]
    budget: float
    constant_until: float | None
    compared: dict[str, Compared]
    fits: dict[str, list[Fit]]

    def longest(self, name: str) -> dict[Seed, Curve]:
        """The curves of a variant's seeds that reach the budget; all of them while none does."""
        seeds = self.curves[name]
        return {seed: curve for seed, curve in seeds.items() if curve.at(self.budget) is not None} or seeds


@dataclass
class Comparison:
    """Everything that a report says.

    Attributes:
        baseline: its name.
        variants: by name, the baseline first, then by width.
        unit: of x: "tokens" or "steps".
        results: the metrics that the baseline has.
        notes: what is missing or wrong.
    """

    baseline: str
    variants: dict[str, Variant]
    unit: str
    results: list[MetricResult]
    notes: list[str]

    def named(self, axis: str) -> str:
        """An axis in words: steps stand for tokens where those are unknown."""
        return self.unit if axis == "tokens" else axis


def compare(runs: Sequence[LoggedRun], baseline: str | None, order: Sequence[str] = ()) -> Comparison:
    """Compare all runs with those of the baseline.

    Args:
        runs: as ``find_runs`` gives them.
        baseline: name of a variant; None for the only one without a virtual width.
        order: names of variants in the order of a study.

    Raises:
        VirtualWidthError: no scalars, no baseline, or none of its runs has a loss that can be compared.
    """
    notes = list(dict.fromkeys(note for run in runs for note in run.notes))
    variants = _group([run for run in runs if run.scalars], order)
    if not variants:
        raise VirtualWidthError("the event files hold no scalars at all: give folders of runs that have made steps.")
    name = _baseline_name(variants, baseline)
    variants = {name: variants[name]} | variants
    unit = "tokens"
    if unknown := [run.name for each in variants.values() for run in each.runs.values() if not run.tokens_per_step]:
        unit = "steps"
        notes.append(f"Tokens of a step are unknown of {', '.join(unknown)}: steps stand for tokens everywhere.")
    if unpaired := [run.name for each in variants.values() for run in _unpaired(each, variants[name])]:
        notes.append(
            f"{', '.join(unpaired)}: {name} has no run of that seed, so that nothing is compared; a name that ends in "
            "seed-N says the seed."
        )
    alone = _timed_alike(variants.values(), notes)
    for each in variants.values():
        _cost(each, unit, alone=alone)
    results = []
    for metric in METRICS:
        if metric is METRICS[2] and results and results[0].metric is METRICS[0]:
            break  # the loss of training is of interest only where nothing was validated
        result = _compare_metric(metric, variants, name, unit, notes, first=not results)
        if result:
            results.append(result)
    if not any(result.metric.tag != _SECOND for result in results):
        raise VirtualWidthError(
            f"no run of the baseline {name} has {VALIDATION!r} or {TRAINING!r} in its event files: train with "
            "--tensorboard-dir and --eval-interval, or name another --baseline."
        )
    return Comparison(name, variants, unit, results, notes)


def _group(runs: Sequence[LoggedRun], order: Sequence[str]) -> dict[str, Variant]:
    by_name: defaultdict[str, dict[Seed, LoggedRun]] = defaultdict(dict)
    for run in runs:
        by_name[run.variant][run.seed] = run
    variants = {name: Variant(name, dict(seeds), next(iter(seeds.values())).r) for name, seeds in by_name.items()}
    places = {name: place for place, name in enumerate(order)}
    last = len(places)
    ordered = sorted(variants.values(), key=lambda each: (places.get(each.name, last), each.r or 0, each.name))
    return {each.name: each for each in ordered}


def _baseline_name(variants: Mapping[str, Variant], asked: str | None) -> str:
    names = ", ".join(variants)
    if asked is not None:
        if asked not in variants:
            raise VirtualWidthError(
                f"there is no run of the baseline {asked}: choose one of {names or 'other folders'}."
            )
        return asked
    plain = [each.name for each in variants.values() if each.r == 1 and not each.first.width]
    if not plain:
        plain = [name for name in variants if name.split("/")[-1] in ("baseline", "base")]
    if len(plain) != 1:
        said = "none of the runs is" if not plain else f"{' and '.join(plain)} are all"
        raise VirtualWidthError(f"{said} without a virtual width: name the baseline by --baseline, one of {names}.")
    return plain[0]


def _unpaired(variant: Variant, baseline: Variant) -> list[LoggedRun]:
    return [run for seed, run in variant.runs.items() if seed not in baseline.runs]


def _timed_alike(variants: Collection[Variant], notes: list[str]) -> bool:
    """Whether all were timed alone, with their own flags and on the same hardware; other clocks are not compared."""
    timed = [each for each in variants if each.first.timing.get("seconds_per_step")]
    stale = [each.name for each in timed if each.first.timed_otherwise]
    if stale:
        notes.append(f"{', '.join(stale)}: timing.json is of other flags and not used; vwn-study time makes it anew.")
    machines = {json.dumps(each.first.timing.get("hardware"), sort_keys=True) for each in timed}
    if len(machines) > 1:
        notes.append("Variants were timed on different hardware, so these times are not used.")
    return not stale and len(machines) == 1 and len(timed) == len(variants)


def _cost(variant: Variant, unit: str, *, alone: bool) -> None:
    """Seconds and FLOPs of one x."""
    run = variant.first
    per_step = run.tokens_per_step if unit == "tokens" else 1.0
    if alone:
        variant.seconds_per_token, variant.clock = run.timing["seconds_per_step"] / per_step, "measured alone"
    else:
        logged = [each.seconds_per_step for each in variant.runs.values() if each.seconds_per_step]
        if logged:
            variant.seconds_per_token, variant.clock = float(np.mean(logged)) / per_step, "the runs' own clocks"
    flops = (run.record.get("counted") or {}).get("flops_per_token")
    if flops and run.tokens_per_step:
        variant.flops_per_token = flops * run.tokens_per_step / per_step


def _curve(run: LoggedRun, tag: str, unit: str, notes: list[str]) -> Curve | None:
    logged = sorted(run.scalars.get(tag, {}).items())
    points = [(step, value) for step, value in logged if np.isfinite(value)]
    if lost := [step for step, value in logged if not np.isfinite(value)]:
        notes.append(f"{run.name}: {tag!r} is not finite at {len(lost)} points, first at step {lost[0]}; left out.")
    if not points:
        return None
    steps, values = (np.array(each, dtype=float) for each in zip(*points, strict=True))
    return Curve(steps if unit == "steps" else run.tokens(steps), values)


def _compare_metric(
    metric: Metric, variants: Mapping[str, Variant], baseline: str, unit: str, notes: list[str], *, first: bool
) -> MetricResult | None:
    curves: dict[str, dict[Seed, Curve]] = {}
    lacking = []
    for name, variant in variants.items():
        found = {seed: _curve(run, metric.tag, unit, notes) for seed, run in variant.runs.items()}
        lacking += [variant.runs[seed].name for seed, curve in found.items() if curve is None]
        curves[name] = {seed: curve for seed, curve in found.items() if curve is not None}
    if not any(curves.values()):
        return None
    if lacking and (curves[baseline] or metric is METRICS[0]):
        notes.append(f"{', '.join(lacking)}: no {metric.tag!r} in the event files, so left out of the {metric.title}.")
    if not curves[baseline]:
        if metric is METRICS[0]:
            raise VirtualWidthError(
                f"runs have unequal tags: no run of the baseline {baseline} has {metric.tag!r}, which others have; "
                "name another --baseline, or give folders of runs that were validated alike."
            )
        return None
    budget = max(curve.end for curve in curves[baseline].values())
    if metric.smoothed:
        window = SMOOTHING * budget
        curves = {name: {seed: each.smooth(window) for seed, each in seeds.items()} for name, seeds in curves.items()}
    # What is too short is so in all metrics: said once.
    compared = _against(curves, variants, baseline, budget, notes if first else [])
    fits = {
        axis: fit_families({name: each.reached_losses(axis) for name, each in compared.items()}, variants, baseline)
        for axis in AXES
    }
    constant = constant_until(variants[baseline].first) if unit == "tokens" else None
    for name in compared:
        if name != baseline:
            compared[name].growth = ratios(curves[baseline], curves[name])
            pairs = [
                (curve.at(constant), plain.at(constant))
                for seed, curve in curves[name].items()
                if constant is not None and (plain := curves[baseline].get(seed)) is not None
            ]
            compared[name].constant_gap = estimate([a - b for a, b in pairs if None not in (a, b)])
    curves = {name: each for name, each in curves.items() if each}
    return MetricResult(metric, curves, budget, constant, compared, fits)


def _against(
    curves: Mapping[str, dict[Seed, Curve]],
    variants: Mapping[str, Variant],
    baseline: str,
    budget: float,
    notes: list[str],
) -> dict[str, Compared]:
    plain = variants[baseline]
    finals = {seed: loss for seed, curve in curves[baseline].items() if (loss := curve.at(budget)) is not None}
    short = [plain.runs[seed].name for seed in curves[baseline] if seed not in finals]
    compared = {}
    for name, seeds in curves.items():
        if not seeds:
            continue
        variant, here = variants[name], Compared()
        for axis in AXES:
            x = _x_of_budget(axis, budget, plain, variant)
            if x is None:
                continue
            here.losses[axis] = {seed: curve.at(x) for seed, curve in seeds.items()}
            here.gaps[axis] = _gap(here.losses[axis], finals)
        if name != baseline:
            short += [variant.runs[seed].name for seed, loss in here.losses["tokens"].items() if loss is None]
        for seed, loss in finals.items():
            if seed in seeds:
                here.reached[seed] = x = seeds[seed].reach(loss)
                if x is not None:
                    here.ratios[seed] = curves[baseline][seed].reach(loss) / x
        here.speedup = estimate(list(here.ratios.values()))
        compared[name] = here
    if short:
        notes.append(
            f"{', '.join(short)}: shorter than the baseline, so only in the curves where a number needs its end."
        )
    return compared


def _x_of_budget(axis: str, budget: float, plain: Variant, variant: Variant) -> float | None:
    """How far the variant comes with what the baseline spends in all."""
    costs = {
        "tokens": (1.0, 1.0),
        "seconds": (plain.seconds_per_token, variant.seconds_per_token),
        "FLOPs": (plain.flops_per_token, variant.flops_per_token),
    }[axis]
    return None if None in costs else budget * costs[0] / costs[1]


def _gap(losses: Mapping[Seed, float | None], finals: Mapping[Seed, float]) -> Estimate | None:
    return estimate([loss - finals[seed] for seed, loss in losses.items() if loss is not None and seed in finals])
