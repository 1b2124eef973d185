"""A few rows in place of all: every pair of values that a product of cases covers, in as few cases as a greedy choice
needs. A fault of a kernel hangs on one value or on two together (a gate with a dtype, a carry with a size), seldom on
three."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations


def pairs(row: Sequence) -> set[tuple]:
    """Two factors' positions in the row and their values, for any two of them."""
    return set(combinations(enumerate(row), 2))


def pairs_of(rows: Iterable[Sequence]) -> set[tuple]:
    """Those of all rows."""
    return set().union(*map(pairs, rows))


def cover[Row: Sequence](candidates: Sequence[Row], wanted: set[tuple], cost: Callable[[Row], float]) -> list[Row]:
    """Candidates that have every wanted pair; each has one that no other has.

    Takes the candidate with the most missing pairs for its cost, the first of equals, until none is missing: the same
    rows in every process. Then drops, dearest first, those that later ones made superfluous.
    """
    if not wanted <= pairs_of(candidates):
        raise ValueError(f"no candidate has {wanted - pairs_of(candidates)}")
    bits = {pair: 1 << position for position, pair in enumerate(wanted)}
    masks = {row: sum(bits.get(pair, 0) for pair in pairs(row)) for row in candidates}
    chosen, missing = [], (1 << len(bits)) - 1
    while missing:
        chosen.append(max(candidates, key=lambda row: (masks[row] & missing).bit_count() / cost(row)))
        missing &= ~masks[chosen[-1]]
    for row in sorted(chosen, key=cost, reverse=True):
        rest = [other for other in chosen if other != row]
        if wanted <= pairs_of(rest):
            chosen = rest
    return chosen
