"""Which checkpoint of a ``--save`` folder is the last: what Megatron's tracker says, or what lies beside it.

The tracker is a file of a few bytes with the step of the last checkpoint, or with ``release``. A run that is killed
while it is written, or a full disk, leaves an empty one beside whole checkpoints; they are met with the newest of them.
"""

import re
from pathlib import Path

from megatron_vwn.config import VirtualWidthError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
# Megatron keeps a step in 64 bits.
_NAMED = re.compile(rf"[0-9]{{1,18}}|{RELEASE}")
_STEP = re.compile(r"iter_\d{7,}")


def tracked(folder: Path) -> str | None:
    """What the tracker says, a number or ``release``; None where it is missing or empty.

    Raises:
        VirtualWidthError: it says something else, or may not be read.
    """
    try:
        # A machine that lost its power may leave zeros in place of text.
        said = (folder / TRACKER).read_text(errors="replace").strip("\0 \t\r\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise VirtualWidthError(f"{folder / TRACKER} cannot be read ({error.strerror}): make it readable.") from None
    if said and not _NAMED.fullmatch(said):
        raise VirtualWidthError(
            f"{folder / TRACKER} cannot be read (it names no checkpoint but {said[:40]!r}): write the step of a "
            "checkpoint beside it into it."
        )
    return said or None


def whole_steps(folder: Path) -> list[int]:
    """Steps of the torch_dist checkpoints that were written to their end, the newest last.

    Megatron writes metadata.json when everything else is there.
    """
    return sorted(
        int(path.name.removeprefix("iter_"))
        for path in steps_begun(folder)
        if (path / "metadata.json").is_file() and (path / ".metadata").is_file()
    )


def steps_begun(folder: Path) -> list[Path]:
    """The folders of all checkpoints, whole or not, but for a release."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]


def last_step(folder: Path) -> int:
    """Step of the last checkpoint; 0 without one, and for a release.

    Raises:
        VirtualWidthError: the tracker cannot be read.
    """
    said = tracked(folder)
    if said is None:
        return max(whole_steps(folder), default=0)
    return 0 if said == RELEASE else int(said)
