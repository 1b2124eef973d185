"""Folders that a run writes to or reads from, looked at before it starts.

Megatron makes them when it needs them: a file in the way, or a folder that must not be written to, would end a run at
its first checkpoint.
"""

import argparse
import os
from pathlib import Path

from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_vwn.config import VirtualWidthError

_WRITTEN = ("save", "non_persistent_global_ckpt_dir", "logits_save_dir")
# By the last rank alone, or only where a data set has no index yet; other nodes need no more than a folder there.
_WRITTEN_ELSEWHERE = ("tensorboard_dir", "wandb_save_dir", "data_cache_path")
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


def first_that_exists(path: Path) -> Path:
    """The path itself, or what would hold it."""
    path = Path(os.path.abspath(path))
    return next(each for each in (path, *path.parents) if os.path.lexists(each))
