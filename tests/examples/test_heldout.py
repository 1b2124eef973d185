"""Held-out bits per byte: cases that can be computed by hand, and the rule for context."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

from heldout import Text, bits_per_byte, read_text, windows

from megatron_vwn.data.__main__ import main as vwn_prepare_data

VOCABULARY = 11


class Model:
    """Logits are a table's rows: those of the input token."""

    device = torch.device("cpu")

    def __init__(self, table):
        self.table = table

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("lengths", [[7], [8], [9, 3], [1, 30, 8, 16]])
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary_per_token(lengths):
    text = Text([[1] * length for length in lengths], end_of_document=0, bytes=40)
    bits = bits_per_byte(Model(torch.zeros(VOCABULARY, VOCABULARY)), text, length=8, batch=3)
    assert bits == pytest.approx(math.log2(VOCABULARY) * sum(lengths) / 40, rel=1e-6)


def test_each_token_is_predicted_from_the_one_before_it():
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    documents = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9]]
    bits = table.log_softmax(-1) / math.log(2)
    expected = -sum(bits[a, b] for document in documents for a, b in zip([0, *document], document, strict=False))
    found = bits_per_byte(Model(table), Text(documents, 0, bytes=20), length=4, batch=2)
    assert found == pytest.approx(expected.item() / 20, rel=1e-6)


def test_the_last_window_is_full_and_counts_what_is_left():
    none = -100
    assert list(windows([1, 2, 3, 4, 5, 6], 0, 4)) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([2, 3, 4, 5], [none, none, 5, 6]),
    ]
    assert list(windows([1, 2], 0, 4)) == [([0, 1], [1, 2])]
    assert list(windows([], 0, 4)) == []


def test_prepared_data_are_read_without_the_ends_of_documents(tmp_path):
    texts = ["One.\n\nTwo, café.", "Three", "Four four four."]
    (tmp_path / "corpus.txt").write_text("\n\f\n".join(texts))
    prefix = tmp_path / "corpus"
    options = ["--train-tokenizer", "270", "--output", str(prefix), "--workers", "1"]
    assert vwn_prepare_data([str(tmp_path / "corpus.txt"), *options]) == 0
    text = read_text(str(prefix))
    assert text.end_of_document == json.loads(prefix.with_suffix(".json").read_text())["end_of_document"]
    assert [text.end_of_document in document for document in text.documents] == [False] * 3
    tokenizer = Tokenizer.from_file(str(tmp_path / "corpus_tokenizer" / "tokenizer.json"))
    assert [tokenizer.decode(document) for document in text.documents] == texts
    assert text.bytes == sum(len(each.encode()) for each in texts)
