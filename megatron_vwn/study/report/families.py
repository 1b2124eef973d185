"""Which variants of a study make one line against log2 r: those that differ in nothing but the width."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from megatron_vwn.cli import flag_groups
from megatron_vwn.config import OF_THE_RUN, VirtualWidthConfig
from megatron_vwn.study.report.events import R_IN_NAME
from megatron_vwn.study.report.fit import Fit, fit_widths

if TYPE_CHECKING:
    from megatron_vwn.study.report.compare import Variant

# Of the arguments as they are logged; the width itself makes no family, and the norm before the reduction follows from
# it where nothing is said.
_SHARED = tuple(
    f"vwn_{field.name}" for field in fields(VirtualWidthConfig) if field.name not in (*OF_THE_RUN, "n", "reduce_norm")
)

_NO_FAMILY = {"--seed", "--vwn-n", "--vwn-reduce-norm", "--no-vwn-reduce-norm"}


def fit_families(
    losses: Mapping[str, Mapping[int | None, float]], variants: Mapping[str, Variant], baseline: str
) -> list[Fit]:
    """A fit for each family; the baseline, r = 1, belongs to those without a variant of r = 1, routing without width.

    Args:
        losses: by variant, by seed.
        variants: by name.
        baseline: its name.
    """
    known = [name for name, seeds in losses.items() if seeds and variants[name].r is not None]
    if baseline not in known:
        return []
    fits = []
    for names in families([variants[name] for name in known if name != baseline]):
        widths = {name: variants[name].r for name in names}
        if 1 not in widths.values():
            widths[baseline] = 1.0
        fits.append(fit_widths(", ".join(names), {name: losses[name] for name in widths}, widths))
    return [fit for fit in fits if fit is not None]


def families(variants: Sequence[Variant]) -> list[list[str]]:
    """Names of the variants of each family; every width occurs once in it.

    Where settings alone leave a width twice, the norm before the reduction tells variants apart (it follows from the
    width where nothing is said, so that it is no part of the settings), and after it their names without the width.
    """
    keys: list[Callable[[Variant], object]] = [
        lambda each: (_flags(each), *(each.first.arguments.get(key, "") for key in _SHARED)),
        lambda each: each.first.arguments.get("vwn_reduce_norm", ""),
        lambda each: R_IN_NAME.sub("", each.name),
    ]
    groups = [list(variants)]
    for index, key in enumerate(keys):
        groups = [part for group in groups for part in (_split(group, key) if not index or _twice(group) else [group])]
    return [[each.name for each in group] for group in groups if not _twice(group)]


def _flags(variant: Variant) -> frozenset[tuple[str, ...]]:
    """Of a study's run, every flag with its values but the seed and those that make no family."""
    groups = flag_groups(variant.first.record.get("flags") or ())
    return frozenset(group for group in groups if group[0] not in _NO_FAMILY)


def _split(group: Sequence[Variant], key: Callable[[Variant], object]) -> list[list[Variant]]:
    parts: defaultdict[object, list[Variant]] = defaultdict(list)
    for each in group:
        parts[key(each)].append(each)
    return list(parts.values())


def _twice(group: Sequence[Variant]) -> bool:
    return len({each.r for each in group}) < len(group)
