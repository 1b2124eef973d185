"""Output folders that appear whole or not at all, and Hugging Face folders read and written one tensor at a time."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_vwn.atomic import atomic_folder
from megatron_vwn.checkpoint.model_card import ARGUMENTS
from megatron_vwn.checkpoint.settings import read_object
from megatron_vwn.checkpoint.torch_dist import RELEASE, TRACKER, TensorInfo
from megatron_vwn.config import VirtualWidthError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


# What converted folders consist of, those of earlier releases too.
_WRITTEN = {
    "config.json",
    "configuration_vwn.py",
    "modeling_vwn.py",
    "README.md",
    ARGUMENTS,
    _SINGLE,
    _INDEX,
    *_TOKENIZER,
    TRACKER,
    RELEASE,
    f"{RELEASE}/.metadata",
    f"{RELEASE}/metadata.json",
}
_WRITTEN_PARTS = re.compile(rf"model-\d{{5}}-of-\d{{5}}\.safetensors|{RELEASE}/__\d+_\d+\.distcp")


@contextmanager
def appearing_whole(folder: Path, *, overwrite: bool, sources: Iterable[Path | None] = ()) -> Iterator[Path]:
    """A temporary folder that takes its final name when the block ends, and vanishes if the block fails.

    Args:
        folder: the final name; an empty folder may stand there.
        overwrite: whether a folder of that name may be replaced that a conversion wrote, and nothing else is in.
        sources: folders that are read and must survive.

    Raises:
        VirtualWidthError: if the name is taken, or nothing can be written there.
    """
    folder = folder.resolve()
    _check_target(folder, overwrite, [source.resolve() for source in sources if source is not None])
    try:
        with atomic_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise VirtualWidthError(f"{folder} cannot be written ({error}): make room or give another.") from error


def _check_target(folder: Path, overwrite: bool, sources: list[Path]) -> None:
    for source in sources:
        if folder == source or folder in source.parents:
            raise VirtualWidthError(f"{folder} holds {source}, which is read: give another name to write to.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite or not folder.is_dir():
        raise VirtualWidthError(f"{folder} exists: give another name, or --overwrite to replace it.")
    if not any((folder / name).exists() for name in (ARGUMENTS, TRACKER)):
        raise VirtualWidthError(f"{folder} is no converted checkpoint and is not replaced: give another name.")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (name in _WRITTEN or _WRITTEN_PARTS.fullmatch(name)):
            raise VirtualWidthError(
                f"{folder} holds {name}, which no conversion wrote, and is not replaced: move it or give another name."
            )
    if (folder / TRACKER).exists() and (folder / TRACKER).read_text(errors="replace") != RELEASE:
        raise VirtualWidthError(f"{folder} holds checkpoints of a run and is not replaced: give another name.")


class SafetensorsReader:
    """The tensors of a Hugging Face folder.

    Args:
        folder: holds config.json and safetensors files.

    Raises:
        VirtualWidthError: if something is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "config.json").exists():
            raise VirtualWidthError(f"{folder} is no Hugging Face checkpoint (config.json is missing): give another.")
        self.config = read_object(folder / "config.json")
        files = _indexed_files(folder / _INDEX) if (folder / _INDEX).exists() else {_SINGLE}
        self._file_of: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in sorted(files):
            with self._open(folder / file) as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(key)
                    if part.get_dtype() not in _DTYPES:
                        raise VirtualWidthError(
                            f"{key} in {folder} has the dtype {part.get_dtype()}: convert it to bf16 or fp32 first."
                        )
                    self._file_of[key] = folder / file
                    self.tensors[key] = TensorInfo(tuple(part.get_shape()), _DTYPES[part.get_dtype()])

    def read(self, key: str) -> Tensor:
        """One tensor."""
        with self._open(self._file_of[key]) as tensors:
            return tensors.get_tensor(key)

    @contextmanager
    def _open(self, file: Path) -> Iterator:
        if not file.exists():
            raise VirtualWidthError(f"{file} is missing: the checkpoint is incomplete, give another.")
        try:
            with safe_open(file, "pt") as tensors:
                yield tensors
        except (SafetensorError, OSError, KeyError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> VirtualWidthError:
        return VirtualWidthError(f"the checkpoint {self.folder} cannot be read ({error}): it is damaged, give another.")


def _indexed_files(index: Path) -> set[str]:
    """The files that an index names; they lie beside it, as links at most, which the hub's cache consists of."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise VirtualWidthError(f"{index} has no weight_map of tensors: it is damaged, give another.")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", "..") or PurePath(name).name != name:
            raise VirtualWidthError(f"{index} names {name!r}, which is no file beside it: give another checkpoint.")
    return set(weight_map.values())


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsWriter:
    """Collects tensors into files of a bounded size; ``close`` writes the index.

    Args:
        folder: an existing folder.
        shard_bytes: size at which a file is written; one tensor may be larger.
    """

    def __init__(self, folder: Path, shard_bytes: int):
        self._folder, self._limit = folder, shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def write(self, key: str, tensor: Tensor) -> None:
        """Take one tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes() + size > self._limit:
            self._flush()
        # A copy of its own: a view would keep the whole it was cut from in memory, and cannot be saved.
        self._waiting[key] = tensor.contiguous() if tensor._base is None else tensor.clone()
        self._total += size

    def close(self) -> None:
        """Write what waits, name the files as transformers does, and write the index of several."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(1).rename(self._folder / _SINGLE)
            return
        weight_map = {}
        for number, keys in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._waiting.values())

    def _flush(self) -> None:
        self._shards.append(list(self._waiting))
        try:
            save_file(self._waiting, self._part(len(self._shards)), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self._waiting = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the files of a Hugging Face tokenizer; their names.

    Raises:
        VirtualWidthError: if there are none.
    """
    names = [name for name in _TOKENIZER if (source / name).exists()]
    if not names:
        raise VirtualWidthError(f"{source} holds no tokenizer of Hugging Face: give its folder with --tokenizer.")
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
