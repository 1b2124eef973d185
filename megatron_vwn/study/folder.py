"""What a study keeps in its folder: one folder per run with its record, and who is at work there.

DIR/study.json                               title, order, counted FLOPs and parameters
DIR/<variant>/timing.json                    seconds per step, measured alone
DIR/<variant>/seed-<s>/run.json              flags, tokens per step, state; of every start hardware, versions, commit
DIR/<variant>/seed-<s>/{events,log.txt,checkpoints}
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_vwn.atomic import write_json
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.study.plan import Run, Study
from megatron_vwn.tracker import last_step

RECORD, TIMING, STUDY = "run.json", "timing.json", "study.json"
# What the values in these files are, where they are not null.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("title", "baseline", "command", "state", "said", "variant"), str),
    **dict.fromkeys(("seeds", "flags", "rounds", "starts"), list),
    **dict.fromkeys(("variants", "counted", "hardware", "versions", "commit", "data"), dict),
    **dict.fromkeys(("tokens_per_step", "seconds_per_step", "load_before", "seconds"), (int, float)),
    **dict.fromkeys(("m", "n", "ranks", "steps", "seed"), int),
}
# Killed ranks may need that long until they are gone.
_SECONDS_FOR_LOCK = 40


class RunFolder:
    """The folder of one run.

    Args:
        output: the study's folder.
        run: whose it is.
    """

    def __init__(self, output: Path, run: Run):
        self.run = run
        self.path = output / run.variant.name / f"seed-{run.seed}"
        self.log, self.checkpoints = self.path / "log.txt", self.path / "checkpoints"

    @property
    def record(self) -> dict:
        """What is known of the run; empty before its first start."""
        return read_json(self.path / RECORD)

    def write(self, **news: object) -> None:
        """Add to the record."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / RECORD, self.record | news)

    @property
    def done(self) -> bool:
        """Whether the run has ended as it should."""
        return self.record.get("state") == "done"

    @property
    def last_checkpoint(self) -> int:
        """Step of the last complete checkpoint, 0 without one."""
        return last_step(self.checkpoints)

    def check(self, ranks: int) -> None:
        """Refuse to go on with a run that was started with other flags or data.

        Raises:
            VirtualWidthError: they differ.
        """
        record = self.record
        if not record:
            return
        before, now = record.get("flags", []), self.run.arguments()
        if before != now or record.get("ranks") != ranks:
            what = _difference(before, now) or f"ranks {record.get('ranks')} before, {ranks} now"
            raise VirtualWidthError(
                f"{self.path} was started with other flags ({what}): delete that folder to train the run anew, or "
                "give another --output."
            )
        # Records that are older than this have no sizes.
        if "data" in record and record["data"] != (now := token_files(self.run)):
            raise VirtualWidthError(
                f"{self.path} was started with other data (bytes before: {record['data']}, now: {now}): delete that "
                "folder to train the run anew, or give another --output."
            )

    def arguments(self) -> list[str]:
        """The run's flags with its folders; it resumes from its own checkpoints."""
        words = [*self.run.arguments(), "--save", str(self.checkpoints), "--load", str(self.checkpoints)]
        words += ["--tensorboard-dir", str(self.path / "events")]
        return words + own_defaults(self.run, self.path)

    def finish(self, *, keep_checkpoints: bool) -> None:
        """Record that it is done; only then its checkpoints go."""
        self.write(state="done", finished=time.strftime("%Y-%m-%d %H:%M:%S"))
        self.clean(keep_checkpoints=keep_checkpoints)

    def clean(self, *, keep_checkpoints: bool) -> None:
        """Remove what a finished run does not need."""
        if not keep_checkpoints:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        shutil.rmtree(self.path / "index", ignore_errors=True)


def token_files(run: Run) -> dict[str, int]:
    """Bytes of a run's tokens, by prefix: data that is made anew under the same name has another size."""
    return {prefix: Path(f"{prefix}.bin").stat().st_size for prefix in run.variant.data_prefixes}


def own_defaults(run: Run, folder: Path) -> list[str]:
    """Flags that a study needs and its YAML leaves open."""
    given, words = run.variant.flags, []
    if "data-cache-path" not in given:
        # Of its own: runs that start together would write the same index at the same time.
        words += ["--data-cache-path", str(folder / "index")]
    if "save-interval" not in given:
        words += ["--save-interval", str(-(-run.variant.steps // 4))]
    if not given.get("log-timers-to-tensorboard"):
        words.append("--log-timers-to-tensorboard")
    return words


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    gone, new = ([word for word in these if word not in those] for these, those in ((before, now), (now, before)))
    parts = [f"{' '.join(words)} {when}" for words, when in ((gone, "before"), (new, "now")) if words]
    return ", ".join(parts)


@contextmanager
def locked(output: Path) -> Iterator[int]:
    """Keep other studies out of a folder; children that inherit the yielded descriptor keep them out as well.

    Raises:
        VirtualWidthError: another study, or what a killed one left running, is at work there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise VirtualWidthError(f"{output} cannot be written ({error.strerror}): give another --output.") from None
    try:
        deadline = time.monotonic() + _SECONDS_FOR_LOCK
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise VirtualWidthError(
                        f"another vwn-study, or a training that it started, is at work in {output}: wait for it, or "
                        "give another --output."
                    ) from None
                time.sleep(0.5)
        yield descriptor
    finally:
        os.close(descriptor)


def write_study(output: Path, study: Study, **more: object) -> None:
    """Record order, baseline and what was counted, for the report."""
    variants = {variant.name: variant.arguments() for variant in study.variants}
    content = {"title": study.title, "baseline": study.baseline, "seeds": study.seeds, "variants": variants}
    write_json(output / STUDY, read_json(output / STUDY) | content | more)


def foreign(folder: Path, written: Collection[str]) -> Path | None:
    """What a folder holds that is no file of these names; None also where there is no folder."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((path for path in paths if path.is_dir() or path.name not in written), None)


def read_json(path: Path) -> dict:
    """A JSON object of a study; empty where there is no file.

    Raises:
        VirtualWidthError: it cannot be read, or has a value of another kind than was written.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise VirtualWidthError(f"{path} cannot be read ({error}): delete it.") from None
    if not isinstance(content, dict):
        raise VirtualWidthError(f"{path} holds no JSON object: delete it.")
    for key, value in content.items():
        if value is not None and not isinstance(value, _KINDS.get(key, object)):
            raise VirtualWidthError(f"{path} has {key}: {value!r}, which vwn-study did not write: delete it.")
    return content
