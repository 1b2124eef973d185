"""Which files of a corpus are read, that none is passed over in silence, and that a broken one is named."""

import bz2
import gzip
import json
import os
import sys

import pyarrow
import pytest
from pyarrow import parquet

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.documents import Format, read_batches
from megatron_vwn.data.files import find_corpus


def line(text):
    return json.dumps({"text": text}).encode() + b"\n"


def rows(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)


def read(*inputs, key="text"):
    """Texts and notes."""
    files, notes = find_corpus([str(each) for each in inputs], key)
    batches = read_batches(files, Format(b"\f", key))
    return [record.text(key) for batch in batches for record in batch.records], notes


def refusal(*inputs, key="text"):
    with pytest.raises(VirtualWidthError) as refused:
        read(*inputs, key=key)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_a_folder_is_read_whole(folder, tmp_path):
    (folder / "a.jsonl").write_bytes(line("a"))
    (folder / "b.JSONL").write_bytes(line("b"))
    (folder / "c.json").write_bytes(b"\n" + line("c1") + line("c2"))
    (folder / "d.jsonl.zst").write_bytes(pyarrow.compress(line("d"), codec="zstd", asbytes=True) * 2)
    (folder / "e.txt.GZ").write_bytes(gzip.compress(b"e"))
    rows(folder / "f.Parquet", text=["f1", "f2\n"], number=[1, 2])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "g.jsonl").write_bytes(line("g"))
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    texts, notes = read(folder)
    assert texts == ["a", "b", "c1", "c2", "d", "d", "e", "f1", "f2\n", "g"]
    assert notes == []


def test_what_is_left_out_is_named_and_counted(folder):
    (folder / "a.txt").write_text("a")
    for name in "bcdefgh":
        (folder / f"{name}.pdf").write_text("no text")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "info.json").write_text('{\n "text": 3\n}')
    (folder / "list.json").write_text('[{"text": "a"}]')
    (folder / "other.json").write_text('{"body": "a"}')
    texts, (other, no_lines) = read(folder)
    assert texts == ["a"]
    assert other.startswith("left out, because their suffixes are of no text (8): ") and other.endswith(" and 3 more")
    assert 'key "text" (3): ' in no_lines and all(name in no_lines for name in ("info.json", "list.json", "other.json"))
    assert "of a .json file every line must be" in refusal(folder / "info.json")
    assert "the line holds an array, not an object" in refusal(folder / "list.json")
    os.remove(folder / "a.txt")
    assert "holds no text: it has no file that ends in" in refusal(folder) and "other.json" in refusal(folder)


def test_what_is_named_twice_is_read_once(folder, tmp_path):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    (folder / "again.txt").hardlink_to(folder / "b.txt")
    (folder / "around").symlink_to(folder)  # a loop
    (folder / "sub" / "round").symlink_to(folder / "around")
    (tmp_path / "c.txt").symlink_to(folder / "sub" / "a.txt")
    texts, notes = read(folder, folder / "b.txt", tmp_path / "c.txt", folder)
    assert texts == ["b", "a"]
    (note,) = notes
    assert note.startswith("named twice, by two inputs or through a link, and read once (6): ")


BROKEN = {
    "a.jsonl.bz2": b"not bz2 at all, but called so",
    "b.jsonl.bz2": bz2.compress(os.urandom(999))[:-9],
    "a.txt.gz": b"",
    "b.txt.gz": gzip.compress(os.urandom(999))[:-99],
    "a.txt.xz": b"",
    "a.txt.zst": b"",
    "b.txt.zst": b"x\n",
    "c.txt.zst": pyarrow.compress(os.urandom(999), codec="zstd", asbytes=True)[:-9],
    "a.parquet": b"",
    "b.parquet": b"no Parquet file, but called so",
    "a.json.gz": b"no gz",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name, folder):
    (folder / name).write_bytes(BROKEN[name])
    for what in (folder, folder / name):
        sentence = refusal(what)
        assert sentence.startswith(f"{folder / name} cannot be ") and sentence.endswith("copy or make it again.")


def test_a_parquet_file_is_cut_short_or_damaged(folder):
    path = folder / "a.parquet"
    rows(path, text=[f"text {number}" for number in range(999)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert refusal(path).startswith(f"{path} cannot be read (")
    path.write_bytes(whole[:8] + b"\xff" * 40 + whole[48:])
    assert refusal(path).startswith(f"{path} cannot be read (")


def test_columns_that_hold_no_text_are_refused(folder):
    path = folder / "a.parquet"
    rows(path, text=["a", None], number=[1, 2], kind=pyarrow.array(["x", "y"]).dictionary_encode())
    assert refusal(path) == f'{path}, row 2: "text" holds null, not text; drop the row.'
    assert 'the column "number" holds int64, not text' in refusal(path, key="number")
    assert '--json-key (there are "text", "number", "kind").' in refusal(path, key="body")
    assert read(path, key="kind")[0] == ["x", "y"]


def test_without_pyarrow_the_extra_is_named(folder, monkeypatch):
    (folder / "a.txt").write_text("a")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert read(folder)[0] == ["a"]
    for name in ("b.jsonl.ZST", "c.parquet"):
        (folder / name).write_bytes(b"")
        assert f"{name} needs pyarrow" in refusal(folder / name) and "megatron_vwn[data]" in refusal(folder)


def test_keys_that_are_there_are_named(folder):
    path = folder / "a.jsonl"
    path.write_bytes(json.dumps({"content": "a", "line\nend": 1} | {f"k{number}": 0 for number in range(9)}).encode())
    sentence = refusal(path)
    assert sentence.startswith(f'{path}:1: there is no key "text"; name the key of the text with --json-key')
    assert '(there are "content", "line\\nend", "k0"' in sentence and sentence.endswith('"k7" and 1 more).')


def test_a_long_number_is_json(folder):
    (folder / "a.jsonl").write_text('{"text": "a", "number": ' + "9" * 5000 + "}")
    assert read(folder)[0] == ["a"]
