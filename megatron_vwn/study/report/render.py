"""A report as Markdown from ``report.md.j2``, and that Markdown as one HTML file that needs no network."""

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markdown import markdown
from markupsafe import Markup

from megatron_vwn.study.report.compare import AXES, SMOOTHING, Compared, Comparison, Variant
from megatron_vwn.study.report.curves import Estimate
from megatron_vwn.study.report.events import LoggedRun
from megatron_vwn.study.report.growth import SHARES, Seed, at_shares, change
from megatron_vwn.study.report.routing import Routing

_NOTHING = "-"
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
# An underscore inside a word stands for itself.
_SPECIAL = re.compile(r"[\\`*\[\]|#]|(?<![^\W_])_|_(?![^\W_])")
_IMAGE = re.compile(r'(<img alt="[^"<]*" src=")([\w-]+)\.png"')


def as_markdown(
    comparison: Comparison,
    runs: Sequence[LoggedRun],
    routed: Mapping[str, Routing],
    plots: Mapping[str, str],
    study: Mapping,
    command: str,
) -> str:
    """The report for a repository; plots are PNG files beside it.

    Args:
        comparison: what was found.
        runs: all that were read.
        routed: what the routing of monitored variants has learned.
        plots: names of files and captions.
        study: ``study.json``; empty for other folders.
        command: that made the report.
    """
    environment = _environment(finalize=_escape)
    environment.filters |= _FILTERS
    said = environment.get_template("report.md.j2").render(
        comparison=comparison,
        runs=runs,
        records=_starts(runs),
        routed=routed,
        plots=plots,
        study=study,
        command=command,
        axes=AXES,
        smoothing=SMOOTHING,
        shares=SHARES,
    )
    return re.sub(r"\n{3,}", "\n\n", said).strip() + "\n"


def as_html(text: str, title: str, folder: Path) -> str:
    """The report ``text`` for a browser; plots are read from ``folder`` and become part of it."""

    def embedded(image: re.Match) -> str:
        data = base64.b64encode((folder / f"{image[2]}.svg").read_bytes()).decode()
        return f'{image[1]}data:image/svg+xml;base64,{data}"'

    body = markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    return _environment().get_template("report.html.j2").render(title=title, body=Markup(_IMAGE.sub(embedded, body)))


def _environment(**options) -> Environment:
    loader = PackageLoader("megatron_vwn.study.report", "")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, **options)


def _escape(value: object) -> Markup:
    """A value in Markdown on one line; names of runs are folders' names, which may hold anything."""
    if isinstance(value, Markup):
        return value
    # One line: a name with a line break would end its table.
    line = re.sub(r"[\r\n]+", " ", str(value))
    return Markup(_SPECIAL.sub(r"\\\g<0>", line).translate(_ENTITIES))


def _code(text: str) -> Markup:
    """Lines to be copied, between fences that are longer than any in them."""
    fence = "`" * max([3, *(1 + len(ticks) for ticks in re.findall("`+", text))])
    return Markup(f"{fence}\n{text}\n{fence}")


def _number(value: Estimate | None, otherwise: str = _NOTHING) -> str:
    """A mean alone: what seeds do to all variants alike is no uncertainty of a comparison."""
    return f"{value.mean:.4f}" if value else otherwise


def _signed(value: Estimate | None) -> str:
    """A difference from the baseline, with its interval."""
    return f"{value.mean:+.4f}{_interval(value)}" if value else _NOTHING


def _interval(value: Estimate, digits: int = 4) -> str:
    return "" if value.half is None else f" ± {value.half:.{digits}f}"


def _whole(value: float | None) -> str:
    return f"{value:,.0f}" if value else _NOTHING


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _verdict(gap: Estimate) -> str:
    if gap.half is None:
        return "lower than the baseline in its one seed" if gap.mean < 0 else "not lower than the baseline in one seed"
    if not gap.clear:
        return "which the seeds do not tell from 0"
    return "better than the baseline" if gap.mean < 0 else "worse than the baseline"


def _reached(here: Compared, unit: str) -> str:
    if here.speedup is None:
        return "the baseline's final loss is not reached"
    said = f"the baseline's final loss after {here.speedup.mean:.2f} times fewer {unit}"
    if here.speedup.mean < 1:
        said = f"the baseline's final loss after {1 / here.speedup.mean:.2f} times as many {unit}"
    if here.speedup.half is not None:
        said += f" (speed-up {here.speedup.mean:.2f}{_interval(here.speedup, 2)})"
    return said + ("" if here.speedup.count == here.pairs else f", in {here.speedup.count} of {here.pairs} seeds")


def _ratio(value: Estimate | None, sign: str = "", pairs: int = 0) -> str:
    """A ratio of tokens; fewer seeds than there are pairs are said, because those that never get there are missing."""
    if value is None:
        return _NOTHING
    some = f" ({value.count} of {pairs} seeds)" if value.count < pairs else ""
    return f"{value.mean:{sign}.2f}{_interval(value, 2)}{some}"


def _other_seeds(comparison: Comparison) -> str:
    """Which losses are means over other seeds than the baseline's, beside which they stand."""
    compared = comparison.results[0].compared
    seeds = {name: set(here.reached_losses("tokens")) for name, here in compared.items()}
    plain = seeds[comparison.baseline]
    lines = [f"{name} {_seeds(each)}" for name, each in seeds.items() if each and each != plain]
    if not lines:
        return ""
    return (
        f"Losses are means over the seeds that a variant has, of {comparison.baseline} {_seeds(plain)}, but of "
        f"{', '.join(lines)}; differences are of equal seeds, so they are not those of these losses."
    )


def _seeds(seeds: Collection[Seed]) -> str:
    return " and ".join(str(seed) for seed in sorted(seeds, key=lambda seed: (seed is None, seed)))


def _starts(runs: Sequence[LoggedRun]) -> list[Mapping]:
    """Hardware, versions and commit of every start of every run."""
    return [start for run in runs if run.record for start in run.record.get("starts") or [run.record]]


def _grows(comparison: Comparison) -> str:
    """Whether variants need fewer tokens late than early, while the learning rate does not decay."""
    first = comparison.results[0]
    end = min(first.constant_until or first.budget, first.budget)
    said = []
    for name, here in first.compared.items():
        found = change(here.growth, SHARES[0] * first.budget, end)
        if found is not None:
            # One seed has no interval; what its two decimals do not show has not changed.
            clear = found.clear if found.half is not None else abs(found.mean) >= 0.005
            word = ("grows" if found.mean > 0 else "shrinks") if clear else "neither grows nor shrinks clearly"
            said.append(f"{name} {word}, by {_ratio(found, sign='+')}{' in one seed' if found.half is None else ''}")
    if not said:
        return "cannot be followed: no variant reaches the baseline's losses at a quarter of its training and later."
    where = "the end of the constant learning rate" if first.constant_until else "the end"
    return f"between a quarter of the training and {where}, as a ratio of {comparison.unit}: {'; '.join(said)}."


def _milliseconds(variant: Variant, unit: str) -> str:
    if variant.seconds_per_token is None:
        return _NOTHING
    return f"{variant.seconds_per_token * (1 if unit == 'steps' else variant.first.tokens_per_step) * 1e3:,.0f}"


def _flops(variant: Variant) -> str:
    return _NOTHING if variant.flops_per_token is None else f"{variant.flops_per_token / 1e6:,.4g}M"


def _times(value: float | None, plain: float | None) -> str:
    return "" if value is None or not plain or value == plain else f" ({value / plain:.2f}x)"


def _losing(comparison: Comparison) -> list[str]:
    """By metric and budget, the variants that are not better than the baseline, or not clearly."""
    lines = []
    for result in comparison.results:
        for axis in AXES:
            others = [
                (name, here.gaps.get(axis)) for name, here in result.compared.items() if name != comparison.baseline
            ]
            gaps = [(name, gap) for name, gap in others if gap]
            worse = [(name, gap) for name, gap in gaps if gap.mean >= 0]
            unclear = [(name, gap) for name, gap in gaps if gap.mean < 0 and gap.half is not None and not gap.clear]
            where = f"{_capital(result.metric.title)} at equal {comparison.named(axis)}"
            for said, losers in (("not lower", worse), ("not clearly lower", unclear)):
                if losers:
                    names = ", ".join(f"{name} ({_signed(gap)})" for name, gap in losers)
                    lines.append(f"{where}: {said} with {names}.")
    return lines


def _hardware(record: Mapping) -> str:
    facts = record.get("hardware") or {}
    if not facts:
        return ""
    cores = f", {facts.get('cores')} cores" if facts.get("device") == "cpu" else ""
    return f"{facts.get('name')}{cores}, {facts.get('ranks', 1)} rank(s) per run"


def _versions(record: Mapping) -> str:
    unused = ("cuda",) if (record.get("hardware") or {}).get("device") == "cpu" else ()
    versions = (record.get("versions") or {}).items()
    return ", ".join(f"{name} {version}" for name, version in versions if version and name not in unused)


def _commit(record: Mapping) -> str:
    commit = record.get("commit")
    return commit["hash"] + (" with uncommitted changes" if commit.get("dirty") else "") if commit else ""


def _clock(run: LoggedRun) -> str:
    if not run.timing or run.timed_otherwise:
        return ""
    rounds = run.timing.get("rounds", [])
    return (
        f"{run.variant} {', '.join(f'{each * 1e3:.0f}' for each in rounds)} ms per step in {len(rounds)} short runs, "
        f"load {run.timing.get('load_before', 0):.1f} before"
    )


_FILTERS = {
    "at_shares": at_shares,
    "capital": _capital,
    "clock": _clock,
    "code": _code,
    "commit": _commit,
    "flops": _flops,
    "grows": _grows,
    "hardware": _hardware,
    "losing": _losing,
    "milliseconds": _milliseconds,
    "number": _number,
    "other_seeds": _other_seeds,
    "ratio": _ratio,
    "reached": _reached,
    "signed": _signed,
    "times": _times,
    "verdict": _verdict,
    "versions": _versions,
    "whole": _whole,
}
