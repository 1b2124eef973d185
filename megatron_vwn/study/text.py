"""What a report says about a comparison."""

from collections.abc import Mapping, Sequence

from megatron_vwn.study.compare import AXES, METRICS, Comparison, MetricResult
from megatron_vwn.study.curves import Estimate
from megatron_vwn.study.document import Block, Heading, Items, Plot, Table, Text
from megatron_vwn.study.events import LoggedRun
from megatron_vwn.study.fit import Fit
from megatron_vwn.study.origin import how_it_was_run

_NOTHING = "-"


def document(
    comparison: Comparison, runs: Sequence[LoggedRun], plots: Mapping[str, str], study: Mapping, command: str
) -> list[Block]:
    """The report's blocks.

    Args:
        comparison: what was found.
        runs: all that were read.
        plots: names of files and captions.
        study: ``study.json``; empty for other folders.
        command: that made the report.
    """
    first = comparison.results[0]
    blocks: list[Block] = [Heading(study.get("title") or "Comparison of runs", 1), Text(_opening(comparison, first))]
    blocks += [Heading("What came out"), Items(tuple(_findings(comparison, first)))]
    blocks += [_overview(comparison), _costs(comparison)]
    losing = _losing(comparison)
    blocks += [Heading("Where the baseline is not beaten"), Items(losing) if losing else Text("Nowhere in this study.")]
    for result in comparison.results:
        blocks += _section(comparison, result, plots)
    if "speedup" in plots:
        blocks += [Heading("Convergence speed-up"), Text(_speedup_text(comparison)), Plot("speedup", plots["speedup"])]
    if comparison.notes:
        blocks += [Heading("Missing and left out"), Items(tuple(comparison.notes))]
    return blocks + how_it_was_run(comparison, runs, study, command)


def _opening(comparison: Comparison, result: MetricResult) -> str:
    seeds = len(comparison.variants[comparison.baseline].runs)
    names = ", ".join(name for name in comparison.variants if name != comparison.baseline) or "nothing"
    said = (
        f"{names} against {comparison.baseline}, {_plural(seeds, 'seed')} of the baseline, "
        f"{result.budget:,.0f} {comparison.unit}. Every figure comes from the runs' event files; intervals are 95 % "
        "of Student's t over seeds, paired with the baseline's run of the same seed."
    )
    if result.metric is not METRICS[0]:
        said += " No run was validated: the losses are those of training, smoothed."
    return said


def _findings(comparison: Comparison, result: MetricResult) -> list[str]:
    found = []
    for name, here in result.compared.items():
        gap = here.gaps.get("tokens")
        if name == comparison.baseline:
            continue
        if gap is None:
            found.append(f"{name}: no run has reached the baseline's {result.budget:,.0f} {comparison.unit} yet.")
            continue
        found.append(
            f"{name}: {result.metric.title} {_signed(gap)} at equal {comparison.unit}, {_verdict(gap)}; "
            f"{_reached(result, name, comparison)}."
        )
    return found or ["There is nothing beside the baseline."]


def _verdict(gap: Estimate) -> str:
    if gap.half is None:
        return "lower than the baseline in its one seed" if gap.mean < 0 else "not lower than the baseline in one seed"
    if not gap.clear:
        return "which the seeds do not tell from 0"
    return "better than the baseline" if gap.mean < 0 else "worse than the baseline"


def _reached(result: MetricResult, name: str, comparison: Comparison) -> str:
    here = result.compared[name]
    reached = sum(x is not None for x in here.reached.values())
    asked = sum(x is not None or here.losses["tokens"][seed] is not None for seed, x in here.reached.items())
    if here.speedup is None:
        return "the baseline's final loss is not reached"
    said = f"the baseline's final loss after {here.speedup.mean:.2f} times fewer {comparison.unit}"
    if here.speedup.mean < 1:
        said = f"the baseline's final loss after {1 / here.speedup.mean:.2f} times as many {comparison.unit}"
    if here.speedup.count > 1:
        said += f" ({here.speedup.low:.2f} to {here.speedup.high:.2f})"
    return said + ("" if reached == asked else f", in {reached} of {asked} seeds")


def _overview(comparison: Comparison) -> Table:
    results = comparison.results
    head = ["", "r", "seeds"]
    for result in results:
        head += [f"{result.metric.title} at equal {comparison.unit}", "minus baseline", "speed-up"]
    rows = []
    for name, variant in comparison.variants.items():
        row = [name, _NOTHING if variant.r is None else f"{variant.r:g}", str(len(variant.runs))]
        for result in results:
            here = result.compared.get(name)
            gap = here.gaps.get("tokens") if here and name != comparison.baseline else None
            row += [
                _number(here.loss("tokens") if here else None),
                _signed(gap) if gap else _NOTHING,
                f"{here.speedup.mean:.2f}" if here and here.speedup and name != comparison.baseline else _NOTHING,
            ]
        rows.append(tuple(row))
    return Table(tuple(head), tuple(rows))


def _costs(comparison: Comparison) -> Table:
    plain = comparison.variants[comparison.baseline]
    rows = [
        (
            variant.name,
            _relative(variant.seconds_per_token, plain.seconds_per_token, _milliseconds(variant, comparison)),
            _relative(variant.flops_per_token, plain.flops_per_token, f"{(variant.flops_per_token or 0) / 1e6:,.4g}M"),
            _parameters(variant.first),
        )
        for variant in comparison.variants.values()
    ]
    return Table(("", "ms per step", f"FLOPs per {comparison.unit.rstrip('s')}", "parameters"), tuple(rows))


def _milliseconds(variant, comparison: Comparison) -> str:
    per_step = 1.0 if comparison.unit == "steps" else variant.first.tokens_per_step
    return f"{(variant.seconds_per_token or 0) * per_step * 1e3:,.0f}"


def _relative(value: float | None, plain: float | None, said: str) -> str:
    if value is None:
        return _NOTHING
    return said if not plain or value == plain else f"{said} ({value / plain:.2f}x)"


def _parameters(run: LoggedRun) -> str:
    count = (run.record.get("counted") or {}).get("parameters")
    return f"{count:,}" if count else _NOTHING


def _losing(comparison: Comparison) -> tuple[str, ...]:
    lines = []
    for result in comparison.results:
        for axis in AXES:
            named = comparison.unit if axis == "tokens" else axis
            worse, unclear = [], []
            for name, here in result.compared.items():
                gap = here.gaps.get(axis)
                if name == comparison.baseline or gap is None:
                    continue
                if gap.mean >= 0:
                    worse.append(f"{name} ({_signed(gap)})")
                elif not gap.clear and gap.half is not None:
                    unclear.append(f"{name} ({_signed(gap)})")
            if worse:
                lines.append(f"{_capital(result.metric.title)} at equal {named}: not lower with {', '.join(worse)}.")
            if unclear:
                lines.append(
                    f"{_capital(result.metric.title)} at equal {named}: not clearly lower with {', '.join(unclear)}."
                )
    return tuple(lines)


def _section(comparison: Comparison, result: MetricResult, plots: Mapping[str, str]) -> list[Block]:
    key, title = result.metric.key, result.metric.title
    blocks: list[Block] = [Heading(_capital(title))]
    if result.metric.smoothed:
        share = f"{0.05 * result.budget:,.0f} {comparison.unit}"
        blocks.append(
            Text(f"Of training batches, the mean over the last {share}; Megatron validates the next token only.")
        )
    blocks += [Plot(name, plots[name]) for name in (f"{key}-loss", f"{key}-gap") if name in plots]
    blocks += [
        Heading("At the baseline's whole budget", 3),
        Text(_budget_text(comparison)),
        _budgets(comparison, result),
    ]
    blocks += [Plot(f"{key}-budgets", plots[f"{key}-budgets"])] if f"{key}-budgets" in plots else []
    blocks.append(Heading("Loss against log2 r", 3))
    rows = [row for axis in AXES for row in _fit_rows(axis, result.fits.get(axis, []), comparison)]
    if not rows:
        return [*blocks, Text("No fit: it takes three widths, the baseline's 1 included, with all else equal.")]
    blocks.append(
        Text(
            "loss = a + b log2 r by least squares through the means; b is the change per doubling of the width. The "
            "interval of b and the band of the line come from the lines of single seeds."
        )
    )
    blocks.append(Table(("at equal", "variants", "a", "b", "95 % of b", "R²", "seeds"), tuple(rows)))
    return blocks + ([Plot(f"{key}-width", plots[f"{key}-width"])] if f"{key}-width" in plots else [])


def _budget_text(comparison: Comparison) -> str:
    clocks = {each.clock for each in comparison.variants.values() if each.clock}
    said = "Every curve is read where it has spent what the baseline spends in all, linear between its points."
    if clocks == {"measured alone"}:
        said += " Seconds are those per step of each variant, measured with nothing else beside, times steps."
    elif clocks:
        said += (
            " Seconds are the median of the runs' own iteration times, times steps; runs that shared a machine slowed "
            "each other down."
        )
    else:
        said += " Equal seconds is left out: no times were logged (--log-timers-to-tensorboard)."
    if any(each.flops_per_token is None for each in comparison.variants.values()):
        said += " Equal FLOPs is left out where they are unknown; vwn-study run counts them when it starts."
    return said + (
        " A run that is read before its end has not had the end of its learning rate's schedule; one planned for that "
        "budget would come out lower."
    )


def _budgets(comparison: Comparison, result: MetricResult) -> Table:
    head = [""]
    for axis in AXES:
        head += [f"equal {comparison.unit if axis == 'tokens' else axis}", "minus baseline"]
    rows = []
    for name, here in result.compared.items():
        row = [name]
        for axis in AXES:
            if axis not in here.losses:
                row += ["unknown", _NOTHING]
                continue
            loss, gap = here.loss(axis), here.gaps.get(axis)
            row += ["not reached" if loss is None else _number(loss)]
            row += [_NOTHING if gap is None or name == comparison.baseline else _signed(gap)]
        rows.append(tuple(row))
    return Table(tuple(head), tuple(rows))


def _fit_rows(axis: str, fits: Sequence[Fit], comparison: Comparison) -> list[tuple[str, ...]]:
    rows = []
    for fit in fits:
        slope = fit.seed_slopes
        interval = (
            "one seed" if slope.half is None else f"{slope.mean - slope.half:+.4f} to {slope.mean + slope.half:+.4f}"
        )
        named = comparison.unit if axis == "tokens" else axis
        rows.append(
            (
                named,
                fit.label,
                f"{fit.intercept:.4f}",
                f"{fit.slope:+.4f}",
                interval,
                f"{fit.r_squared:.4f}",
                str(len(fit.seeds)),
            )
        )
    return rows


def _speedup_text(comparison: Comparison) -> str:
    return (
        f"The baseline's {comparison.unit} over those after which a variant first has the final loss of the baseline's "
        "run of the same seed, linear between points. The baseline ends with a decayed learning rate and the variant "
        "gets there before: with a schedule of their own, variants would need fewer."
    )


def _number(value: Estimate | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value.mean:.4f}" + ("" if value.half is None else f" ± {value.half:.4f}")


def _signed(value: Estimate) -> str:
    return f"{value.mean:+.4f}" + ("" if value.half is None else f" ± {value.half:.4f}")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
