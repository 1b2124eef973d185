"""How fast connections are: predictions of the kernels that ``vwn-benchmark kernels --predict`` wrote for the planner.

For each kind of GPU, stream and pass of ``write_read`` the file has the share of the traffic floor that all kernels and
library operations of the pass reach together, and the time that does not depend on tokens (launches, small operations).
Between the streams of the file shares are interpolated. All of it is a model's prediction, not a measurement.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_vwn.atomic import write_json
from megatron_vwn.ops.costs import PASSES, Pass, Width, floor_seconds

# The row of a whole pass in a report, beside those of its kernels.
WHOLE = "all"
PATH = Path(__file__).with_name("kernel_times.json")


@dataclass(frozen=True)
class Speed:
    """Of one pass of a connection.

    Attributes:
        share: of the traffic floor.
        fixed: seconds of a call whatever its tokens.
        of: the streams that it was taken from, "(m, n) D".
    """

    share: float
    fixed: float
    of: tuple[str, ...]


def connection_seconds(gpu: str, direction: Pass, width: Width, tokens: float, *, bandwidth: float) -> float:
    """Predicted time of one pass of ``write_read``.

    Args:
        gpu: a kind that the file has.
        direction: which pass.
        width: the stream.
        tokens: of the call.
        bandwidth: of the GPU's memory by its data sheet, bytes per second.
    """
    found = speed(gpu, direction, width)
    floor = floor_seconds("write_read", direction, width, 1, bandwidth=bandwidth, flop_rate=math.inf)
    return tokens * floor / found.share + found.fixed


@cache
def speed(gpu: str, direction: Pass, width: Width) -> Speed:
    """What the file says of a stream; of another stream the mean of all, the nearer the heavier."""
    rows = [row for row in _content()["passes"] if row["gpu"] == gpu and row["pass"] == direction]
    near = sorted(rows, key=lambda row: _distance(row, width))
    if _distance(near[0], width) == 0:
        near = near[:1]
    weights = [max(_distance(row, width), 1e-6) ** -2 for row in near]

    def mean(name: str) -> float:
        return sum(weight * row[name] for weight, row in zip(weights, near, strict=True)) / sum(weights)

    return Speed(mean("share_of_floor"), mean("fixed_seconds"), tuple(_named(row) for row in near[:2]))


def gpus() -> list[str]:
    """Kinds of GPUs that the file has."""
    return sorted({row["gpu"] for row in _content()["passes"]})


def factors() -> dict[str, dict[str, float]]:
    """By kind of GPU and pass, the measured factors (``prediction.calibration``) that are in the file's times."""
    return _content().get("factors", {})


def source() -> str:
    """Where the predictions come from, in one line."""
    content = _content()
    commit = content["commit"] or {"hash": "unknown", "dirty": None}
    state = f"{commit['hash'][:12]}{' with changes' if commit['dirty'] else ''}"
    return f"kernels of commit {state} compiled by triton {content['versions']['triton']}; {content['calibration']}"


def taken_lines(gpu: str, width: Width) -> Iterator[str]:
    """What was taken of the file for a stream, for a plan to print."""
    found = {direction: speed(gpu, direction, width) for direction in PASSES}
    reached = ", ".join(
        f"{direction} {each.share:.0%} of the traffic floor and {1e6 * each.fixed:.0f} us a call"
        for direction, each in found.items()
    )
    this = f"({width.m}, {width.n}) D = {width.hidden_size}"
    near = found["forward"].of
    how = "" if near == (this,) else f", interpolated, mostly from {' and '.join(near)}"
    yield f"  Connections of {this} on an {gpu}{how}:"
    yield f"    {reached};"
    yield f"    a model's prediction, not measured: {source()}."


def write(report: Mapping, path: Path = PATH) -> None:
    """Keep what the planner needs of a report of ``vwn-benchmark kernels --predict``."""
    names = ("gpu", "m", "n", "hidden_size", "pass", "tokens", "seconds", "small_operations", "fixed_seconds")
    passes = []
    for result in report["results"]:
        if (result["op"], result["status"], result["kernel"]) != ("write_read", "predicted", WHOLE):
            continue
        share = result["floor_seconds"] / (result["seconds"] - result["fixed_seconds"])
        passes.append({**{name: result[name] for name in names}, "share_of_floor": round(share, 4)})
    kernels = [
        {name: result[name] for name in ("gpu", "m", "n", "hidden_size", "pass", "kernel", "limit", "share_of_traffic")}
        for result in report["results"]
        if result["status"] == "predicted" and result["kernel"] != WHOLE
    ]
    settings = report["settings"]
    head = {name: report[name] for name in ("date", "commit", "versions")}
    write_json(path, head | settings | {"passes": passes, "kernels": kernels})


@cache
def _content() -> dict:
    return json.loads(PATH.read_text())


def _distance(row: Mapping, width: Width) -> float:
    # n decides which kernels run, so it weighs most.
    apart = (2 * math.log2(row["n"] / width.n), math.log2(row["m"] / width.m))
    return math.hypot(*apart, math.log2(row["hidden_size"] / width.hidden_size) / 2)


def _named(row: Mapping) -> str:
    return f"({row['m']}, {row['n']}) D = {row['hidden_size']}"
