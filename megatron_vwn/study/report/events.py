"""Event files of one run, as Megatron writes them: curves, the arguments it was started with, and tokens of a step.

A folder may have what ``keep`` made of them instead: scalars in ``KEPT``, the rest in ``KEPT_FACTS``.
"""

import bisect
import csv
import logging
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.study.folder import RECORD, TIMING, read_json

VALIDATION, _TRAINING = "lm loss validation", "lm loss"
KEPT, KEPT_FACTS = "scalars.csv", "facts.json"
_CLOCK = "iteration-time"
EVENTS = "events.out.tfevents*"
# Megatron logs every argument as a text of this tag.
_TEXT = "/text_summary"
_SEED = re.compile(r"^(?:(.*?)[-_/])?s(?:eed[-_]?)?(\d+)$")
R_IN_NAME = re.compile(r"(?:^|[^A-Za-z0-9])r(\d+(?:\.\d+)?)(?![A-Za-z0-9.])")
_LENGTH_AND_CHECKSUM, _CHECKSUM = 12, 4

Curve = dict[int, float]


@dataclass
class LoggedRun:
    """One run as its files show it.

    Attributes:
        name: of its folder.
        variant: the name without the seed.
        seed: None where the name has none.
        scalars: tag to step to value.
        arguments: Megatron's, as text; empty where they were not logged.
        record: ``run.json`` of vwn-study; empty for other folders.
        timing: seconds per step measured alone, if they were.
        samples: step to samples consumed until then; empty where unknown.
        notes: what is wrong with the files.
    """

    name: str
    variant: str
    seed: int | None
    scalars: dict[str, Curve]
    arguments: dict[str, str] = field(default_factory=dict)
    record: dict = field(default_factory=dict)
    timing: dict = field(default_factory=dict)
    samples: Curve = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens of the last steps' global batch; None where nothing says it."""
        if self.record.get("tokens_per_step"):
            return float(self.record["tokens_per_step"])
        length, batch = (_number(self.arguments.get(key)) for key in ("seq_length", "global_batch_size"))
        if length and self.samples:
            steps = sorted(self.samples)[-2:]
            if len(steps) == 2:
                return length * (self.samples[steps[1]] - self.samples[steps[0]]) / (steps[1] - steps[0])
        return length * batch if length and batch else None

    def tokens(self, steps: np.ndarray) -> np.ndarray | None:
        """Tokens trained on until each step; None where that is unknown. Batches that grow are followed."""
        length = _number(self.arguments.get("seq_length"))
        if length and self.samples:
            known = sorted(self.samples)
            # Steps behind the last that was logged (--tensorboard-log-interval) go on as it did.
            behind = np.maximum(steps - known[-1], 0) * (self.tokens_per_step or 0)
            return length * np.interp(steps, [0, *known], [0, *(self.samples[step] for step in known)]) + behind
        return None if self.tokens_per_step is None else steps * self.tokens_per_step

    @property
    def width(self) -> tuple[int, int] | None:
        """(m, n); None without a virtual width, or where it is not known."""
        m, n = (self.record.get(key) or _number(self.arguments.get(f"vwn_{key}")) for key in ("m", "n"))
        return (int(m), int(n)) if m and n else None

    @property
    def r(self) -> float | None:
        """n/m, 1 without a virtual width; None where neither the files nor the name say it."""
        if self.width:
            return self.width[1] / self.width[0]
        if self.record or "vwn_m" in self.arguments:
            return 1.0
        found = R_IN_NAME.search(self.variant)
        return float(found[1]) if found else None

    @property
    def timed_otherwise(self) -> bool:
        """Whether ``timing`` is of other flags than the run's."""
        timed, flags = self.timing.get("flags"), self.record.get("flags")
        if timed is None or flags is None:
            return False
        return timed != (flags[:-2] if flags[-2:-1] == ["--seed"] else flags)

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the run's own clock, which runs beside it may have slowed down."""
        times = list(self.scalars.get(_CLOCK, {}).values())
        return float(np.median(times)) if times else None


def find_runs(folders: list[Path]) -> list[LoggedRun]:
    """Read every folder with event files below the given ones.

    Raises:
        VirtualWidthError: a folder that is not there, or none has event files.
    """
    paths: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise VirtualWidthError(f"{folder} is no folder: give folders with event files of Megatron.")
        files = [*folder.rglob(EVENTS), *folder.rglob(KEPT)]
        found = {path.parent for path in files if not _hidden(path.relative_to(folder))}
        if not found:
            raise VirtualWidthError(f"{folder} holds no event files: give the folder of a run's --tensorboard-dir.")
        paths |= dict.fromkeys(sorted(path.resolve() for path in found))
    above = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    names = {path: _name(path, above) for path in paths}
    seen: dict[tuple[str, int | None], Path] = {}
    for path, name in names.items():
        if (other := seen.setdefault(split_seed(name), path)) != path:
            raise VirtualWidthError(f"{other} and {path} would both be {name}: rename one, or give one of them.")
    return [_read_run(path, name) for path, name in names.items()]


def read_scalars(folder: Path) -> dict[str, Curve]:
    """All scalars of a folder, by tag; a step that was logged twice has its last value."""
    return {tag: dict(_pairs(logged)) for tag, logged in _logged(_accumulate(folder)).items()}


def split_seed(name: str) -> tuple[str, int | None]:
    """A run's variant and seed: base/seed-3, base-seed-3, base-s3 and base_seed3 are seed 3 of base."""
    found = _SEED.match(name)
    return (found[1] or "run", int(found[2])) if found else (name, None)


def _name(path: Path, folder: Path) -> str:
    parts = list(path.relative_to(folder).parts)
    if parts and parts[-1] in ("events", "tensorboard", "tb"):
        parts.pop()
    return "/".join(parts) or (folder.parent.name if folder.name == "events" else folder.name)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_run(path: Path, name: str) -> LoggedRun:
    if (path / KEPT).exists():
        return _read_kept(path, name)
    events = _accumulate(path)
    logged, arguments = _logged(events), _arguments(events)
    sets = _validation_sets(logged)
    if sets and VALIDATION not in logged:
        logged[VALIDATION] = logged[sets[0]]
    trained = sorted(event.wall_time for event in logged.get(_TRAINING, ()))
    logged |= {tag: _regular(each, trained) for tag, each in logged.items() if tag.endswith(" validation")}
    scalars = {tag: _pairs(each) for tag, each in logged.items()}
    variant, seed = split_seed(name)
    root = path.parent if path.name == "events" else path
    run = LoggedRun(
        name,
        variant,
        seed,
        {tag: dict(pairs) for tag, pairs in scalars.items()},
        arguments=arguments,
        record=read_json(root / RECORD),
        timing=read_json(root.parent / TIMING),
        samples=_samples(scalars),
    )
    for file in sorted(path.glob(EVENTS)):
        if surplus := _bytes_after_last_record(file):
            run.notes.append(
                f"{name}: {file.name} is cut in its last record ({surplus} bytes); what is before it is used."
            )
    if len(sets) > 1:
        first = sets[0].removeprefix(f"{VALIDATION}-")
        run.notes.append(f"{name}: several validation sets; the first, {first}, is compared.")
    if not run.scalars:
        run.notes.append(f"{name}: its event files hold no scalars; it is left out.")
    return run


def _read_kept(path: Path, name: str) -> LoggedRun:
    """A run that ``keep`` wrote; values are event files' own, which are fp32.

    Raises:
        VirtualWidthError: files that ``keep`` did not write.
    """
    scalars: dict[str, Curve] = defaultdict(dict)
    try:
        with (path / KEPT).open(newline="") as file:
            for row in csv.DictReader(file, strict=True):
                scalars[row["tag"]][int(row["step"])] = float(np.float32(row["value"]))
        facts = read_json(path / KEPT_FACTS)
        samples = {int(step): float(count) for step, count in facts["samples"]}
        arguments, notes = dict(facts["arguments"]), list(facts["notes"])
        if facts["seconds_per_step"] is not None:
            scalars[_CLOCK] = {0: float(facts["seconds_per_step"])}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise VirtualWidthError(
            f"{path} holds no run as vwn-study keep writes it ({type(error).__name__}: {error}): make it again."
        ) from None
    variant, seed = split_seed(name)
    record, timing = read_json(path / RECORD), read_json(path.parent / TIMING)
    return LoggedRun(name, variant, seed, dict(scalars), arguments, record, timing, samples, notes)


def _accumulate(folder: Path) -> EventAccumulator:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    # Nothing is purged where a resumed run repeats steps: the last value is taken below.
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()


def _logged(events: EventAccumulator) -> dict[str, list[ScalarEvent]]:
    """By tag, in the order of writing."""
    return {tag: sorted(events.Scalars(tag), key=lambda event: event.wall_time) for tag in events.Tags()["scalars"]}


def _pairs(logged: Sequence[ScalarEvent]) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in logged]


def _validation_sets(logged: dict[str, list[ScalarEvent]]) -> list[str]:
    """With --multiple-validation-sets a tag ends in the set's name or number; the first that was validated is first."""
    several = [tag for tag in logged if tag.startswith(f"{VALIDATION}-") and not tag.endswith(" vs samples")]
    return sorted(several, key=lambda tag: logged[tag][0].wall_time)


def _regular(validations: Sequence[ScalarEvent], trained: Sequence[float]) -> list[ScalarEvent]:
    """Without those that follow another of the same step with no training in between.

    At the end of every start Megatron validates once more on further samples, and then on the test set, under the same
    tag and step. A resumed run that repeats a step has trained before it.
    """
    kept: list[ScalarEvent] = []
    for event in validations:
        if kept and event.step == kept[-1].step:
            before, until = (bisect.bisect_right(trained, each.wall_time) for each in (kept[-1], event))
            if before == until:
                continue
        kept.append(event)
    return kept


def _samples(scalars: dict[str, list[tuple[int, float]]]) -> Curve:
    """Megatron logs the same values again under the number of samples instead of the step."""
    for tag in ("learning-rate", "lm loss", "batch-size"):
        steps, samples = scalars.get(tag, []), scalars.get(f"{tag} vs samples", [])
        if steps and len(steps) == len(samples):
            return {step: float(count) for (step, _), (count, _) in zip(steps, samples, strict=True)}
    return {}


def _arguments(events: EventAccumulator) -> dict[str, str]:
    tags = [tag for tag in events.Tags()["tensors"] if tag.endswith(_TEXT)]
    texts = {tag.removesuffix(_TEXT): events.Tensors(tag)[-1].tensor_proto.string_val for tag in tags}
    return {name: text[0].decode(errors="replace") for name, text in texts.items() if text}


def _number(text: object) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _bytes_after_last_record(file: Path) -> int:
    """Of a file of length-prefixed records; 0 where the last record is whole."""
    size = file.stat().st_size
    return size - max(_ends(file, size), default=0)


def _ends(file: Path, size: int) -> Iterator[int]:
    with file.open("rb") as stream:
        end = 0
        while end + _LENGTH_AND_CHECKSUM <= size:
            stream.seek(end)
            (length,) = struct.unpack("<Q", stream.read(8))
            end += _LENGTH_AND_CHECKSUM + length + _CHECKSUM
            if end > size:
                return
            yield end
