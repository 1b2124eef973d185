"""One line per logged step: is the width used?

What is asked: of the room that the width adds, how much has the model filled? A fresh model's segments are copies of
the first m, so the room is the n - m segments that could be independent beside them. With an embedding as wide as the
stream they are independent from the first, whether anybody reads them or not: there it also takes coefficients that
have learned to, of which nothing has been learned at birth.
"""

import math

import torch

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.ops.parameters import initial_pattern
from megatron_vwn.training.monitoring.reference import at_birth
from megatron_vwn.training.monitoring.snapshot import ConnectionStatistics, Place, Snapshot

# Shares of that room, or of the coefficients' squares. Below a twentieth nothing is to be told from the noise of the
# first steps: the quickstart's r = 4 has 1.86 to 2.01 of 8 segments in its first 80 steps, 2 at birth. With a quarter a
# stream of r = 4 holds what one of r = 1.75 could, 3.5 of 8 segments. Choices, to be moved where experience says so.
BARELY, WELL = 0.05, 0.25


def verdict(snapshot: Snapshot, values: dict[str, dict[Place, float]], virtual_width: VirtualWidthConfig) -> str:
    """The line, without a prefix.

    Args:
        snapshot: of one step.
        values: ``per_connection`` of it.
        virtual_width: of the run.
    """
    trunk = snapshot.chains[0]
    independent, dynamic = (_mean(values[name], trunk) for name in ("independent_segments", "dynamic_share"))
    birth, n = at_birth(virtual_width, len(trunk)).get("independent_segments"), virtual_width.n
    said = f"step {snapshot.iteration}: {independent:.1f} of {n} independent segments"
    if n == virtual_width.m:
        used = None
    elif birth is None:
        m, learned = virtual_width.m, sum(map(_learned_share, trunk.values())) / len(trunk)
        used = min((independent - m) / (n - m), learned)
        said += f" (m = {m}; more at birth), {_percent(learned)} of the coefficients learned"
    else:
        used = (independent - birth) / (n - birth)
        said += f" ({birth:.1f} at birth)"
    said += f", dynamic share {_percent(dynamic)}" if virtual_width.dynamic else ""
    return f"{said}: {_judged(used, dynamic)}"


def _judged(used: float | None, dynamic: float) -> str:
    if used is None:
        return "there is no width beyond the backbone's"
    if not math.isfinite(used):
        return "the stream is not finite"
    if used >= WELL:
        return "the width is used"
    if used >= BARELY:
        return "the width is partly used"
    return "barely used yet" if dynamic < BARELY else "barely used yet, though coefficients depend on the token"


def _mean(of_place: dict[Place, float], trunk: dict[Place, ConnectionStatistics]) -> float:
    return sum(of_place[place] for place in trunk) / len(trunk)


def _percent(share: float) -> str:
    return "less than 1 %" if 0 < share < 0.005 else f"{share:.0%}".replace("%", " %")


def _learned_share(c: ConnectionStatistics) -> float:
    """Of the squares of a connection's coefficients, what they have moved from the initial pattern, 0 to 1."""
    pattern = initial_pattern(c.m, c.n, c.n, dtype=torch.float64, device="cpu")
    spread = c.spread.square().sum()
    moved = (c.mean - pattern).square().sum() + spread
    return (moved / (moved + pattern.square().sum())).item()
