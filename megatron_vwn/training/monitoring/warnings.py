"""One line when a virtual width goes wrong in a way that its loss shows late: what happens, and what to try."""

import math

from megatron_vwn.training.monitoring.snapshot import Place, Snapshot

# Of the n - 1 segments beyond the first, the least share that has to carry energy: below a tenth the stream is one
# segment and a trace of others. Copies, with which a model may be born, count as segments here.
COLLAPSED = 0.1
# Hyper-connections diverge with gains of thousands, and constrained ones keep 1.6 (arXiv 2512.24880, its Amax gain
# magnitude). At 16 a stream in bf16 has lost half of the 8 bits with which it began to the growth of its own carry.
CARRY_GAIN = 16.0


class StabilityWarnings:
    """Says each condition once.

    Args:
        carry: the run's --vwn-carry.
    """

    def __init__(self, carry: str):
        self._carry = carry
        self._said: set[str] = set()

    def of(self, snapshot: Snapshot, values: dict[str, dict[Place, float]]) -> list[str]:
        """New lines to print.

        Args:
            snapshot: of one step.
            values: ``monitoring_scalars.per_connection`` of it.
        """
        lost = [p for p, gain in values["carry_gain_forward_max"].items() if not math.isfinite(gain)]
        lost += [p for p, segments in values["effective_segments"].items() if not math.isfinite(segments)]
        if lost:  # which no threshold would notice
            text = (
                f"the stream before {_spoken(min(lost))}, or a carry behind it, is not finite; "
                "go back to a checkpoint before, with a lower --lr or --clip-grad"
            )
            return self._new(snapshot, {"not finite": text})
        found = {}
        place, segments = _first(values["effective_segments"], min)
        n = next(iter(snapshot.connections.values())).n
        if n > 1 and segments < 1 + COLLAPSED * (n - 1):
            found["collapse"] = (
                f"the segments collapse: before {_spoken(place)} {segments:.2f} of {n} carry the stream; "
                f"start again with {self._another_carry()}a lower --lr or a longer --lr-warmup-iters"
            )
        gains = values["carry_gain_forward_max"], values["carry_gain_backward_max"]
        place, gain = _first({p: max(forward, gains[1][p]) for p, forward in gains[0].items()}, max)
        if gain > CARRY_GAIN:
            found["gain"] = (
                f"the carry from {_spoken(place)} to the end amplifies {gain:.1f} times (threshold {CARRY_GAIN:g}); "
                f"start again with {self._another_carry()}a lower --lr or a longer --lr-warmup-iters"
            )
        return self._new(snapshot, found)

    def _new(self, snapshot: Snapshot, found: dict[str, str]) -> list[str]:
        lines = [
            f"warning at iteration {snapshot.iteration}: {text}"
            for condition, text in found.items()
            if condition not in self._said
        ]
        self._said |= found.keys()
        return lines

    def _another_carry(self) -> str:
        """The carries that can neither amplify nor let a segment vanish, where the run has not one of them."""
        return "--vwn-carry doubly-stochastic or identity, " if self._carry == "full" else ""


def _first(values: dict[Place, float], extreme) -> tuple[Place, float]:
    place = extreme(values, key=values.get)
    return place, values[place]


def _spoken(place: Place) -> str:
    where = f" of further prediction {place.depth}" if place.depth else ""
    return f"layer {place.number}{where}"
