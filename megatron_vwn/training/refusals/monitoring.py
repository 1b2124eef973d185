"""Whether anybody would see what ``--vwn-log-interval`` measures."""

import argparse
from importlib.util import find_spec

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError


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
