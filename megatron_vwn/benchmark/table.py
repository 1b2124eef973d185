"""``vwn-benchmark table``: what r costs, as the Markdown table of benchmark/README.md.

Floors follow from ``ops.costs`` and stated rates, predictions of the kernels from the planner's file of them; measured
figures come from committed results and nowhere else.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vwn.benchmark.report import RESULTS, SCHEMA
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.ops import costs
from megatron_vwn.ops.costs import PASSES, Width
from megatron_vwn.planner import kernel_times
from megatron_vwn.planner.hardware import HARDWARE

PAIRS = ((2, 3), (4, 16), (1, 8), (4, 32), (8, 64))
# The README has the table between this line and the next blank line after the table.
MARKER = "<!-- what-r-costs -->"


@dataclass(frozen=True)
class Rates:
    """What predictions assume, all of it printed with them.

    Attributes:
        bandwidth: bytes per second.
        flop_rate: FLOPs per second of the matrix unit.
        baseline_flop_rate: FLOPs per second that the ordinary model achieves.
        active_parameters: of one layer.
        hidden_size: D.
        tokens: of one call.
        gpu: whose predicted kernels are taken.
    """

    bandwidth: float = 1e9 * HARDWARE["h200"].memory_gbs
    flop_rate: float = 1e12 * HARDWARE["h200"].matrix_tflops
    baseline_flop_rate: float = 400e12
    active_parameters: float = 56.6e6
    hidden_size: int = 2048
    tokens: int = 8192
    gpu: str = "h200"


def markdown(rates: Rates, folder: Path = RESULTS, pairs: Sequence[tuple[int, int]] = PAIRS) -> str:
    """Marker, assumptions and table.

    Args:
        rates: see ``Rates``.
        folder: where committed results lie.
        pairs: (m, n) of each row.
    """
    measured = _measured(folder, rates)
    lines = [
        MARKER,
        f"For bf16 at D = {rates.hidden_size}, {rates.tokens} tokens, {rates.bandwidth / 1e12:g} TB/s and "
        f"{rates.flop_rate / 1e12:g} TFLOP/s; a layer is two connections beside {rates.active_parameters / 1e6:g}M "
        f"active parameters at {rates.baseline_flop_rate / 1e12:g} TFLOP/s. Floors follow from these datasheet rates. "
        f"Predicted is what a MODEL of an {rates.gpu} says of the compiled kernels, all that is around them included, "
        f"to be read as +-1.5 times: {kernel_times.source()}.",
        "",
        "| (m, n) | r | MB per connection, forward + backward | GFLOP | decided by | floor of a connection, ms "
        "| predicted, ms (% of the floor) | floor over a layer | predicted over a layer | measured |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m, n in pairs:
        width = Width(m, n, rates.hidden_size)
        moved = sum(costs.elements("write_read", direction, width) for direction in PASSES) * 2 * rates.tokens
        flops = sum(costs.matrix_flops("write_read", direction, width) for direction in PASSES) * rates.tokens
        speeds = {"bandwidth": rates.bandwidth, "flop_rate": rates.flop_rate}
        floor = costs.layer_floor_seconds(width, rates.tokens, connections=1, **speeds)
        predicted = sum(
            kernel_times.connection_seconds(rates.gpu, direction, width, rates.tokens, bandwidth=rates.bandwidth)
            for direction in PASSES
        )
        layer = 6 * rates.active_parameters * rates.tokens / rates.baseline_flop_rate / costs.CONNECTIONS_PER_LAYER
        decided = "traffic" if moved / rates.bandwidth >= flops / rates.flop_rate else "products"
        lines.append(
            f"| ({m}, {n}) | {width.expansion:g} | {moved / 1e6:.0f} | {flops / 1e9:.0f} | {decided} "
            f"| {1e3 * floor:.3f} | {1e3 * predicted:.3f} ({100 * floor / predicted:.0f} %) "
            f"| {100 * floor / layer:.1f} % | {100 * predicted / layer:.0f} % | {measured.get((m, n), 'no GPU yet')} |"
        )
    return "\n".join(lines) + "\n"


def section(readme: str) -> str | None:
    """The table that a README holds, as ``markdown`` prints it; None if it has no marker."""
    if MARKER not in readme:
        return None
    lines = readme[readme.index(MARKER) :].splitlines()
    last = max(i for i, line in enumerate(lines[: len(PAIRS) + 6]) if line.startswith("|"))
    return "\n".join(lines[: last + 1]) + "\n"


def _measured(folder: Path, rates: Rates) -> dict[tuple[int, int], str]:
    """Milliseconds of forward plus backward of write_read by the kernels, and the device, per pair."""
    found: dict[tuple[int, int], dict[str, str]] = {}
    for path in sorted(folder.glob("*.json")):
        content = _load(path)
        if content["mode"] != "kernels" or content["hardware"]["device"] != "cuda":
            continue
        for pair, seconds in _sums(content["results"], rates).items():
            found.setdefault(pair, {})[content["hardware"]["name"]] = f"{1e3 * seconds:.3f} ms"
    return {pair: ", ".join(f"{text} ({name})" for name, text in by.items()) for pair, by in found.items()}


def _sums(results: Iterable[dict], rates: Rates) -> dict[tuple[int, int], float]:
    passes: dict[tuple[int, int], dict[str, float]] = {}
    wanted = {"op": "write_read", "variant": "triton", "dtype": "bfloat16", "status": "measured"}
    wanted |= {"hidden_size": rates.hidden_size, "tokens": rates.tokens}
    for result in results:
        if all(result[key] == value for key, value in wanted.items()):
            passes.setdefault((result["m"], result["n"]), {})[result["pass"]] = result["seconds"]["median"]
    return {pair: sum(by.values()) for pair, by in passes.items() if set(by) == set(PASSES)}


def _load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        if content["program"] != "vwn-benchmark" or content["schema"] != SCHEMA:
            raise KeyError
    except (ValueError, KeyError, TypeError, OSError):
        raise VirtualWidthError(f"{path} is no result of this version of vwn-benchmark: remove or repeat it.") from None
    return content
