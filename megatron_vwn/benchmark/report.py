"""The table that a benchmark prints and the file that it writes."""

import os
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from megatron_vwn.config import VirtualWidthError

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


def report(mode: str, device, arguments: Sequence[str], settings: dict, results: list[dict], *, commit: str | None):
    """Everything that the file says.

    Args:
        mode: the subcommand.
        device: torch's.
        arguments: the command line.
        settings: what applies to all results, such as measured rates.
        results: one dictionary per row: what was run, ``status`` (measured, predicted, missing, disagrees or failed),
            ``reason`` unless measured, ``seconds`` if measured.
        commit: see ``machine.commit``.
    """
    from megatron_vwn.benchmark import machine  # which imports torch

    return {
        "program": "vwn-benchmark",
        "schema": SCHEMA,
        "mode": mode,
        "arguments": list(arguments),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": machine.hardware(device),
        "versions": machine.versions(),
        "commit": machine.commit(commit),
        "settings": settings,
        "results": results,
    }


def choose_path(output: Path | None, mode: str, device, *, committed: bool, overwrite: bool) -> Path:
    """Where the file goes; refused before anything is measured.

    Args:
        output: what the user typed.
        mode: the subcommand.
        device: torch's, for the name; None if the machine does not matter.
        committed: whether the file belongs among those of the repository.
        overwrite: whether an existing file may be replaced.
    """
    from megatron_vwn.benchmark import machine

    words = mode if device is None else f"{mode} {machine.device_name(device)}"
    name = file_name(words)
    path = output or (RESULTS / name if committed else Path("results") / name)
    if path.is_dir():
        raise VirtualWidthError(f"--output {path} is a folder: give the path of a file.")
    if path.exists() and not overwrite:
        raise VirtualWidthError(f"{path} exists: choose another --output or add --overwrite.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VirtualWidthError(f"--output {path} cannot be written ({error.strerror}): choose another.") from error
    if not os.access(path.parent, os.W_OK):
        raise VirtualWidthError(f"--output {path} cannot be written: choose a folder that can.")
    return path


def file_name(words: str) -> str:
    """The name of a JSON file about something."""
    return f"{re.sub('[^a-z0-9_]+', '-', words.lower()).strip('-')}.json"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned: the first ones to the left, those that hold numbers to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(re.match(r"[-+]?\d|$", row[i]) for row in cells[1:]) for i in range(len(header))]
    lines = [
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def milliseconds(seconds: dict | None) -> list[str]:
    """Median and the two deciles of a result, or blanks."""
    if seconds is None:
        return ["", ""]
    median, low, high = (f"{1e3 * seconds[key]:.3f}" for key in ("median", "low", "high"))
    return [median, f"{low} to {high}"]


def exit_code(results: list[dict]) -> int:
    """1 if a variant disagrees or failed; one that is missing is no error."""
    return int(any(result["status"] in ("disagrees", "failed") for result in results))
