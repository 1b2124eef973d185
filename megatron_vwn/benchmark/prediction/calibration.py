"""How far the model of ``--predict`` was from what a GPU measured: one factor for each kind of GPU and pass.

The file is written by ``vwn-benchmark results FILE --commit-results`` and is not there before a GPU ran.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_vwn.atomic import write_json
from megatron_vwn.ops.costs import PASSES, Pass, Width
from megatron_vwn.planner import kernel_times

PATH = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Factor:
    """Measured over modelled times of one pass of ``write_read``.

    Attributes:
        mean: geometric mean over the streams that were measured.
        low: the least of them.
        high: the largest.
        streams: how many.
    """

    mean: float
    low: float
    high: float
    streams: int


def factor(gpu: str, direction: Pass) -> Factor | None:
    """What was measured on a kind of GPU, or None."""
    found = _content().get(gpu, {}).get("factors", {}).get(direction)
    return Factor(**found) if found else None


def means(gpu: str) -> dict[Pass, float]:
    """The factors of a kind of GPU, by pass; empty if nothing was measured."""
    return {direction: found.mean for direction in PASSES if (found := factor(gpu, direction))}


def said(gpu: str) -> str:
    """One line about a kind of GPU: what it was calibrated with; "" if with nothing."""
    found = {direction: factor(gpu, direction) for direction in PASSES}
    content = _content().get(gpu)
    parts = [
        f"{direction} x {each.mean:.2f} ({each.low:.2f} to {each.high:.2f} over {each.streams} streams)"
        for direction, each in found.items()
        if each
    ]
    return f"{gpu}: calibrated on {content['hardware']}, {content['date']}: {', '.join(parts)}" if parts else ""


def factors_of(results: Iterable[Mapping], gpu: str) -> dict[Pass, Factor]:
    """Measured over modelled times, by pass.

    Args:
        results: rows of a report of ``vwn-benchmark kernels``; other operations, variants and dtypes are left out.
        gpu: kind of the GPU that measured them.
    """
    ratios: dict[Pass, list[float]] = {}
    for row in filter(comparable, results):
        ratios.setdefault(row["pass"], []).append(row["seconds"]["median"] / modelled_seconds(row, gpu))
    return {
        direction: Factor(math.exp(sum(map(math.log, each)) / len(each)), min(each), max(each), len(each))
        for direction, each in ratios.items()
    }


def comparable(row: Mapping) -> bool:
    """Whether a row of such a report was measured and is of what the model predicts."""
    wanted = {"op": "write_read", "variant": "triton", "dtype": "bfloat16", "status": "measured"}
    return all(row[key] == value for key, value in wanted.items())


def modelled_seconds(row: Mapping, gpu: str) -> float:
    """What the model itself, without any factor, says of a row's stream, pass and tokens."""
    from megatron_vwn.benchmark.prediction.model import GPUS

    width = Width(row["m"], row["n"], row["hidden_size"])
    predicted = kernel_times.connection_seconds(gpu, row["pass"], width, row["tokens"], bandwidth=GPUS[gpu].dram)
    return predicted / kernel_times.factors().get(gpu, {}).get(row["pass"], 1.0)


def write(gpu: str, factors: Mapping[Pass, Factor], hardware: str, date: str, path: Path = PATH) -> None:
    """Keep the factors of a kind of GPU; those of others stay.

    Args:
        gpu: the kind.
        factors: by pass.
        hardware: name of the GPU.
        date: of the measurement.
        path: of the file.
    """
    new = {direction: asdict(each) for direction, each in factors.items()}
    write_json(path, _content(path) | {gpu: {"hardware": hardware, "date": date, "factors": new}})


def _content(path: Path | None = None) -> dict:
    path = path or PATH
    return json.loads(path.read_text()) if path.exists() else {}
