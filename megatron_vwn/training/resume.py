"""Whether the checkpoint that Megatron is about to load was trained with this run's virtual width.

Megatron compares layers, hidden size and heads when it loads, but knows nothing of ``--vwn-*``: some differences (the
gate, say) leave every tensor's shape alone and would be trained on in silence, others end in a list of missing keys.
"""

import argparse
import copy
from dataclasses import fields

from megatron.training.checkpointing import _load_base_checkpoint, checkpoint_exists
from torch.distributed.checkpoint import CheckpointException

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.training.arguments import typed, virtual_width_from_args

# The layout of a checkpoint does not depend on the partition, so a run may change it when it resumes. The end of a
# document is the tokenizer's, which is not built yet.
_FREE = ("partition", "document_end")
_FIXED = tuple(field.name for field in fields(VirtualWidthConfig) if field.name not in _FREE)


def refuse_other_virtual_width(args: argparse.Namespace, virtual_width: VirtualWidthConfig | None) -> str | None:
    """Compare with the checkpoint that ``--load`` or ``--pretrained-checkpoint`` points to.

    Args:
        args: parsed flags; process groups need not exist.
        virtual_width: this run's; None for the ordinary model.

    Returns:
        One line about where training starts, or None if nothing is to be loaded.

    Raises:
        VirtualWidthError: other settings, an unreadable checkpoint, or none where ``--exit-on-missing-checkpoint``
            demands one.
    """
    folder = args.load
    if args.pretrained_checkpoint is not None and not checkpoint_exists(folder):
        folder = args.pretrained_checkpoint
    if folder is None:
        return None
    saved = _saved_state(folder, args)
    if saved is None:
        if args.exit_on_missing_checkpoint:
            raise VirtualWidthError(
                f"{folder} holds no checkpoint, which --exit-on-missing-checkpoint demands: correct --load or drop it."
            )
        return f"{folder} holds no checkpoint: training starts from the beginning"
    if "args" in saved:
        _compare(folder, virtual_width_from_args(saved["args"]), virtual_width)
    return f"training resumes from iteration {saved['iteration']} in {folder}"


def _saved_state(folder: str, args: argparse.Namespace) -> dict | None:
    """The replicated part of the checkpoint that Megatron would choose in ``folder``; None if there is none.

    Through Megatron's own (private) reader, because the choice depends on ``--ckpt-step``, non-persistent checkpoints
    and formats, and comparing with another checkpoint than the one loaded would be worse than none.
    """
    quiet = copy.copy(args)
    quiet.exit_on_missing_checkpoint = False  # Megatron would leave with exit code 0
    try:
        return _load_base_checkpoint(folder, quiet, rank0=True)[0]
    # Whatever a damaged file provokes; a CheckpointException is no Exception, and for some faults Megatron just leaves.
    except (Exception, CheckpointException, SystemExit) as error:
        fault = "Megatron gave up" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        reason = fault.strip().splitlines()[-1]  # a CheckpointException carries the cause's traceback as its text
        raise VirtualWidthError(
            f"the checkpoint in {folder} cannot be read ({reason}): choose another with --ckpt-step or --load."
        ) from error


def _compare(folder: str, saved: VirtualWidthConfig | None, current: VirtualWidthConfig | None) -> None:
    if saved is None and current is None:
        return
    if saved is None or current is None:
        raise VirtualWidthError(
            f"the checkpoint in {folder} was trained {_describe(saved)}, but this run is started {_describe(current)}: "
            f"start it {_describe(saved)}, or give another --load."
        )
    different = [name for name in _FIXED if getattr(saved, name) != getattr(current, name)]
    if different:
        raise VirtualWidthError(
            f"the checkpoint in {folder} was trained with {_settings(saved, different)}, but this run has "
            f"{_settings(current, different)}: give the checkpoint's settings, or another --load."
        )


def _describe(virtual_width: VirtualWidthConfig | None) -> str:
    return "without a virtual width" if virtual_width is None else f"with {_settings(virtual_width, ('m', 'n'))}"


def _settings(virtual_width: VirtualWidthConfig, names) -> str:
    return " ".join(typed(name, getattr(virtual_width, name)) for name in names)
