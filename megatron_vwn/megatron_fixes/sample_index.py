"""Megatron finds the sample index of a data set by its path and its settings, whatever lies there by now.

Data that were exchanged under their name would be read in the order of documents that are gone, or end a run in an
IndexError. The repair adds the content to the name: data of other sequences have another index, and it is made.
"""

import errno
import hashlib
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.indexed import default_index_cache
from megatron_vwn.megatron_fixes.repair import repair

# A fault of reading leaves a whole index, which other runs may be using.
_COULD_NOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def find_sample_indices_by_content() -> None:
    """Let ``GPTDataset`` use a sample index only for data whose sequences have the lengths that it was made of."""
    repair(gpt_dataset.GPTDataset, "__init__", _named_by_content)


def _named_by_content(stock: Callable) -> Callable:
    def init(self, indexed_dataset, dataset_path, *arguments, **named):
        if dataset_path is None:  # of mock data
            stock(self, indexed_dataset, dataset_path, *arguments, **named)
            return
        path = f"{dataset_path} with sequences {_fingerprint(indexed_dataset)}"
        try:
            # Megatron makes the name of an index, and the name of a blend's, from this path, which it opens nowhere.
            stock(self, indexed_dataset, path, *arguments, **named)
        except OSError as error:
            if error.errno in _COULD_NOT_WRITE and _writes():
                _remove_half(self)
            raise
        except (EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise VirtualWidthError(
                f"the sample index of {dataset_path} cannot be used ({reason}): remove {_folder(self)} or what there "
                f"begins with {self.unique_description_hash}, and it is made again."
            ) from error
        self.dataset_path = dataset_path

    return init


@cache  # training, validation and test data may be parts of one file
def _fingerprint(indexed_dataset: IndexedDataset) -> str:
    """Of the lengths of all sequences: a sample index is computed from them, and from nothing else in the data."""
    return hashlib.blake2b(indexed_dataset.sequence_lengths.data, digest_size=16).hexdigest()


def _writes() -> bool:
    """Whether this rank makes the indices, which the others wait for and read."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _folder(dataset: gpt_dataset.GPTDataset) -> Path:
    return Path(dataset.config.path_to_cache or default_index_cache(dataset.dataset.path_prefix))


def _remove_half(dataset: gpt_dataset.GPTDataset) -> None:
    """An index of which a part could not be written, on a full disk, must not be taken for one by the next run."""
    for path in _folder(dataset).glob(f"{dataset.unique_description_hash}-*"):
        path.unlink(missing_ok=True)
