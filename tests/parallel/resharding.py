"""Checkpoints of model and optimizer as Megatron's training writes them, and what two of them differ in.

They are compared as files: a model that loads and saves with the same mistake would hide it.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from parallel.harness import Session
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

# Of each parameter, under its name: moments of Adam or of Muon, and a master weight, unless the parameter is its own.
# The step is a number in the groups.
MOMENTS = ({"exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
MASTERS = {"param", "fp32_param"}
STATES = MASTERS.union(*MOMENTS)


def save(session: Session, optimizer) -> Path:
    """Save to a new folder, one of those that ``remove`` deletes."""
    folder = _agreed(lambda: tempfile.mkdtemp(dir=_root()))
    dist_checkpointing.save(_state(session, optimizer, is_loading=False), folder)
    torch.distributed.barrier()
    return Path(folder)


def restore(session: Session, optimizer, folder: Path) -> None:
    loaded = dist_checkpointing.load(_state(session, optimizer, is_loading=True), str(folder))
    for i, model in enumerate(session.models):
        model.load_state_dict(loaded[f"model{i}"])
    optimizer.load_state_dict(loaded["optimizer"])


def _state(session: Session, optimizer, *, is_loading: bool) -> dict:
    # What --dist-ckpt-optim-fully-reshardable says; Muon does without.
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": session.groups.dp_cp,
    }
    state: dict = {
        f"model{i}": model.sharded_state_dict(prefix="", metadata=metadata) for i, model in enumerate(session.models)
    }
    optimizer_state = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return {**state, "optimizer": optimizer_state}


def differences(folder: Path, other: Path) -> list[str]:
    """Names of tensors and settings that are not the same to the last bit; the same list on every rank."""
    return _agreed(lambda: _differences(folder, other))


def _differences(folder: Path, other: Path) -> list[str]:
    one, two = tensors(folder), tensors(other)
    parameters = {key for key in one if not key.startswith("optimizer.")}
    missing = [f"{key} is not in both" for key in one.keys() ^ two.keys()]
    kept = {key: {what for what in STATES if f"optimizer.state.{what}.{key}" in one} for key in parameters}
    missing += [f"{key} has {what}" for key, what in kept.items() if what - MASTERS not in MOMENTS]
    missing += [] if len({len(what & MASTERS) for what in kept.values()}) == 1 else ["master weights"]
    # What no rank wrote stays NaN, and a moment that is zero everywhere would equal one that was lost.
    empty = [f"{key} is empty" for key, tensor in one.items() if tensor.isnan().any() or not tensor.any()]
    unequal = [key for key in one.keys() & two.keys() if not _same_bits(one[key], two[key])]
    groups, other_groups = optimizer_groups(folder), optimizer_groups(other)
    return sorted(missing + empty + unequal) + ([] if groups == other_groups else [f"{groups} != {other_groups}"])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, read without Megatron.

    Objects are left out: the "common_state" of a training run has random numbers' and data's positions, which belong to
    ranks, and the optimizer's groups, see ``optimizer_groups``; the layers' "_extra_state" is empty without FP8.
    """
    reader = FileSystemReader(folder)
    state = {
        key: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if not isinstance(entry, BytesStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def optimizer_groups(folder: Path) -> list[dict]:
    """Settings and steps of the optimizer's parameter groups.

    Experts whose ranks are others than the dense layers' have an optimizer of their own, whose groups differ from the
    dense ones in saying so: without that they are the same groups.
    """
    state = dist_checkpointing.load_common_state_dict(folder)["optimizer"]
    parts = [state[i] for i in sorted(state)] if 0 in state else [state]
    groups = []
    for part in parts:
        for group in part.get("optimizer", part)["param_groups"]:
            group = {key: value for key, value in group.items() if key != "is_expert_parallel"}
            if group not in groups:
                groups.append(group)
    return sorted(groups, key=str)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _agreed(of_first_rank: Callable):
    """What the first rank finds, on every rank."""
    found = [of_first_rank() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


@cache
def _root() -> Path:
    """The folder of all checkpoints; known to the first rank only."""
    return Path(tempfile.mkdtemp(prefix="vwn-checkpoints-"))


def remove() -> None:
    """Delete everything that was saved."""
    if _root.cache_info().currsize:
        shutil.rmtree(_root())
