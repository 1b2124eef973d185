"""Tokenizers that are given to vwn-prepare-data, and the training of one."""

import json
import os
import random
import shutil
import signal
import string
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.__main__ import main
from megatron_vwn.data.apart import call_apart
from megatron_vwn.data.tokenizer import load, save
from megatron_vwn.data.train_tokenizer import train

TEXT = "Hello world, this is a text of 1234 words; don't read it twice.\n\n\tCaf\u00e9 \u4e2d\u6587."


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer") / "plain"
    save(train(iter([TEXT] * 9), 320).to_str(pretty=True), folder)
    return folder


@pytest.fixture
def changed(plain, tmp_path):
    """A copy of the folder with other values in its configuration."""

    def change(**values):
        folder = tmp_path / "changed"
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text()) | values
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return change


def refusal(folder):
    with pytest.raises(VirtualWidthError) as refused:
        load(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_special_tokens_of_the_configuration_alone_are_counted_as_training_counts_them(name, plain, changed):
    from megatron.core.tokenizers import MegatronTokenizer

    size = Tokenizer.from_file(str(plain / "tokenizer.json")).get_vocab_size()
    folder = changed(**{name: "<new>"})
    loaded = load(folder)
    assert loaded.token_of_id[size] == "<new>" and len(loaded.token_of_id) == size + 1
    assert loaded.end_of_document == (size if name == "eos_token" else 0)
    megatron = MegatronTokenizer.from_pretrained(str(folder), metadata_path={"library": "huggingface"})
    assert megatron.inv_vocab == loaded.token_of_id and megatron.eod == loaded.end_of_document
    assert loaded.encode("a <new> text")[:-1] == load(plain).encode("a <new> text")[:-1]  # text is taken literally


def test_a_class_that_encodes_otherwise_is_refused(changed):
    for name in ("TokenizersBackend", "GPT2Tokenizer"):
        assert load(changed(tokenizer_class=name)).encode(TEXT)
    for name in ("LlamaTokenizerFast", "Qwen2Tokenizer"):  # another treatment of blanks, of digits
        sentence = refusal(changed(tokenizer_class=name))
        assert "encodes text otherwise" in sentence and name in sentence and "PreTrainedTokenizerFast" in sentence


def test_code_of_a_tokenizer_is_not_run(changed, tmp_path):
    folder = changed(tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    assert "names code of its own, which is not run" in refusal(folder)
    assert not (tmp_path / "run").exists()


BROKEN = {
    "empty": (b"", None, "is no tokenizer"),
    "cut short": (b'{"version": "1.0", "tru', None, "is no tokenizer"),
    "no UTF-8": (b"\xff\xfe", None, "is no tokenizer"),
    "no configuration": (None, b"", "is no JSON"),
    "a list": (None, b"[]", "cannot be loaded"),
    "a number for a class": (None, b'{"tokenizer_class": 5, "eos_token": "a"}', "cannot be loaded"),
    "no end": (None, b"{}", 'names no "eos_token"'),
    "another model": (None, b'{"tokenizer_class": "BertTokenizer", "eos_token": "a"}', "encodes text otherwise"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case, changed):
    tokenizer, config, sentence = BROKEN[case]
    folder = changed()
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        if content is not None:
            (folder / name).write_bytes(content)
    assert str(folder) in refusal(folder) and sentence in refusal(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_name_of_the_hub_is_refused_before_any_worker_starts(workers, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    flags = ["--tokenizer", "Qwen/Qwen3-0.6B", "--output", str(tmp_path / "out"), "--workers", str(workers)]
    assert main([str(tmp_path / "a.txt"), *flags]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "Qwen/Qwen3-0.6B is no folder here" in sentence and "download" in sentence
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_word_of_megabytes_is_learnt_from_in_pieces(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a" * 1_000_000 + "\fhello," + "b" * 1000 + "\n" * 1500 + "end")
    begin = time.monotonic()
    flags = ["--train-tokenizer", "300", "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([str(tmp_path / "a.txt"), *flags]) == 0
    assert time.monotonic() - begin < 120  # and 13 minutes otherwise
    assert "words of more than 1,000 bytes, learnt from in pieces: 2\n" in capsys.readouterr().out


def test_the_bound_on_words_changes_no_other_tokenizer():
    by_library = Tokenizer(models.BPE())
    by_library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    by_library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    by_library.train_from_iterator([TEXT, "c" * 999], trainer)
    assert train(iter([TEXT, "c" * 999]), 320).to_str() == by_library.to_str()


def test_the_training_of_a_tokenizer_can_be_ended(tmp_path, capsys):
    random_ = random.Random(0)
    (tmp_path / "a.txt").write_text("".join(random_.choices(string.ascii_letters, k=3_000_000)))
    flags = ["--train-tokenizer", "60000", "--output", str(tmp_path / "out"), "--workers", "1"]
    timer = threading.Timer(4, os.kill, (os.getpid(), signal.SIGTERM))
    begin = time.monotonic()
    timer.start()
    assert main([str(tmp_path / "a.txt"), *flags]) == 143
    assert time.monotonic() - begin < 60  # the library takes minutes and hears nothing
    assert capsys.readouterr().err == "vwn-prepare-data: interrupted; nothing was written.\n"
    assert os.listdir(tmp_path) == ["a.txt"]
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split()
    assert not [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_process_that_dies_is_refused_and_its_errors_are_raised_here(tmp_path, monkeypatch):
    (tmp_path / "dies_at_once.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.syspath_prepend(tmp_path)  # the process has the same
    with pytest.raises(VirtualWidthError, match="a process died"):
        call_apart(import_module, "dies_at_once", progress=print)
    with pytest.raises(ModuleNotFoundError, match="is_not_there"):
        call_apart(import_module, "is_not_there", progress=print)


def test_no_room_for_the_tokenizer_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("text")
    write = Path.write_text

    def full(path, text):
        if path.name == "tokenizer.json":
            raise OSError(28, "No space left on device", str(path))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", full)
    flags = ["--train-tokenizer", "260", "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([str(tmp_path / "a.txt"), *flags]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in sentence and "tokenizer.json" in sentence
    assert os.listdir(tmp_path) == ["a.txt"]
