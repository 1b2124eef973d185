"""What a torch_dist checkpoint may contain as pickles: by an allow-list, so that reading one runs no code of it.

torch reads ``.metadata`` with ``pickle.load`` and objects among the tensors with ``weights_only=False``: whoever can
write a checkpoint can run anything where it is read. Metadata need few classes, which are listed here; objects may have
those that Megatron lists for its other format (``megatron.core.safe_globals``).
"""

import inspect
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
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.megatron_fixes.repair import repair

# Beside the classes of torch's own module of metadata, which hold data alone, and dtypes.
_OF_METADATA = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    # The plan of the save, which torch 2.14 writes there: dataclasses of data alone.
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # as Python 3.13 calls them
}
_UNKNOWN_GLOBAL = re.compile(r"GLOBAL (\S+)")


def unpickle_known_classes() -> None:
    """Let torch read pickles of a checkpoint by the allow-lists.

    What is not on them is refused with a ``VirtualWidthError``, which torch may wrap: see ``refusal_in``.

    Raises:
        VirtualWidthError: this torch reads metadata in another way, which would not be seen.
    """
    if "pickle.load(" not in inspect.getsource(filesystem.FileSystemReader.read_metadata):
        raise VirtualWidthError(
            f"torch {torch.__version__} reads the metadata of checkpoints otherwise than this package can watch: "
            "install torch 2.11."
        )
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
        if not _is_known(module, name):
            raise VirtualWidthError(_refused("its .metadata", f"{module}.{name}"))
        return super().find_class(module, name)


def _is_known(module: str, name: str) -> bool:
    if module == Metadata.__module__:
        found = vars(metadata).get(name)
        return isinstance(found, type) and found.__module__ == module
    if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
        return True
    return name in _OF_METADATA.get(module, ())


def _load_metadata(stream: BinaryIO) -> Metadata:
    try:
        return _known_metadata(stream)
    except Exception as error:  # whatever damaged pickles provoke
        if not isinstance(error, VirtualWidthError):
            error = VirtualWidthError("the checkpoint's .metadata cannot be read: it is damaged, give another.")
        # torch goes on without metadata after any other exception, and ends without a word of this one.
        raise CheckpointException("metadata", {0: (error, StackSummary())}) from error


def _known_metadata(stream: BinaryIO) -> Metadata:
    found = _MetadataUnpickler(stream).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError
    found.state_dict_metadata.items()
    for name in {info.relative_path for info in found.storage_data.values()}:
        if PurePath(name).name != name:
            raise VirtualWidthError(f"the checkpoint looks for tensors in {name}, outside of its folder: give another.")
    return found


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
