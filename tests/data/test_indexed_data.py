"""Data that is not what its index says is refused by name."""

import json

import numpy as np
import pytest

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data import indexed
from megatron_vwn.data.indexed import check_indexed_dataset, read_description


def build(folder, lengths):
    """A data set c of documents of these lengths, as Megatron writes it; returns its .bin and its .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "c.bin"), dtype=np.uint16)
    for length in lengths:
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(folder / "c.idx"))
    return folder / "c.bin", folder / "c.idx"


def damage(path, at, value):
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


# The corpus has 40 documents: header 34 bytes, lengths to 194, offsets to 514, marks to 842.
DAMAGES = {
    "short bin": (lambda b, i: cut(b, 500), "c.bin is cut short: it has 500 bytes"),
    "long bin": (lambda b, i: b.write_bytes(b.read_bytes() + b"\0\0"), "c.bin is too long"),
    "empty bin": (lambda b, i: cut(b, 0), "c.bin is cut short: it has 0 bytes"),
    "no bin": (lambda b, i: b.unlink(), "c.bin does not exist"),
    "no idx": (lambda b, i: i.unlink(), "c.idx does not exist"),
    "empty idx": (lambda b, i: cut(i, 0), "c.idx is empty"),
    "idx ends in its magic": (lambda b, i: cut(i, 5), "ends after 5 bytes, inside its header"),
    "idx ends in its header": (lambda b, i: cut(i, 33), "ends after 33 bytes, inside its header"),
    "idx ends in its arrays": (lambda b, i: cut(i, 700), "c.idx is cut short: it has 700 bytes"),
    "long idx": (lambda b, i: i.write_bytes(i.read_bytes() + b"\0"), "c.idx is too long"),
    "wrong magic": (lambda b, i: damage(i, 0, b"TNTIDX"), "no Megatron index"),
    "version": (lambda b, i: damage(i, 9, b"\2"), "has version 2"),
    "floats": (lambda b, i: damage(i, 17, b"\7"), "floating-point numbers"),
    "unknown type": (lambda b, i: damage(i, 17, b"\x63"), "unknown type 99"),
    "other type": (lambda b, i: damage(i, 17, b"\4"), "contradict their lengths"),
    "huge count": (lambda b, i: damage(i, 18, b"\xff" * 8), "c.idx is cut short"),
    "no marks": (lambda b, i: damage(i, 26, b"\0" * 8), "no document marks"),
    "length": (lambda b, i: damage(i, 34, b"\1\0\0\0"), "contradict their lengths"),
    "negative length": (lambda b, i: damage(i, 190, b"\xff" * 4), "contradict their lengths"),
    "offset": (lambda b, i: damage(i, 194, b"\2"), "contradict their lengths"),
    "first mark": (lambda b, i: damage(i, 514, b"\1"), "document marks do not run"),
    "middle mark": (lambda b, i: damage(i, 522, b"\x20"), "document marks do not run"),
    "last mark": (lambda b, i: damage(i, 834, b"\x29"), "document marks do not run"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_data_is_refused_by_name(case, tmp_path):
    bin_, idx = build(tmp_path, range(10, 50))
    assert idx.stat().st_size == 842
    assert check_indexed_dataset(str(tmp_path / "c")) == (40, sum(range(10, 50)), np.uint16)
    change, sentence = DAMAGES[case]
    change(bin_, idx)
    with pytest.raises(VirtualWidthError) as refusal:
        check_indexed_dataset(str(tmp_path / "c"))
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_data_set_without_tokens_is_refused(tmp_path):
    build(tmp_path, [])
    with pytest.raises(VirtualWidthError, match="holds no tokens"):
        check_indexed_dataset(str(tmp_path / "c"))


def test_a_description_that_is_none_is_refused(tmp_path):
    assert read_description(str(tmp_path / "c")) is None
    for content in ("", "[]", '{"tokens": 3}'):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(VirtualWidthError, match="does not describe"):
            read_description(str(tmp_path / "c"))


DESCRIPTION = {
    "documents": 40,
    "tokens": sum(range(10, 50)),
    "text_bytes": 5000,
    "vocabulary_size": 50,
    "vocabulary_sha256": "0" * 64,
    "end_of_document": 0,
}


@pytest.mark.parametrize("name", DESCRIPTION)
def test_a_description_of_wrong_types_or_values_is_refused(name, tmp_path):
    build(tmp_path, range(10, 50))
    (tmp_path / "c.json").write_text(json.dumps(DESCRIPTION))
    assert check_indexed_dataset(str(tmp_path / "c")).documents == 40
    wrong = [None, "5", [], {}, 1.5, True, -1] if name != "vocabulary_sha256" else [None, 5, []]
    for value in wrong:
        (tmp_path / "c.json").write_text(json.dumps(DESCRIPTION | {name: value}))
        with pytest.raises(VirtualWidthError, match=f"does not describe a data set .{name} is ") as refusal:
            check_indexed_dataset(str(tmp_path / "c"))
        assert "\n" not in str(refusal.value)
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(VirtualWidthError, match="does not describe a data set"):
        read_description(str(tmp_path / "c"))


@pytest.mark.parametrize("name", ["documents", "tokens"])
def test_a_description_of_other_data_is_refused(name, tmp_path):
    build(tmp_path, range(10, 50))
    (tmp_path / "c.json").write_text(json.dumps(DESCRIPTION | {name: DESCRIPTION[name] + 1}))
    with pytest.raises(VirtualWidthError, match=r"c\.json is of other data"):
        check_indexed_dataset(str(tmp_path / "c"))


@pytest.mark.parametrize("most", [1, 7, 100, 10_000])
def test_the_range_of_a_part_of_the_tokens(most, tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_BLOCK", 5)
    build(tmp_path, [30, 50, 40])
    smallest, largest = indexed.token_range(str(tmp_path / "c"), most)
    assert smallest == 0 and largest <= 49
    if most >= 120:
        assert largest == 49
