"""Held-out bits per byte: what a text costs a language model, comparable between tokenizers.

The context of a token is what lm-eval's rolling log-likelihood gives it, so that both print the same number: a document
with the end of document before it is cut into windows as long as a sample of the training, and a token sees its window.
The last window is moved back until it is full; what it shares with the one before is context and not counted again.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from megatron_vwn.data.indexed import check_indexed_dataset

_NOT_COUNTED = -100


class Text(NamedTuple):
    """Tokenised documents, without their ends, and the UTF-8 bytes of their text."""

    documents: list[list[int]]
    end_of_document: int
    bytes: int


def read_text(prefix: str) -> Text:
    """What vwn-prepare-data wrote as PREFIX.bin, PREFIX.idx and PREFIX.json."""
    facts = json.loads(Path(f"{prefix}.json").read_text())
    tokens = np.fromfile(f"{prefix}.bin", check_indexed_dataset(prefix).dtype)
    ends = np.flatnonzero(tokens == facts["end_of_document"])
    documents = [part[:-1].tolist() for part in np.split(tokens, ends + 1) if len(part)]
    return Text(documents, facts["end_of_document"], facts["text_bytes"])


def windows(tokens: Sequence[int], end_of_document: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs of at most ``length`` tokens and the tokens behind them; every token of the document is counted once."""
    stream = [end_of_document, *tokens]
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        first = max(0, end - length)
        yield stream[first:end], [_NOT_COUNTED] * (start - first) + stream[start + 1 : end + 1]


@torch.inference_mode()
def bits_per_byte(model, text: Text, length: int, batch: int = 16) -> float:
    """The negative base-2 logarithm of the probability of all tokens, per byte of text.

    Args:
        model: causal language model of transformers; what is computed in its precision is summed in fp64.
        text: what it has not been trained on.
        length: tokens of a window.
        batch: windows at once.
    """
    pairs = [pair for document in text.documents for pair in windows(document, text.end_of_document, length)]
    nats = 0.0
    for start in range(0, len(pairs), batch):
        inputs, targets = zip(*pairs[start : start + batch], strict=True)
        # Filled up behind the text, where a causal model does not see it.
        inputs_BT = pad_sequence([torch.tensor(part) for part in inputs], batch_first=True)
        targets_BT = pad_sequence(
            [torch.tensor(part) for part in targets], batch_first=True, padding_value=_NOT_COUNTED
        )
        logits_BTV = model(input_ids=inputs_BT.to(model.device), use_cache=False).logits
        losses = cross_entropy(
            logits_BTV.float().flatten(0, 1),
            targets_BT.to(model.device).flatten(),
            ignore_index=_NOT_COUNTED,
            reduction="none",
        )
        nats += losses.double().sum().item()
    return nats / math.log(2) / text.bytes
