"""Megatron's torch_dist checkpoints, read and written one whole tensor at a time.

A torch_dist folder is a torch.distributed checkpoint whose metadata name every tensor with its whole shape, whatever
layout saved it. Neither process groups nor a GPU nor a model are needed to read one, and nothing but the tensor at hand
is in memory.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    load,
    save,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_vwn.checkpoint.settings import read_object
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.megatron_fixes.pickles import refusal_in, unpickle_known_classes
from megatron_vwn.tracker import RELEASE, TRACKER, last_step, tracked

_METADATA = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_NOT_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.")
# What the file system, pickle, zip and torch report of damaged files; a CheckpointException is no Exception.
_DAMAGE = (Exception, CheckpointException)


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: str = "cpu") -> Tensor:
        """A tensor like it, not filled."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class TorchDistReader:
    """A torch_dist checkpoint on disk.

    Args:
        folder: the folder that Megatron's ``--save`` names, whose last checkpoint is taken, or one checkpoint in it.

    Raises:
        VirtualWidthError: if there is none, or its metadata cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = _checkpoint_folder(folder)
        unpickle_known_classes()
        try:
            self._reader = _CachedReader(self.folder)
            entries = self._reader.read_metadata().state_dict_metadata
        except _DAMAGE as error:
            raise _unreadable(self.folder, error) from error
        self.tensors = {
            key: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not _NOT_THE_MODEL.match(key)
        }
        self.objects = [key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]

    @cached_property
    def arguments(self) -> argparse.Namespace:
        """Megatron's arguments of the run that saved it.

        Raises:
            VirtualWidthError: if they cannot be read or were not saved.
        """
        try:
            state = load_common_state_dict(self.folder)
        except _DAMAGE as error:
            raise _unreadable(self.folder, error) from error
        if not isinstance(state, dict) or not isinstance(state.get("args"), argparse.Namespace):
            raise VirtualWidthError(f"{self.folder} has no arguments of its run: save it with Megatron's pretrain().")
        return state["args"]

    def read(self, key: str) -> Tensor:
        """One whole tensor of ``tensors``, on the CPU.

        Raises:
            VirtualWidthError: if a file of it is missing or damaged.
        """
        tensor = self.tensors[key].empty()
        try:
            load({key: tensor}, storage_reader=self._reader, no_dist=True)
        except _DAMAGE as error:
            raise _unreadable(self.folder, error) from error
        return tensor


def write_torch_dist(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    objects: Iterable[str],
    common: Mapping[str, object],
) -> None:
    """Write a checkpoint that Megatron's ``--load`` takes as a release: weights without optimizer, from iteration 0.

    Args:
        folder: an empty folder, the one that ``--load`` will name.
        tensors: every tensor of the model.
        read: gives a tensor when its turn has come; it is written and forgotten.
        objects: keys of the ``_extra_state`` entries that Megatron's layers ask for; they are empty.
        common: what Megatron saves once for all ranks, ``args`` among it.
    """
    release = folder / RELEASE
    release.mkdir(parents=True)
    state: dict[str, object] = {key: info.empty("meta") for key, info in tensors.items()}
    state |= {key: [None] for key in objects}
    state["common_state/shard_0_1"] = [dict(common)]
    try:
        save(state, storage_writer=FileSystemWriter(release), planner=_LazyPlanner(read), no_dist=True)
    except CheckpointException as error:
        # What happened while a tensor was read or written, an interruption included: not to be hidden in its text.
        ((cause, _),) = error.failures.values()
        raise (OSError(str(cause)) if isinstance(cause, RuntimeError) else cause) from None
    (release / "metadata.json").write_text(json.dumps(_METADATA))
    (folder / TRACKER).write_text(RELEASE)


class _CachedReader(FileSystemReader):
    """Reads the metadata once, not once for each tensor."""

    @cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._metadata


class _LazyPlanner(DefaultSavePlanner):
    """Plans with the shapes of tensors and fetches each one when it is written."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False)  # an entry that is a list stays one entry
        self._read = read

    def resolve_data(self, write_item):
        if isinstance(self.lookup_object(write_item.index), Tensor):
            return self._read(write_item.index.fqn)
        return super().resolve_data(write_item)


def _checkpoint_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise VirtualWidthError(f"{folder} is no folder: give the one that --save named.")
    if tracked(folder) == RELEASE:
        folder = folder / RELEASE
    elif step := last_step(folder):
        folder = folder / f"iter_{step:07d}"
    for name, what in (("metadata.json", "no complete torch_dist checkpoint"), (".metadata", "half a checkpoint")):
        if not (folder / name).exists():
            raise VirtualWidthError(f"{folder} is {what} ({name} is missing): give another.")
    if read_object(folder / "metadata.json").get("sharded_backend") != "torch_dist":
        raise VirtualWidthError(f"{folder} is not in the format torch_dist: save it with --ckpt-format torch_dist.")
    return folder


def _unreadable(folder: Path, error: BaseException) -> VirtualWidthError:
    if isinstance(error, CheckpointException):
        for cause, _ in error.failures.values():
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
    if (refusal := refusal_in(error)) is not None:
        return VirtualWidthError(f"{folder}: {refusal}")
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else type(error).__name__
    return VirtualWidthError(f"the checkpoint {folder} cannot be read ({reason}): it is damaged, give another.")
