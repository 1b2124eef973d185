"""vwn-prepare-data: what it writes, what it refuses, and that it leaves nothing half-written."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import launch
import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_vwn.data import documents as _documents
from megatron_vwn.data.__main__ import main
from megatron_vwn.data.files import find_corpus
from megatron_vwn.data.indexed import check_indexed_dataset, read_description, vocabulary_fingerprint

AUSTEN = Path(__file__).parents[2] / "examples" / "quickstart" / "data" / "austen.txt.xz"
DOCUMENTS = [
    f"Document {number}: caf\u00e9 \u4e2d\u6587 \U0001f600\n\n  two   spaces, {number * 7}.\t" for number in range(40)
]


def run(*arguments, workers=1):
    return main([*map(str, arguments), "--workers", str(workers)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text file of all documents, its tokenizer and its data."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "corpus.txt").write_text("\n\f\n".join(DOCUMENTS))
    assert run(folder / "corpus.txt", "--train-tokenizer", 340, "--output", folder / "out" / "all") == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(corpus):
    return corpus / "out" / "all_tokenizer"


def texts(prefix, tokenizer_folder):
    """Documents as Megatron reads them, decoded, and checked to end with the end of document."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    found = []
    for ids in IndexedDataset(str(prefix)):
        assert ids[-1] == 0
        found.append(tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False))
    return found


def listing(folder):
    return sorted((str(path.relative_to(folder)), path.is_dir() or path.read_bytes()) for path in folder.rglob("*"))


def test_round_trip(corpus, tokenizer_folder):
    assert texts(corpus / "out" / "all", tokenizer_folder) == DOCUMENTS


def test_description_and_index_agree(corpus, tokenizer_folder):
    prefix = str(corpus / "out" / "all")
    size, description = check_indexed_dataset(prefix), read_description(prefix)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert (
        (size.documents, size.tokens)
        == (description.documents, description.tokens)
        == (40, len(np.fromfile(f"{prefix}.bin", dtype=np.uint16)))
    )
    assert size.dtype == np.uint16
    assert description.text_bytes == sum(len(document.encode()) for document in DOCUMENTS)
    assert description.vocabulary_size == tokenizer.get_vocab_size() == 340
    assert description.end_of_document == tokenizer.token_to_id("<|endoftext|>") == 0


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".ndjson"])
def test_every_format_gives_the_same_data(kind, suffix, compress, corpus, tokenizer_folder, tmp_path):
    if kind == ".txt":
        content = "\ufeff" + "\n\f\n".join(DOCUMENTS)
    else:
        content = "\n".join(json.dumps({"id": 1, "body": document}) for document in DOCUMENTS) + "\n\n"
    (tmp_path / f"corpus{kind}{suffix}").write_bytes(compress(content.encode()))
    arguments = ["--tokenizer", tokenizer_folder, "--json-key", "body", "--output", tmp_path / "out"]
    assert run(tmp_path / f"corpus{kind}{suffix}", *arguments) == 0
    for end in (".bin", ".idx", ".json"):
        assert (tmp_path / f"out{end}").read_bytes() == (corpus / "out" / f"all{end}").read_bytes()


def test_result_does_not_depend_on_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_documents, "_BATCH_BYTES", 1000)  # many batches out of little text
    (tmp_path / "a.txt").write_text("\f".join(DOCUMENTS))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": document[::-1]}) + "\n" for document in DOCUMENTS))
    arguments = [tmp_path / "a.txt", tmp_path / "b.jsonl", "--train-tokenizer", 500, "--validation-fraction", 0.25]
    for workers in (1, 3):
        assert run(*arguments, "--output", tmp_path / str(workers) / "out", workers=workers) == 0
    one, three = listing(tmp_path / "1"), listing(tmp_path / "3")
    assert one == three
    assert len(one) == 9  # twice three files, the folder of the tokenizer and its two


def test_folders_are_read_in_the_order_of_their_paths(tokenizer_folder, tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "c.txt").write_text("third")
    (tmp_path / "in" / "b" / "z.jsonl").write_text('{"text": "second"}')
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "in" / "README.md").write_text("not text of the corpus")
    assert run(tmp_path / "in", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out") == 0
    assert texts(tmp_path / "out", tokenizer_folder) == ["first", "second", "third"]


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_disjoint_and_complete(seed, tokenizer_folder, tmp_path):
    (tmp_path / "corpus.txt").write_text("\f".join(DOCUMENTS + DOCUMENTS[::-1]))
    arguments = ["--tokenizer", tokenizer_folder, "--validation-fraction", 0.25, "--seed", seed]
    assert run(tmp_path / "corpus.txt", *arguments, "--output", tmp_path / "out") == 0
    train, valid = (texts(tmp_path / f"out_{name}", tokenizer_folder) for name in ("train", "valid"))
    # Every document is there twice: copies must not be torn apart.
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(2 * DOCUMENTS)
    # 40 different documents with probability 1/4 each: 10, and 5 standard deviations (sqrt(7.5)) are 13.7.
    assert 0 < len(set(valid)) < 24


def test_the_seed_changes_the_split():
    held_out = [[_documents.is_held_out(text, 0.5, seed) for text in DOCUMENTS] for seed in (0, 1)]
    assert held_out[0] != held_out[1]


def test_the_tokenizer_never_sees_held_out_text(tmp_path):
    # One held-out document is nothing but a word that would be worth a token of its own.
    word = next(w for w in (f"zq{i}zq" for i in range(100)) if _documents.is_held_out(" ".join([w] * 500), 0.25, 0))
    (tmp_path / "corpus.txt").write_text("\f".join([*DOCUMENTS, " ".join([word] * 500)]))
    assert run(
        tmp_path / "corpus.txt", "--train-tokenizer", 300, "--validation-fraction", 0.25, "--output", tmp_path / "out"
    ) == 0  # fmt: skip
    vocabulary = Tokenizer.from_file(str(tmp_path / "out_tokenizer" / "tokenizer.json")).get_vocab()
    assert not any("zq" in token for token in vocabulary)


def test_special_tokens_in_text_are_text(tokenizer_folder, tmp_path):
    text = "A page about <|endoftext|> and <|padding|>."
    (tmp_path / "corpus.txt").write_text(text)
    assert run(tmp_path / "corpus.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out") == 0
    ids = np.fromfile(tmp_path / "out.bin", dtype=np.uint16)
    assert (ids <= 1).sum() == 1  # the end of document behind it
    assert texts(tmp_path / "out", tokenizer_folder) == [text]


def test_a_tokenizer_that_truncates_and_adds_tokens_is_used_literally(tokenizer_folder, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4000)
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    config = {"eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "corpus.txt").write_text("\f".join(DOCUMENTS))
    assert run(tmp_path / "corpus.txt", "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "out") == 0
    assert texts(tmp_path / "out", tokenizer_folder) == DOCUMENTS


def test_separators_across_reads_and_escapes(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(_documents, "_READ_BYTES", 3)
    (tmp_path / "corpus.txt").write_text("\u00e9\u00e9\n===\u00a7\n\n\nb\n===\u00a7c ===\n===\u00a7\n===\u00a7")
    arguments = ["--tokenizer", tokenizer_folder, "--document-separator", "\\n===\u00a7"]
    assert run(tmp_path / "corpus.txt", *arguments, "--output", tmp_path / "out") == 0
    assert texts(tmp_path / "out", tokenizer_folder) == ["\u00e9\u00e9", "b", "c ==="]


def test_transformers_and_megatron_agree_on_the_tokenizer(corpus, tokenizer_folder):
    from megatron.core.tokenizers import MegatronTokenizer
    from transformers import AutoTokenizer

    hugging_face = AutoTokenizer.from_pretrained(tokenizer_folder)
    megatron = MegatronTokenizer.from_pretrained(str(tokenizer_folder), metadata_path={"library": "huggingface"})
    description = read_description(str(corpus / "out" / "all"))
    ids = np.fromfile(corpus / "out" / "all.bin", dtype=np.uint16).tolist()
    assert [token for text in DOCUMENTS for token in [*hugging_face(text).input_ids, 0]] == ids
    assert hugging_face.decode(hugging_face(DOCUMENTS[3]).input_ids) == DOCUMENTS[3]
    assert (hugging_face.eos_token_id, hugging_face.bos_token_id, hugging_face.pad_token_id) == (0, 0, 1)
    assert (megatron.eod, megatron.pad, megatron.vocab_size) == (0, 1, description.vocabulary_size)
    assert vocabulary_fingerprint(megatron.inv_vocab) == description.vocabulary_sha256


def test_overwrite_replaces_data_and_stale_indices(tokenizer_folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    assert run(tmp_path / "a.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out") == 0
    cache = tmp_path / "out" / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    before = listing(tmp_path)
    assert run(tmp_path / "b.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out") == 2
    assert "out.bin exists: choose another --output or add --overwrite." in capsys.readouterr().err
    assert listing(tmp_path) == before
    assert run(tmp_path / "b.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out", "--overwrite") == 0
    assert texts(tmp_path / "out", tokenizer_folder) == ["second"]
    assert not cache.exists()


def test_summary(tokenizer_folder, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("abc\f  \n \fdef\f")
    assert run(tmp_path / "corpus.txt", "--train-tokenizer", 1000, "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out.splitlines()
    # "abc" and "def" are two merges each, hence 262 tokens, and one token per document besides its end.
    assert out[0].endswith("out.{bin,idx,json}: 2 documents, 4 tokens (uint16), 1.500 bytes per token")
    assert out[1].endswith("out_tokenizer: 262 tokens of 1,000 asked for: the text has no more pairs to merge")
    assert out[2] == "2 empty documents were dropped"


# Per refusal: name and bytes of the input (None: no such file), further arguments, part of the sentence.
REFUSALS = {
    "missing file": ("missing.txt", None, [], "missing.txt does not exist"),
    "unknown kind": ("a.pdf", b"text", [], "a.pdf is of an unknown kind"),
    "empty folder": ("folder/a.pdf", b"text", [], "folder holds no text"),
    "empty text": ("a.txt", b"", [], "holds no text"),
    "only blanks": ("a.txt", b" \n\f\t\n", [], "its 2 documents are empty"),
    "empty jsonl": ("a.jsonl", b"\n\n", [], "holds no text"),
    "undecodable text": ("a.txt", b"abc\fd\xff", [], "a.txt, byte 5: the text is not UTF-8"),
    "undecodable line": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', [], "a.jsonl:2: the text is not UTF-8"),
    "invalid line": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', [], "a.jsonl:3: the line is not valid JSON"),
    "deep line": ("a.jsonl", b"[" * 100_000, [], "a.jsonl:1: the line is not usable JSON"),
    "no object": ("a.jsonl", b"[1]\n", [], "a.jsonl:1: the line holds an array, not an object"),
    "missing key": ("a.jsonl", b'{"body": "a"}\n', [], 'a.jsonl:1: there is no key "text"'),
    "number": ("a.jsonl", b'{"text": 7}\n', [], 'a.jsonl:1: "text" holds a number, not text'),
    "half a character": ("a.jsonl", b'{"text": "\\ud800"}\n', [], "a.jsonl:1: the text holds half of a surrogate pair"),
    "no archive": ("a.txt.gz", b"plain", [], "a.txt.gz cannot be decompressed"),
    "short gz": ("a.txt.gz", gzip.compress(os.urandom(9999).hex().encode())[:-99], [], "a.txt.gz cannot be decompr"),
    "short xz": ("a.txt.xz", lzma.compress(os.urandom(9999).hex().encode())[:-99], [], "a.txt.xz cannot be decompr"),
    "short bz2": ("a.txt.bz2", bz2.compress(os.urandom(9999).hex().encode())[:-99], [], "a.txt.bz2 cannot be decompr"),
    "small vocabulary": ("a.txt", b"text", ["--train-tokenizer", "257"], "need at least 258"),
    "large vocabulary": ("a.txt", b"text", ["--train-tokenizer", "9" * 21], "is too large: give at most 16777216"),
    "long seed": ("a.txt", b"text", ["--seed", "9" * 65], "is too long: give at most 64 digits"),
    "no tokenizer": ("a.txt", b"text", ["--tokenizer", "."], ". has no tokenizer.json"),
    "no validation": ("a.txt", b"text", ["--validation-fraction", "0.001"], "none of 1 documents fell to validation"),
    "no training": ("a.txt", b"text", ["--validation-fraction", "0.999"], "none of 1 documents fell to training"),
    "fraction": ("a.txt", b"text", ["--validation-fraction", "1"], "--validation-fraction is 1.0"),
    "separator": ("a.txt", b"text", ["--document-separator", ""], "--document-separator is empty"),
    **{
        f"escape {text}": ("a.txt", b"text", ["--document-separator", text], f"{text} has an unknown escape")
        for text in ("\\x", "\\q", "\\\u4e2d", "a\\", r"\777", r"\N{NO SUCH}", r"\ud800")
    },
    **{
        f"output {text}": ("a.txt", b"text", ["--output", text], f"--output {text} is no prefix: end it with a name")
        for text in (".", "..", "../", "new/..", "new/.", "new/", "", "/")
    },
    "output in a file": ("a.txt", b"text", ["--output", "a.txt/out"], "a.txt"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_sentence_and_leave_nothing(case, tokenizer_folder, tmp_path, monkeypatch, capsys):
    name, content, arguments, sentence = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    if not {"--tokenizer", "--train-tokenizer"} & set(arguments):
        arguments = [*arguments, "--tokenizer", tokenizer_folder]
    if "--output" not in arguments:
        arguments = [*arguments, "--output", "new/folder/out"]
    before = listing(tmp_path)
    assert run(name.split("/")[0], *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vwn-prepare-data: ") and sentence in captured.err
    assert captured.err.count("\n") == 1
    assert listing(tmp_path) == before


@pytest.mark.parametrize("case", ["missing key", "undecodable text", "short gz"])
def test_refusals_come_through_workers_and_tokenizer_training(case, tmp_path, capsys):
    name, content, _, sentence = REFUSALS[case]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.txt").write_text("some text")
    assert run(tmp_path / "tokenizer.txt", "--train-tokenizer", 258, "--output", tmp_path / "t") == 0
    capsys.readouterr()
    before = listing(tmp_path)
    for tokenizer, workers in ((["--train-tokenizer", 300], 1), (["--tokenizer", tmp_path / "t_tokenizer"], 2)):
        assert run(tmp_path / name, *tokenizer, "--output", tmp_path / "out", workers=workers) == 2
        captured = capsys.readouterr()
        assert sentence in captured.err and captured.err.count("\n") == 1
        assert listing(tmp_path) == before


def test_a_corpus_without_separators_is_refused_before_it_fills_memory(tokenizer_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_documents, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("x" * 5000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 5000}))
    for name, sentence in (
        ("a.txt", "say what stands between documents"),
        ("a.jsonl", "a.jsonl:1: the line is longer"),
    ):
        assert run(tmp_path / name, "--tokenizer", tokenizer_folder, "--output", tmp_path / "out") == 2
        assert sentence in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(tokenizer_folder, tmp_path, monkeypatch, capsys):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def full(self, idx_path):
        raise OSError(28, "No space left on device", idx_path)

    monkeypatch.setattr(IndexedDatasetBuilder, "finalize", full)
    (tmp_path / "a.txt").write_text("text")
    before = listing(tmp_path)
    assert run(tmp_path / "a.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert listing(tmp_path) == before


def test_help_does_not_import_megatron():
    code = "import sys; from megatron_vwn.data.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = "assert not {'torch', 'megatron', 'transformers'} & {name.split('.')[0] for name in sys.modules}"
    done = launch.real(0, "-c", code + heavy)
    assert done.returncode == 0, done.stderr


def test_the_example_corpus(tmp_path):
    files, notes = find_corpus([str(AUSTEN)], "text")
    assert not notes
    records = [r for b in _documents.read_batches(files, _documents.Format(b"\f", "text")) for r in b.records]
    chapters = [record.text("text") for record in records]
    assert len(chapters) == 269
    assert chapters[0].startswith("EMMA\n\nBy Jane Austen") and chapters[-1].endswith("THE END")
    assert chapters.count("") == 0 and min(map(len, chapters)) > 3000
    assert {character for chapter in chapters for character in chapter if not character.isascii()} == {"\u00a3"}
