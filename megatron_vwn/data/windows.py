"""Token windows of Megatron's data sets by the number of the sample, without torch and without Megatron.

A GPTDataset finds sample i through three indices: shuffle_index[i] is a row of the sample index, two neighbouring rows
say where the sample begins and ends in the document index, and that lists sequences of PREFIX.idx. Here the same
indices are walked over mapped files, in an object that a worker process can be handed: Megatron's own would make every
worker import it, and would copy each mapped index into every worker.
"""

import multiprocessing
import signal
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from megatron_vwn.data.apart import end_with_parent


class _SharedByPath:
    """A dataclass whose mapped arrays are pickled as the part of the file they show."""

    def __getstate__(self) -> dict[str, object]:
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in state.items():
            if isinstance(value, np.memmap):
                state[name] = _Mapping(str(value.filename), value.dtype, value.offset, value.shape)
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            setattr(self, name, value.open() if isinstance(value, _Mapping) else value)


@dataclass
class _Mapping:
    path: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]

    def open(self) -> np.memmap:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


@dataclass
class TokenWindows(_SharedByPath):
    """The samples of one data set.

    Attributes:
        tokens: [tokens] of PREFIX.bin.
        lengths: [sequences] int32, in tokens.
        offsets: [sequences] int64, in bytes.
        document_index: [documents] sequences in the order of all epochs.
        sample_index: [samples + 1, 2] place in the document index and token in that document where a sample begins.
        shuffle_index: [samples] rows of the sample index.
        sequence_length: tokens of a sample, without the label of the last.
        pad: token id behind a sample that the data does not fill.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray
    sequence_length: int
    pad: int

    def __getitem__(self, sample: int) -> np.ndarray:
        """Tokens [sequence_length + 1] int32 of a sample, the last one being its last label."""
        row = self.shuffle_index[sample]
        (first, begin), (last, end) = self.sample_index[row : row + 2].tolist()
        window = np.full(self.sequence_length + 1, self.pad, np.int32)
        filled = 0
        for place in range(first, last + 1):
            sequence = self.document_index[place]
            start = int(self.offsets[sequence]) // self.tokens.itemsize
            stop = start + (end + 1 if place == last else int(self.lengths[sequence]))
            piece = self.tokens[start + (begin if place == first else 0) : stop]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)
        return window


@dataclass
class BlendedWindows(_SharedByPath):
    """The samples of several data sets in the order of a blend.

    Attributes:
        parts: the data sets.
        part_index: [samples] data set of a sample.
        sample_index: [samples] number of the sample in its data set.
    """

    parts: list[TokenWindows]
    part_index: np.ndarray
    sample_index: np.ndarray

    def __getitem__(self, sample: int) -> np.ndarray:
        """Tokens [sequence_length + 1] int32 of a sample."""
        return self.parts[self.part_index[sample]][self.sample_index[sample]]


@dataclass
class WindowSource:
    """Micro-batches of windows by their number: what DALI's external source calls, in its workers or here.

    DALI may ask any worker for any micro-batch, so this is a function of the number alone.

    Attributes:
        windows: where samples come from.
        starts: first sample of every micro-batch.
        size: samples in a micro-batch.
        ignored_signals: that workers leave to the process that trains, which ends them.
    """

    windows: TokenWindows | BlendedWindows
    starts: range
    size: int
    ignored_signals: Iterable[int] = ()

    def __setstate__(self, state: dict[str, object]) -> None:
        """In a worker, before it reads anything."""
        self.__dict__.update(state)
        for number in self.ignored_signals:
            signal.signal(number, signal.SIG_IGN)
        # A worker waits for work in shared memory and would outlive a process that was killed.
        if multiprocessing.parent_process() is not None:
            end_with_parent()

    def __call__(self, batch) -> list[np.ndarray]:
        """Windows [sequence_length + 1] int32 of the micro-batch that ``batch`` (nvidia.dali.types.BatchInfo) numbers.

        Raises:
            StopIteration: behind the last micro-batch.
        """
        if batch.iteration >= len(self.starts):
            raise StopIteration
        start = self.starts[batch.iteration]
        return [self.windows[sample] for sample in range(start, start + self.size)]
