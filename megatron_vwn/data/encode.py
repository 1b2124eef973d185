"""Tokenise batches of documents in several processes; the result never depends on how many."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.apart import SPAWN, end_with_parent, interrupts_blocked
from megatron_vwn.data.documents import Batch, is_held_out
from megatron_vwn.data.tokenizer import LoadedTokenizer

# Batches in flight per worker: enough to keep it busy while the parent writes, few enough to bound memory.
_AHEAD = 4


@dataclass(frozen=True)
class EncoderSettings:
    """Everything a worker must know.

    Attributes:
        tokenizer: loaded once, by the program.
        json_key: key of the text in a JSONL line.
        held_out_fraction: share of documents for validation; 0 for no split.
        seed: of the split.
    """

    tokenizer: LoadedTokenizer
    json_key: str
    held_out_fraction: float
    seed: int


class EncodedDocument(NamedTuple):
    """Token ids (int32, end of document included), UTF-8 bytes of the text, and the split."""

    ids: np.ndarray
    text_bytes: int
    held_out: bool


class EncodedBatch(NamedTuple):
    """The documents of a batch, the number of empty ones that were dropped, and the bytes read from disk for it."""

    documents: list[EncodedDocument]
    empty: int
    bytes_read: int


class Encoder:
    """Tokenises one batch at a time."""

    def __init__(self, settings: EncoderSettings):
        self.settings = settings

    def __call__(self, batch: Batch) -> EncodedBatch:
        """Decode, split and tokenise the documents of a batch."""
        documents = []
        for record in batch.records:
            text = record.text(self.settings.json_key)
            if text.strip():
                ids = np.array(self.settings.tokenizer.encode(text), dtype=np.int32)
                held_out = is_held_out(text, self.settings.held_out_fraction, self.settings.seed)
                documents.append(EncodedDocument(ids, len(text.encode()), held_out))
        return EncodedBatch(documents, len(batch.records) - len(documents), batch.bytes_read)


def encode_batches(batches: Iterable[Batch], settings: EncoderSettings, workers: int) -> Iterator[EncodedBatch]:
    """Tokenise batches in order, holding at most a few per worker in memory.

    Raises:
        VirtualWidthError: the first refusal in the order of the documents, or a worker that died.
    """
    if workers == 1:
        yield from map(Encoder(settings), batches)
        return
    batches = iter(batches)
    pool = ProcessPoolExecutor(workers, mp_context=SPAWN, initializer=_start_worker, initargs=(settings,))
    try:
        with interrupts_blocked():
            for _ in range(workers):
                pool.submit(os.getpid)  # starts a worker, as no other is idle
        pending = deque(pool.submit(_encode, batch) for batch in islice(batches, _AHEAD * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(_encode, batch) for batch in islice(batches, 1))
    except BrokenProcessPool:
        raise VirtualWidthError(
            "a worker died, most likely for want of memory: use fewer --workers or shorter documents."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None


def _start_worker(settings: EncoderSettings) -> None:
    global _encoder
    end_with_parent()
    _encoder = Encoder(settings)


def _encode(batch: Batch) -> EncodedBatch:
    return _encoder(batch)
