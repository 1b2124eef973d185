"""Megatron fails on a checkpoint without ``_extra_state`` entries, of which only FP8 with delayed scaling needs any."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.megatron_fixes.repair import repair
from megatron_vwn.tracker import RELEASE

_SUFFIX = "_extra_state"


def load_without_extra_states() -> None:
    """Let a checkpoint lack extra states, another backend's or another program's say: layers begin with fresh ones."""
    repair(dist_checkpointing, "load", _load_what_is_there)


def _load_what_is_there(stock: Callable) -> Callable:
    def load(sharded_state_dict, checkpoint_dir, *args, **kwargs):
        missing = set()
        names = {entry.unique_key for entry in nested_values(sharded_state_dict) if _is_extra_state(entry)}
        if names:
            missing = names - _get_filesystem_reader(checkpoint_dir).read_metadata().state_dict_metadata.keys()
        if missing:
            _refuse_lost_history(missing, checkpoint_dir)
            logging.getLogger(__name__).warning(
                "%d of %d extra states are not in %s: their layers begin with fresh ones, which FP8 alone would notice",
                len(missing),
                len(names),
                checkpoint_dir,
            )
            dict_list_map_inplace(
                lambda entry: (
                    dist_checkpointing.LocalNonpersistentObject(None)
                    if _is_extra_state(entry) and entry.unique_key in missing
                    else entry
                ),
                sharded_state_dict,
            )
        return stock(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return load


def _refuse_lost_history(missing: set[str], folder: str) -> None:
    """Refuse to resume FP8 with delayed scaling, whose scales come from the largest values of the steps before."""
    with contextlib.suppress(ImportError, AssertionError):  # no training
        from megatron.training import get_args

        args = get_args()
        if args.fp8 and args.fp8_recipe == "delayed" and not (args.finetune or Path(folder).name == RELEASE):
            raise VirtualWidthError(
                f"{folder} lacks {len(missing)} extra states, and with them the largest values that FP8 with delayed "
                "scaling computes its scales from: give another --load or --fp8-recipe, or add --finetune to begin "
                "anew with the checkpoint's weights."
            )


def _is_extra_state(entry: object) -> bool:
    return isinstance(entry, dist_checkpointing.ShardedObject) and entry.key.endswith(_SUFFIX)
