"""A study's grid: every combination of some flags' values, with a name for each."""

import itertools
import re
from collections.abc import Mapping
from fractions import Fraction

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.recipes.flags import Value

# Of r and m. Python would compute the power of ten of a longer one for hours.
_NUMBER = re.compile(r"-?\d{0,9}(\.\d{0,9}|/\d{1,9})?")


def expand_grid(grid: Mapping[str, Value], shared: Mapping[str, Value]) -> list[tuple[str, dict[str, Value]]]:
    """All combinations of a grid's values, each with a name made of those keys that have several.

    Args:
        grid: keys to a value or a list of values; ``r`` stands for vwn-n = r vwn-m and may be a fraction ("3/2").
        shared: flags that a combination is on top of, where vwn-m may be.

    Returns:
        Names and flags: r of 8, "projected" and False of vwn-reduce-norm make ``r8-projected-no-reduce-norm``.

    Raises:
        VirtualWidthError: an r that no n gives, or that stands beside vwn-n, or a key without values.
    """
    for key, values in grid.items():
        if values == []:
            raise VirtualWidthError(f"{key} has no values in the grid: give some, or leave it out.")
    if "r" in grid and "vwn-n" in grid:
        raise VirtualWidthError("the grid has both r and vwn-n, which r gives: keep one of them.")
    choices = {key: values if isinstance(values, list) else [values] for key, values in grid.items()}
    expanded = []
    for values in itertools.product(*choices.values()):
        flags = dict(zip(choices, values, strict=True))
        if "r" in flags:
            flags["vwn-n"] = _segments(flags["r"], flags.get("vwn-m", shared.get("vwn-m")))
        words = [_word(key, flags[key]) for key in choices if len(choices[key]) > 1]
        flags.pop("r", None)
        expanded.append(("-".join(words) or "grid", flags))
    return expanded


def _segments(r: Value, m: Value) -> int:
    try:
        n = _fraction(r) * _fraction(m)
    except (ValueError, ZeroDivisionError):
        raise VirtualWidthError(f"r = {r} with vwn-m = {m} is no width: give numbers to both in the grid.") from None
    if n.denominator != 1:
        raise VirtualWidthError(f"r = {r} with vwn-m = {m} gives {float(n):g} segments: choose r m whole.")
    return int(n)


def _fraction(value: Value) -> Fraction:
    if not _NUMBER.fullmatch(str(value)):
        raise ValueError(value)
    return Fraction(str(value))


def _word(key: str, value: Value) -> str:
    short = key.removeprefix("vwn-")
    if value is None:
        return f"{short}-default"
    if isinstance(value, bool):
        return short if value else f"no-{short}"
    if isinstance(value, str) and key != "r":
        return re.sub(r"[^\w.+=]+", "-", value).strip("-") or short
    if isinstance(value, list):
        value = "+".join(map(str, value))
    elif key == "r":
        value = f"{float(Fraction(str(value))):g}"
    return f"{short}{value}" if len(short) == 1 else f"{short}-{value}"
