"""examples/evaluate: the data that its script makes of the novels, and lm-eval on them without a network."""

import json
import lzma
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import launch
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_vwn.data import __main__ as prepare_data
from megatron_vwn.data.documents import Format
from megatron_vwn.data.tokenizer import save
from megatron_vwn.data.train_tokenizer import train
from megatron_vwn.hf import VWNConfig, VWNForCausalLM, add_code

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "evaluate"))

import make_data
import quickstart
import score
from evaluation import FOLDER, RESULTS
from heldout import Text, bits_per_byte, read_text

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LENGTH = 128


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The texts and the questions."""
    folder = tmp_path_factory.mktemp("data")
    assert make_data.main(["--output", str(folder)]) == 0
    return [row["text"] for row in lines(folder / "heldout.jsonl")], lines(folder / "next_sentence.jsonl")


def test_the_split_is_that_of_the_quickstart(data, monkeypatch, tmp_path):
    called = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quickstart, "DATA", tmp_path / "data" / "austen")
    monkeypatch.setattr(quickstart, "run_logged", lambda command, log: called.append(command) or iter(()))
    quickstart.prepare_data(quickstart.Clock(0))
    (_, _, module, *flags) = called[0]
    assert f"{module}.__main__" == prepare_data.__name__
    told = prepare_data._parser().parse_args(flags)
    form = Format(b"\f", told.json_key)
    assert make_data.held_out_documents(told.inputs, form, told.validation_fraction, told.seed) == data[0]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_the_split_is_that_of_vwn_prepare_data(kind, tmp_path):
    documents = [f"Document {number}.\n" * 3 for number in range(60)]
    text, how = "\n===\n".join(documents), ["--document-separator", r"\n===\n"]
    if kind == "jsonl":
        text, how = "".join(json.dumps({"content": each}) + "\n" for each in documents), ["--json-key", "content"]
    (tmp_path / f"corpus.{kind}").write_text(text)
    flags = [str(tmp_path / f"corpus.{kind}"), *how, "--validation-fraction", "0.3", "--seed", "4", "--output"]
    assert make_data.main([*flags, str(tmp_path / "out")]) == 0
    assert prepare_data.main([*flags, str(tmp_path / "p"), "--train-tokenizer", "270", "--workers", "1"]) == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "p_tokenizer" / "tokenizer.json"))
    held_out = [tokenizer.decode(document) for document in read_text(str(tmp_path / "p_valid")).documents]
    assert [row["text"] for row in lines(tmp_path / "out" / "heldout.jsonl")] == held_out
    assert 5 < len(held_out) < 40


def test_what_cannot_be_made_is_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "corpus.jsonl").write_text('{"content": "a"}\n')
    corpus, out = str(tmp_path / "corpus.jsonl"), str(tmp_path / "out")
    for flags, words in (
        ([corpus, "--output", out], 'name the key of the text with --json-key (there are "content")'),
        ([corpus, "--output", out, "--json-key", "content"], "no document is held out"),
        ([corpus, "--output", f"{corpus}/out", "--json-key", "content", "--validation-fraction", "1"], "corpus.jsonl"),
    ):
        assert make_data.main(flags) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert sentence.startswith("make_data.py: ") and words in sentence
    with pytest.raises(SystemExit, match="2"):
        make_data.main([corpus])
    assert "--output is missing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_the_same_files_every_time(data, tmp_path):
    script = EXAMPLES / "evaluate" / "make_data.py"
    done = launch.real(0, script, "--output", tmp_path, env={"PYTHONHASHSEED": "7"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ([row["text"] for row in lines(tmp_path / "heldout.jsonl")], lines(tmp_path / "next_sentence.jsonl")) == data


def test_nothing_was_trained_on(data):
    texts, questions = data
    novels = lzma.decompress(make_data.NOVELS.read_bytes()).decode()
    training = [text.strip("\n") for text in novels.split("\f")]
    for text in texts:
        training.remove(text)
    trained = " ".join(" ".join(training).split())
    for question in questions:
        for sentence in (question["context"], *question["choices"]):
            assert sentence not in trained


def test_questions_can_be_answered_by_the_text_alone(data):
    texts, questions = data
    documents = [" ".join(text.split()) for text in texts]
    assert len(questions) > 200
    for question in questions:
        context, choices = question["context"], question["choices"]
        right = choices[question["answer"]]
        (source,) = [document for document in documents if f"{context} {right}" in document]
        assert len(set(choices)) == make_data.CHOICES
        assert not [wrong for wrong in choices if wrong != right and wrong in source]
        lengths = [len(choice) for choice in choices]
        assert max(abs(length - len(right)) for length in lengths) <= make_data.LENGTHS_APART * len(right)


def test_the_place_of_the_answer_tells_nothing(data):
    places = [question["answer"] for question in data[1]]
    counts = [places.count(place) for place in range(make_data.CHOICES)]
    assert min(counts) > 0.7 * len(places) / make_data.CHOICES


def test_sentences_do_not_end_behind_a_title():
    text = (
        "She had known Mr. Elton and Mrs. Weston for years. " * 3 + '"Was it not so?" The answer of Dr. Perry was no!\n'
    )
    found = [sentence.text for sentence in make_data.sentences([text.strip() + " He left them."])]
    assert "The answer of Dr. Perry was no!" not in found  # too short to be asked for
    assert set(found) == {"She had known Mr. Elton and Mrs. Weston for years."}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, data):
    """A small model as vwn-convert writes one, with a tokenizer, and some of the data in a folder of their own."""
    folder = tmp_path_factory.mktemp("exported")
    save(train(iter(data[0][:2]), 400).to_str(), folder / FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(folder / FOLDER)
    torch.manual_seed(0)
    config = VWNConfig(
        vocab_size=512,  # more than tokens, as exports of earlier versions have
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        hybrid_pattern="*-*-",
        vwn_m=2,
        vwn_n=4,
        initializer_range=0.2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    VWNForCausalLM(config).save_pretrained(folder / FOLDER)
    add_code(folder / FOLDER)
    texts = [text[:3000] for text in data[0][:3]]
    make_data.write_tasks(folder / "tasks", [{"text": text} for text in texts], data[1][:20])
    return folder, texts


def test_the_quickstart_scores_a_run_once(exported, tmp_path):
    folder, texts = exported
    (tmp_path / "texts.txt").write_text("\n\f\n".join(texts))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER).symlink_to(folder / FOLDER)
    flags = ["--tokenizer", str(folder / FOLDER), "--output", str(tmp_path / "texts"), "--workers", "1"]
    assert prepare_data.main([str(tmp_path / "texts.txt"), *flags]) == 0
    path = tmp_path / "run" / RESULTS
    score.main(str(tmp_path / "texts"), str(tmp_path / "run"))
    results = json.loads(path.read_text())
    # Without training every token is about as likely as any other.
    tokens = sum(len(document) for document in read_text(str(tmp_path / "texts")).documents)
    uniform = math.log2(512) * tokens / sum(len(text.strip("\n").encode()) for text in texts)
    assert results["bits_per_byte"] == pytest.approx(uniform, rel=0.1)
    path.unlink()
    score.main(str(tmp_path / "texts"), str(tmp_path / "run"))
    assert json.loads(path.read_text()) == results
    assert len(results["paragraph"]) > score.TOKENS
    path.write_text("earlier")
    score.main(str(tmp_path / "texts"), str(tmp_path / "run"))
    assert path.read_text() == "earlier"


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: extra evaluate")
def test_lm_eval_finds_our_bits_per_byte_without_a_network(exported, tmp_path):
    folder, texts = exported
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = ["-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={folder / FOLDER},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(folder / "tasks"), "--tasks", "vwn_heldout,vwn_next_sentence"]
    done = launch.real(0, *command, "--output_path", tmp_path / "out", env=offline, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    tokenizer = AutoTokenizer.from_pretrained(folder / FOLDER)
    documents = [tokenizer(text).input_ids for text in texts]
    text = Text(documents, tokenizer.eos_token_id, sum(len(text.encode()) for text in texts))
    ours = bits_per_byte(VWNForCausalLM.from_pretrained(folder / FOLDER), text, LENGTH)
    assert results["vwn_heldout"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-3)
    assert 0 <= results["vwn_next_sentence"]["acc,none"] <= 0.7  # it knows nothing
