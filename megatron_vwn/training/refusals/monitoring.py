"""Whether anybody would see what a run logs."""

import argparse
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.training.refusals.folders import first_that_exists

_FIRST_EVENTS = 1 << 18  # bytes: Megatron's arguments and the first steps


def check_monitoring(args: argparse.Namespace, virtual_width: VirtualWidthConfig | None) -> None:
    """Refuse monitoring that nobody would see.

    Raises:
        VirtualWidthError: --vwn-log-interval without a writer.
    """
    if virtual_width is None or virtual_width.log_interval is None:
        return
    if not args.tensorboard_dir and not args.wandb_project:
        raise VirtualWidthError(
            "--vwn-log-interval has nowhere to write: add --tensorboard-dir or --wandb-project, or drop it."
        )
    if not args.wandb_project and find_spec("tensorboard") is None:
        raise VirtualWidthError("--vwn-log-interval needs the package tensorboard: install it, or drop the flag.")


def check_event_folder(args: argparse.Namespace) -> None:
    """Refuse a --tensorboard-dir that cannot be written to, on the node of the last rank, which writes it.

    Permissions do not tell of a full or a read-only disk, so that some bytes are written, to the folder or to what
    would hold it, in a file without a name.

    Raises:
        VirtualWidthError: nothing can be written.
    """
    last_of_node = int(os.environ.get("RANK", "0")) + int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1
    path = args.tensorboard_dir
    if not path or is_object_storage_path(path) or last_of_node < int(os.environ.get("WORLD_SIZE", "1")) - 1:
        return
    folder = first_that_exists(Path(path))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_FIRST_EVENTS))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise VirtualWidthError(
            f"--tensorboard-dir is {path}, but nothing can be written to {folder} ({error.strerror}): give another "
            "folder, or make room."
        ) from error
