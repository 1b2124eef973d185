"""Megatron truncates the file that names the last checkpoint before it writes it, and gives up on an empty one."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.training import checkpointing

from megatron_vwn.tracker import RELEASE, TRACKER, tracked, whole_steps


def write_tracker_beside() -> None:
    """Let Megatron replace the tracker by a rename, and meet an empty or missing one with the newest whole checkpoint.

    Killed in between, Megatron left an empty file and never started again, whatever ``--ckpt-step`` said; without the
    file it started from the beginning and wrote over the checkpoints.
    """
    if not isinstance(checkpointing.maybe_msc, _Files):
        checkpointing.maybe_msc = _Files(checkpointing.maybe_msc)


class _Files:
    """Megatron's door to files, with trackers as described; those in an object storage are left to its client."""

    def __init__(self, stock: Any):
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        stock = getattr(self._stock, name)
        if MultiStorageClientFeature.is_enabled():
            return stock
        if name == "open":
            return lambda path, mode="r", *args, **kwargs: (
                _open_tracker(Path(path), mode) if _is_tracker(path) else stock(path, mode, *args, **kwargs)
            )
        if name == "os":
            return _Changed(os, path=_Changed(os.path, isfile=_is_file, exists=_exists))
        return stock


class _Changed:
    """A module with some names that mean something else."""

    def __init__(self, stock: Any, **changes: Any):
        self._stock = stock
        self.__dict__ |= changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


def _is_tracker(path: Any) -> bool:
    return os.path.basename(os.fspath(path)) == TRACKER


def _is_file(path: Any) -> bool:
    if not _is_tracker(path):
        return os.path.isfile(path)
    folder = Path(path).parent
    return tracked(folder) is not None or bool(whole_steps(folder))


def _exists(path: Any) -> bool:
    """Of a tracker: whether it names a step, whose checkpoint Megatron deletes with ``--save-retain-interval``."""
    return tracked(Path(path).parent) not in (None, RELEASE) if _is_tracker(path) else os.path.exists(path)


def _open_tracker(path: Path, mode: str) -> contextlib.AbstractContextManager[TextIO]:
    if mode == "w":
        return _written_beside(path)
    said = tracked(path.parent)
    return io.StringIO(str(max(whole_steps(path.parent), default="")) if said is None else said)


@contextlib.contextmanager
def _written_beside(path: Path) -> Iterator[TextIO]:
    beside = path.with_name(f".{path.name}.partial")  # rank 0 alone writes it; the next save replaces one left behind
    with beside.open("w") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
