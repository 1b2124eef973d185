"""Folders that a run writes to or reads from, looked at before it starts.

Megatron makes them when it needs them: a file in the way, or a folder that must not be written to, would end a run at
its first checkpoint.
"""

import argparse
import errno
import os
import re
import shutil
import traceback
from pathlib import Path

from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_vwn.config import VirtualWidthError

_WRITTEN = ("save", "non_persistent_global_ckpt_dir", "logits_save_dir")
# By the last rank alone, or only where a data set has no index yet; other nodes need no more than a folder there.
_WRITTEN_ELSEWHERE = ("tensorboard_dir", "wandb_save_dir", "data_cache_path")
_NO_ROOM = 64 * 2**20  # bytes; the writers of a node leave no more between them
_SAVING = re.compile(r", in (save_checkpoint|maybe_finalize_async)")  # the frame of a traceback
_READ = ("load", "pretrained_checkpoint")


def check_folders(args: argparse.Namespace) -> None:
    """Refuse a file where a folder must be, and a folder that cannot be written to.

    Args:
        args: Megatron's flags, parsed; they need not be validated.

    Raises:
        VirtualWidthError: the first fault.
    """
    for name in (*_WRITTEN, *_WRITTEN_ELSEWHERE, *_READ):
        path = getattr(args, name, None)
        if not path or is_object_storage_path(path):
            continue
        flag = f"--{name.replace('_', '-')}"
        there = first_that_exists(Path(path))
        if not there.is_dir():
            raise VirtualWidthError(f"{flag} is {path}, but {there} is a file: give a folder.")
        if name in _WRITTEN and not os.access(there, os.W_OK | os.X_OK):
            raise VirtualWidthError(f"{flag} is {path}, but nothing may be written to {there}: give another folder.")


def explain_full_disk(error: BaseException, folder: str | None) -> str | None:
    """One line about a checkpoint that found no room, for Megatron hides the cause in words of its own; else None.

    Args:
        error: what ended the training.
        folder: what ``--save`` names.
    """
    if folder is None or is_object_storage_path(folder):
        return None
    free = shutil.disk_usage(first_that_exists(Path(folder)))
    no_room = free.free < min(_NO_ROOM, free.total // 100)
    reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    text = "".join(traceback.format_exception(error))
    reason = next((reason for reason in reasons if reason in text), None)
    # A writer's process or thread hands on no more than the kind of the error; the disk is still as it left it.
    if reason is None and no_room:
        reason = reasons[0]
    # Another folder's disk may be full: that of the sample indices, say.
    if reason is None or not (no_room or _SAVING.search(text)):
        return None
    return (
        f"{reason}: {folder} cannot take the checkpoint ({free.free / 2**20:.1f} MiB are free): make room and start "
        "the same command again, which resumes from the last whole one"
    )


def first_that_exists(path: Path) -> Path:
    """The path itself, or what would hold it."""
    path = Path(os.path.abspath(path))
    return next(each for each in (path, *path.parents) if os.path.lexists(each))
