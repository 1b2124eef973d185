"""The comparison of two runs; every number comes from their event files and checkpoints."""

import math
import re
import statistics
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vwn.tracker import last_step

VALIDATION_LOSS = "lm loss validation"
SECONDS_PER_STEP = "iteration-time"
# Megatron writes the losses of further tokens (MTP) at every step of training and never at a validation. One step's
# batch says little: the table has a mean.
_FURTHER_LOSS = re.compile(r"mtp_\d+ loss")
LAST_STEPS = 20
# A run with experts has two optimizers, chained_0 and chained_1.
_NOT_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state")


def read_events(folder: Path) -> EventAccumulator:
    """All event files of a run."""
    events = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0})
    return events.Reload()


def read_scalar(folder: Path, tag: str) -> dict[int, float]:
    """A curve of a run from its event files: step to value; a step that was logged twice has its last value."""
    events = read_events(folder)
    return {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}


def last_further_losses(folder: Path) -> dict[str, float]:
    """Mean over the last steps of training of each further token's loss, by tag; empty without MTP."""
    tags = filter(_FURTHER_LOSS.fullmatch, read_events(folder).Tags()["scalars"])
    curves = {tag: read_scalar(folder, tag) for tag in sorted(tags)}
    return {tag: statistics.fmean(curve[step] for step in sorted(curve)[-LAST_STEPS:]) for tag, curve in curves.items()}


def count_parameters(folder: Path) -> int:
    """Parameters of the model in the last checkpoint, each counted once however many ranks hold it."""
    checkpoints = folder / "checkpoints"
    step = last_step(checkpoints)
    stored = FileSystemReader(checkpoints / f"iter_{step:07d}").read_metadata().state_dict_metadata
    return sum(
        math.prod(entry.size)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not _NOT_THE_MODEL.match(name)
    )


def step_of_loss(curve: dict[int, float], loss: float) -> float | None:
    """Where a curve first falls to ``loss``, interpolated between validations; None if it does not."""
    before = None
    for step, value in sorted(curve.items()):
        if value <= loss:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = step, value
    return None


def summarise(
    baseline: Path, wide: Path, virtual_width: str, tokens_per_step: int, bits_per_byte: tuple[float, float]
) -> str:
    """The closing table."""
    curves = [read_scalar(folder, VALIDATION_LOSS) for folder in (baseline, wide)]
    final = [curve[max(curve)] for curve in curves]
    tokens = max(curves[0]) * tokens_per_step
    reached = step_of_loss(curves[1], final[0])
    needed = "not reached" if reached is None else f"{reached * tokens_per_step:,.0f}"
    seconds = [statistics.median(read_scalar(folder, SECONDS_PER_STEP).values()) for folder in (baseline, wide)]
    further = [last_further_losses(folder) for folder in (baseline, wide)]
    parameters = [count_parameters(folder) for folder in (baseline, wide)]
    rows = [
        ("", "baseline", virtual_width),
        ("final validation loss", f"{final[0]:.4f}", f"{final[1]:.4f}"),
        ("held-out bits per byte", *(f"{bits:.4f}" for bits in bits_per_byte)),
        *((f"{tag} in training", f"{loss:.4f}", f"{further[1][tag]:.4f}") for tag, loss in further[0].items()),
        ("tokens to the baseline's final loss", f"{tokens:,}", needed),
        ("time per step (median)", f"{seconds[0] * 1e3:.0f} ms", f"{seconds[1] * 1e3:.0f} ms"),
        ("parameters", f"{parameters[0]:,}", f"{parameters[1]:,}"),
        ("  of these the virtual width's", "", f"{parameters[1] - parameters[0]:,}"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    lines = ["", lines[0], "-" * len(lines[0]), *lines[1:], ""]
    if further[0]:
        tags = " and ".join(further[0])
        lines += [f"{tags}: mean over the last {LAST_STEPS} steps; Megatron validates the next token only.", ""]
    return "\n".join(lines)
