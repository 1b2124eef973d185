"""What a torch_dist checkpoint may contain as pickles: by an allow-list, so that reading one runs no code of it.

torch reads ``.metadata`` with ``pickle.load`` and objects among the tensors with ``weights_only=False``: whoever can
write a checkpoint can run anything where it is read. Metadata need few classes, which are listed here; objects may have
those that Megatron lists for its other format (``megatron.core.safe_globals``).
"""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import PurePath
from traceback import StackSummary
from types import SimpleNamespace
from typing import BinaryIO

import torch
from megatron.core.safe_globals import SAFE_GLOBALS, register_safe_globals
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, filesystem
from torch.distributed.checkpoint.metadata import Metadata

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.megatron_fixes.repair import repair

_OF_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}
_UNKNOWN_GLOBAL = re.compile(r"GLOBAL (\S+)")


def unpickle_known_classes() -> None:
    """Let torch read pickles of a checkpoint by the allow-lists.

    What is not on them is refused with a ``VirtualWidthError``, which torch may wrap: see ``refusal_in``.
    """
    register_safe_globals()
    # numpy 1 and 2 write its name in two ways, and read both.
    array = next(each for each in SAFE_GLOBALS if each.__name__ == "_reconstruct")
    torch.serialization.add_safe_globals(
        [(array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    )
    # Its functions for metadata are the only ones that torch uses there.
    filesystem.pickle = SimpleNamespace(load=_load_metadata, dump=pickle.dump)
    repair(DefaultLoadPlanner, "load_bytes", _objects_of_known_classes)


def refusal_in(error: BaseException | None) -> VirtualWidthError | None:
    """The refusal that an error of a load was made of, if there is one."""
    while error is not None:
        if isinstance(error, VirtualWidthError):
            return error
        if isinstance(error, CheckpointException):
            for cause, _ in error.failures.values():
                if (found := refusal_in(cause)) is not None:
                    return found
        error = error.__cause__ or error.__context__
    return None


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        known = name in _OF_METADATA.get(module, ())
        if not known and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise VirtualWidthError(_refused("its .metadata", f"{module}.{name}"))
        return super().find_class(module, name)


def _load_metadata(stream: BinaryIO) -> Metadata:
    try:
        return _known_metadata(stream)
    except Exception as error:  # whatever damaged pickles provoke
        if not isinstance(error, VirtualWidthError):
            error = VirtualWidthError("the checkpoint's .metadata cannot be read: it is damaged, give another.")
        # torch goes on without metadata after any other exception, and ends without a word of this one.
        raise CheckpointException("metadata", {0: (error, StackSummary())}) from error


def _known_metadata(stream: BinaryIO) -> Metadata:
    metadata = _MetadataUnpickler(stream).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError
    metadata.state_dict_metadata.items()
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        if PurePath(name).name != name:
            raise VirtualWidthError(f"the checkpoint looks for tensors in {name}, outside of its folder: give another.")
    return metadata


def _objects_of_known_classes(stock: Callable) -> Callable:
    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        try:
            found = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            unknown = _UNKNOWN_GLOBAL.search(str(error))
            what = unknown[1] if unknown else "something"
            raise VirtualWidthError(_refused(f"its {read_item.dest_index.fqn}", what)) from error
        # torch reads it once more, without a list: what it reads was written here.
        known = io.BytesIO()
        torch.save(found, known)
        known.seek(0)
        stock(self, read_item, known)

    return load_bytes


def _refused(entry: str, name: str) -> str:
    return (
        f"the checkpoint is refused: {entry} asks for {name}, which no checkpoint needs and which may run anything; "
        "nothing of it was run, give another."
    )
