"""``vwn-benchmark results FILE``: what ``tests/gpu/run.sh`` brought home, as Markdown tables.

With ``--commit-results`` its measurements go where ``vwn-benchmark table`` finds them, and how far they are from the
predictions goes where ``vwn-benchmark kernels --predict`` takes it from.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_vwn.atomic import write_json
from megatron_vwn.benchmark import report
from megatron_vwn.benchmark.prediction import calibration
from megatron_vwn.benchmark.prediction.model import GPUS
from megatron_vwn.config import VirtualWidthError

GPU_HOUR = "vwn gpu hour"
# Of tests/gpu/steps.py.
KERNELS, TUNED = "kernels", "kernels, tuned"


def read(path: Path) -> dict:
    """The content of a file of the GPU hour.

    Raises:
        VirtualWidthError: it is none.
    """
    try:
        content = json.loads(path.read_text())
        if content["program"] != GPU_HOUR or content["schema"] != 1:
            raise KeyError
        return content
    except OSError as error:
        raise VirtualWidthError(f"{path} cannot be read ({error.strerror}): give a results.json.") from None
    except (ValueError, KeyError, TypeError):
        raise VirtualWidthError(
            f"{path} was not written by tests/gpu/run.sh of this version: give its results.json."
        ) from None


def markdown(content: Mapping) -> str:
    """All tables."""
    parts = [_head(content), _steps(content), _kernels(content), _steps_of_models(content), _training(content)]
    return "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines) + "\n"


def commit(content: Mapping, folder: Path = report.RESULTS, factors: Path = calibration.PATH) -> list[Path]:
    """Write the measurements and the factors into the package.

    Args:
        content: see ``read``.
        folder: of committed results.
        factors: the file of ``calibration``.

    Returns:
        The files written.

    Raises:
        VirtualWidthError: nothing was measured on a GPU.
    """
    measured = {name: result for name, result in _results(content).items() if _on_a_gpu(result)}
    # Of the steps that time kernels the first, with default tiles, is what a table shows and a prediction predicts.
    measured = {name: result for name, result in measured.items() if result["mode"] != "kernels" or name == KERNELS}
    if content["rehearsed"] or not measured:
        raise VirtualWidthError("nothing in this file was measured on a GPU: there is nothing to commit.")
    written = []
    for name, result in measured.items():
        path = folder / report.file_name(f"{result['hardware']['name']} {name}")
        write_json(path, result)
        written.append(path)
    gpu = kind(content)
    if gpu and KERNELS in measured:
        found = calibration.factors_of(measured[KERNELS]["results"], gpu)
        calibration.write(gpu, found, measured[KERNELS]["hardware"]["name"], content["date"], factors)
        written.append(factors)
    return written


def kind(content: Mapping) -> str | None:
    """The kind of GPU, as predictions name it; None for another one."""
    name = (_results(content).get("environment") or {}).get("hardware", {}).get("name", "")
    return next((gpu for gpu in GPUS if gpu in name.lower()), None)


def _results(content: Mapping) -> dict[str, dict]:
    """Results of steps by name; one that was too large, or was not read, is left out."""
    return {step["name"]: step["result"] for step in content["steps"] if isinstance(step.get("result"), dict)}


def _on_a_gpu(result: Mapping) -> bool:
    return result.get("program") == "vwn-benchmark" and result["hardware"]["device"] == "cuda"


def _head(content: Mapping) -> Iterator[str]:
    environment = _results(content).get("environment")
    if environment is None:
        return
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    commit = environment["commit"] or {"hash": "unknown", "dirty": None}
    state = f"{commit['hash'][:12]}{' with changes' if commit['dirty'] else ''}"
    rehearsed = " A REHEARSAL on a CPU: no figure here is one of a GPU." if content["rehearsed"] else ""
    yield f"{environment['hardware']['name']}, {versions}, commit {state}, {content['date']}.{rehearsed}"


def _steps(content: Mapping) -> Iterator[str]:
    yield "| step | state | s | what it says |"
    yield "|---|---|---:|---|"
    for step in content["steps"]:
        said = step.get("said", "").replace("|", "\\|")
        yield f"| {step['name']} | {step['state']} | {step['seconds']:.0f} | {said} |"


def _kernels(content: Mapping) -> Iterator[str]:
    """Kernels against their floor and their prediction."""
    gpu, found = kind(content), _results(content)
    rows = []
    for name in (KERNELS, TUNED):
        for row in found.get(name, {}).get("results", ()):
            if row["status"] != "measured":
                continue
            seconds, predicted = row["seconds"]["median"], ""
            if gpu and calibration.comparable(row):
                modelled = calibration.modelled_seconds(row, gpu)
                predicted = f"{1e6 * modelled:.0f} ({seconds / modelled:.2f})"
            variant = f"{row['variant']}{', tuned' if name == TUNED else ''}"
            rows.append(
                f"| ({row['m']}, {row['n']}) | {row['pass']} | {variant} | {1e6 * seconds:.0f} "
                f"| {100 * row['share_of_floor']:.0f} | {predicted} |"
            )
    if rows:
        yield "| (m, n) | pass of write_read | variant | us | % of floor | predicted, us (measured over it) |"
        yield "|---|---|---|---:|---:|---:|"
        yield from rows


def _steps_of_models(content: Mapping) -> Iterator[str]:
    rows = []
    for name, result in _results(content).items():
        if not name.startswith("layer"):
            continue
        for row in result["results"]:
            if row["status"] != "measured":
                rows.append(f"| {name} | {row['variant']} | {row['status']} | | |")
                continue
            over = f"{row['overhead']:+.1%}" if "overhead" in row else ""
            peak = f"{row['peak_bytes'] / 2**20:.0f}"
            rows.append(f"| {name} | {row['variant']} | {1e3 * row['seconds']['median']:.3f} | {over} | {peak} |")
    if rows:
        yield "| step | variant | ms | over the baseline | peak, MiB |"
        yield "|---|---|---:|---:|---:|"
        yield from rows


def _training(content: Mapping) -> Iterator[str]:
    found = _results(content)
    runs = {name: result for name, result in found.items() if name.startswith("training")}
    if not runs:
        return
    yield "| training | steps | ms a step | first loss | last loss | peak, GB |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, run in runs.items():
        first, last = run["losses"][0], run["losses"][-1]
        yield (
            f"| {name.partition(', ')[2]} | {len(run['losses'])} | {run['milliseconds']:.1f} | {first:.4f} "
            f"| {last:.4f} | {run['peak_mb'] / 1000:.2f} |"
        )
    memory = found.get("memory against vwn-plan")
    if memory and memory["measured_mb"]:
        yield ""
        predicted, peak = (f"{memory[key] / 1000:.2f} GB" for key in ("predicted_mb", "measured_mb"))
        yield f"vwn-plan predicts {predicted}; measured {peak}."
