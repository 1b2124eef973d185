"""The data of a run: two emulated ranks (session_data.py) on a small prepared corpus, and refusals without any rank."""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import launch
import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_vwn.data.__main__ import main

SEQUENCE, MICRO_BATCH, EVAL_MICRO_BATCH, VOCABULARY = 16, 2, 3, 280
# Every document begins with its number and differs from the others everywhere, so that text shows where it is from.
DOCUMENTS = [f"{number}. " + " ".join(f"word{number}x{place}" for place in range(40)) for number in range(12)]


def prepare(folder, name, documents, vocabulary):
    source = folder / f"{name}.txt"
    source.write_text("\n\f\n".join(documents))
    arguments = [str(source), "--train-tokenizer", str(vocabulary), "--validation-fraction", "0.3", "--workers", "1"]
    assert main([*arguments, "--output", str(folder / name)]) == 0
    return folder / name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus"), "corpus", DOCUMENTS, VOCABULARY)


@pytest.fixture(scope="module")
def ranks(corpus, tmp_path_factory):
    """What both ranks saw."""
    folder = tmp_path_factory.mktemp("session")
    other = prepare(folder, "other", [document[::-1] for document in DOCUMENTS], VOCABULARY)
    # fmt: off
    flags = [
        "--train-data-path", f"{corpus}_train", "--valid-data-path", f"{corpus}_valid",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{corpus}_tokenizer",
        "--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE), "--num-layers", "2",
        "--hidden-size", "8", "--num-attention-heads", "2", "--micro-batch-size", str(MICRO_BATCH),
        "--eval-micro-batch-size", str(EVAL_MICRO_BATCH), "--eval-global-batch-size", str(2 * EVAL_MICRO_BATCH),
        "--global-batch-size", "4", "--train-iters", "10", "--lr", "1e-3", "--distributed-backend", "gloo",
        "--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion",
        "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion",
    ]
    # fmt: on
    script = Path(__file__).parent / "session_data.py"
    done = launch.session(2, script, folder, f"{corpus}_train", f"{other}_train", *flags, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def batch_of(rank, layout, chunk=0):
    return rank[layout]["chunks"][chunk]["batch"]


def test_labels_are_the_next_tokens_and_text_is_of_the_training_split(ranks, corpus):
    tokenizer = Tokenizer.from_file(str(Path(f"{corpus}_tokenizer") / "tokenizer.json"))
    training = json.loads(Path(f"{corpus}_train.json").read_text())
    text = np.fromfile(f"{corpus}_train.bin", dtype=np.uint16).tolist()
    assert len(text) == training["tokens"]
    # A sample runs over the end of a document into another one that was shuffled behind it: compare pieces.
    whole = tokenizer.decode(text, skip_special_tokens=False).split("<|endoftext|>")
    batch = batch_of(ranks[0], "data")
    assert np.shape(batch["tokens"]) == np.shape(batch["labels"]) == (MICRO_BATCH, SEQUENCE)
    for tokens, labels, mask, positions in zip(*(batch[key] for key in list(batch)[:4]), strict=True):
        assert labels[:-1] == tokens[1:]
        assert mask == [1.0] * SEQUENCE
        assert positions == list(range(SEQUENCE))
        pieces = tokenizer.decode([tokens[0], *labels], skip_special_tokens=False).split("<|endoftext|>")
        assert all(any(piece in document for document in whole) for piece in pieces)
    causal = np.triu(np.ones((SEQUENCE, SEQUENCE), dtype=bool), 1)
    assert (np.array(batch["attention_mask"]) == causal).all()


def test_every_rank_of_plain_data_parallelism_has_the_same_datasets(ranks):
    for rank in ranks:
        assert rank["data"]["chunks"][0]["has"] == {"train": True, "valid": True, "test": False}
        assert batch_of(rank, "data") == batch_of(ranks[0], "data")


def test_tensor_parallel_ranks_receive_what_the_first_one_read(ranks):
    assert [rank["tensor"]["chunks"][0]["has"]["train"] for rank in ranks] == [True, False]
    for rank in ranks:
        assert batch_of(rank, "tensor") == batch_of(ranks[0], "data")


def test_evaluation_may_have_another_micro_batch_than_training(ranks):
    for layout in ("data", "tensor"):
        for rank in ranks:
            assert rank[layout]["steps"]["training"]["shape"] == [MICRO_BATCH, SEQUENCE]
            assert rank[layout]["steps"]["evaluation"]["shape"] == [EVAL_MICRO_BATCH, SEQUENCE]
            assert rank[layout]["steps"]["evaluation"] == ranks[0]["data"]["steps"]["evaluation"]


def test_context_parallel_ranks_share_the_sequence_in_zigzag(ranks):
    whole = batch_of(ranks[0], "data")
    quarter = SEQUENCE // 4
    for number, rank in enumerate(ranks):
        places = [*range(number * quarter, (number + 1) * quarter)]
        places += range(SEQUENCE - (number + 1) * quarter, SEQUENCE - number * quarter)
        batch = batch_of(rank, "context")
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert (np.array(batch[key]) == np.array(whole[key])[:, places]).all()
        assert (np.array(batch["attention_mask"]) == np.array(whole["attention_mask"])[:, :, places]).all()


@pytest.mark.parametrize("layout", ["pipeline", "interleaved"])
def test_pipeline_stages_get_what_they_use(ranks, layout):
    whole = batch_of(ranks[0], "data")
    first, last = batch_of(ranks[0], layout), batch_of(ranks[1], layout, -1)
    assert first == whole | {"labels": None, "loss_mask": None}
    assert last == whole | {"tokens": None, "position_ids": None}
    if layout == "interleaved":
        for between in (ranks[0][layout]["chunks"][1], ranks[1][layout]["chunks"][0]):
            assert set(between["batch"].values()) == {None}
            assert not any(between["has"].values())


def test_the_last_stage_gets_everything_for_multi_token_prediction(ranks):
    assert batch_of(ranks[1], "pipeline_mtp") == batch_of(ranks[0], "data")


def test_loss_is_a_sum_over_tokens_with_their_number(ranks):
    for layout in ("data", "tensor", "context"):
        for rank in ranks:
            step = rank[layout]["steps"]["training"]
            # Losses are token ids below 280: sums of so few integers are exact in fp32.
            assert step["loss"] == np.sum(step["labels"])
            assert step["num_tokens"] == np.size(step["labels"])
            assert step["dtypes"] == ["torch.float32", "torch.int32"]
            assert step["report"] == [step["loss"], step["num_tokens"]]
    # Context-parallel ranks count their own tokens; Megatron adds them up.
    parts = [rank["context"]["steps"]["training"] for rank in ranks]
    whole = ranks[0]["data"]["steps"]["training"]
    assert [sum(values) for values in zip(*(part["report"] for part in parts), strict=True)] == whole["report"]


def test_data_of_another_vocabulary_is_refused(ranks):
    for rank in ranks:
        assert rank["vocabulary"] is None
        assert "tokenised with another vocabulary" in rank["other vocabulary"]


def test_a_batch_of_ids_beyond_the_vocabulary_is_refused(ranks):
    for rank in ranks:
        accepted, refused = rank["data"]["beyond"]
        assert accepted is None
        assert refused == (
            f"a batch of the data holds the token id {VOCABULARY}, and those of the tokenizer of this run are 0 to "
            f"{VOCABULARY - 1}: give the tokenizer that the data was prepared with."
        )


# fmt: off
PARSED = {
    "data_path": None, "data_args_path": None, "train_data_path": None, "valid_data_path": None, "test_data_path": None,
    "per_split_data_args_path": None, "mock_data": False, "split": None, "data_cache_path": None,
    "dataloader_inter_document_masking": False, "hybrid_context_parallel": False, "dataloader_type": None,
    "full_validation": False, "multiple_validation_sets": False, "micro_batch_size": 2, "eval_micro_batch_size": None,
    "reset_attention_mask": False, "create_attention_mask_in_dataloader": True, "transformer_impl": "local",
    "masked_softmax_fusion": False,
}
# fmt: on


def flags(**changed):
    return Namespace(**PARSED | changed)


def test_prefixes_of_every_kind_of_flag(tmp_path):
    from megatron_vwn.training.refusals.data import data_prefixes

    listed, per_split = tmp_path / "list.txt", tmp_path / "splits.json"
    listed.write_text("0.25 a\n0.75 b\n")
    per_split.write_text(json.dumps({"train": "1 a 2 b", "valid": ["c"], "test": None}))
    assert data_prefixes(flags(data_path=["a"])) == ["a"]
    assert data_prefixes(flags(data_path=["30", "a", "70", "b"])) == ["a", "b"]
    assert data_prefixes(flags(data_path=["a", "b", "a"])) == ["a", "b"]
    assert data_prefixes(flags(data_args_path=str(listed))) == ["a", "b"]
    assert data_prefixes(flags(train_data_path=["a", "b"], test_data_path=["1", "a"])) == ["a", "b"]
    assert data_prefixes(flags(per_split_data_args_path=str(per_split))) == ["a", "b", "c"]
    assert data_prefixes(flags(data_path=["1", "s3://bucket/a", "1", "b"])) == ["b"]
    assert data_prefixes(flags(mock_data=True)) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, "exactly one source of data"),
        ({"mock_data": True, "data_args_path": "a"}, "exactly one source of data"),
        ({"data_path": ["a"], "train_data_path": ["a"]}, "exactly one source of data"),
        ({"train_data_path": ["a"], "split": "9,1,0"}, "drop --split"),
        ({"data_args_path": "a"}, "needs --split"),
        ({"data_args_path": "missing", "split": "9,1,0"}, "missing cannot be read"),
        ({"data_path": ["a", "b", "1", "c"]}, "weights for some data sets only"),
        ({"data_path": ["missing"]}, "missing.idx does not exist"),
        ({"data_path": ["missing.bin"]}, "without its suffix"),
        ({"mock_data": True, "dataloader_inter_document_masking": True}, "--dataloader-inter-document-masking"),
        ({"mock_data": True, "dataloader_type": "external"}, "--dataloader-type external"),
        ({"mock_data": True, "full_validation": True}, "only together"),
        ({"mock_data": True, "multiple_validation_sets": True}, "only together"),
        ({"mock_data": True, "full_validation": True, "multiple_validation_sets": True}, "--eval-micro-batch-size 1"),
        ({"mock_data": True, "reset_attention_mask": True, "masked_softmax_fusion": True}, "no effect"),
        ({"mock_data": True, "reset_attention_mask": True, "transformer_impl": "transformer_engine"}, "no effect"),
    ],
)
def test_refused_flags(changed, sentence, tmp_path, monkeypatch):
    from megatron_vwn.config import VirtualWidthError
    from megatron_vwn.training.refusals.data import check_data

    monkeypatch.chdir(tmp_path)
    with pytest.raises(VirtualWidthError, match=sentence) as refusal:
        check_data(flags(**changed))
    assert "\n" not in str(refusal.value)


def test_flags_that_are_refused_exist_in_megatron(monkeypatch):
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["train"])
    assert PARSED.keys() <= vars(parse_args()).keys()


def test_data_that_nothing_may_be_written_beside_needs_another_place_for_its_indices(corpus, tmp_path, monkeypatch):
    from megatron_vwn.config import VirtualWidthError
    from megatron_vwn.training.refusals import data

    # Root may write anywhere.
    monkeypatch.setattr(data.os, "access", lambda path, mode: Path(path).is_relative_to(tmp_path / "free"))
    (tmp_path / "free").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus}_valid{suffix}", tmp_path / f"a{suffix}")
    prefix = str(tmp_path / "a")
    with pytest.raises(VirtualWidthError, match=r"no place.*give a folder with --data-cache-path"):
        data.check_data(flags(data_path=[prefix]))
    with pytest.raises(VirtualWidthError, match=r"no place.*give another folder with --data-cache-path"):
        data.check_data(flags(data_path=[prefix], data_cache_path=str(tmp_path / "cache")))
    data.check_data(flags(data_path=[prefix], data_cache_path=str(tmp_path / "free" / "cache")))
    monkeypatch.setenv("RANK", "1")
    data.check_data(flags(data_path=[prefix]))  # the first rank alone writes
    monkeypatch.delenv("RANK")
    cache = Path(prefix) / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    (cache / "0-GPTDataset-train-description.txt").touch()
    data.check_data(flags(data_path=[prefix]))  # there may be all that the run needs


@pytest.mark.parametrize(
    ("fault", "fast", "sentence"),
    [
        (
            OSError(28, "No space left on device", "index"),
            False,
            r"written .*No space left on device.*--data-cache-path",
        ),
        (FileNotFoundError(2, "No such file", "index"), True, r"read .*run once without --dataloader-fast-cache-load"),
    ],
)
def test_indices_that_cannot_be_used_are_one_sentence(fault, fast, sentence, monkeypatch):
    from megatron_vwn.config import VirtualWidthError
    from megatron_vwn.training import batch

    class Builder:
        def __init__(self, *arguments):
            pass

        def build(self):
            raise Exception("Failed to write dataset materials") from fault

    monkeypatch.setattr(batch, "BlendedMegatronDatasetBuilder", Builder)
    monkeypatch.setattr(batch, "get_args", lambda: Namespace(mock_data=True, dataloader_fast_cache_load=fast))
    for name in ("get_tokenizer", "_dataset_config"):
        monkeypatch.setattr(batch, name, lambda *arguments: None)
    with pytest.raises(VirtualWidthError, match=sentence):
        batch.train_valid_test_datasets_provider((1, 1, 1))


def test_vocabulary_of_a_tokenizer_that_knows_only_ids(corpus):
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    from megatron_vwn.config import VirtualWidthError
    from megatron_vwn.training.refusals.data import check_vocabulary

    check_vocabulary(f"{corpus}_train", NullTokenizer(VOCABULARY))
    with pytest.raises(VirtualWidthError, match="280 tokens and the tokenizer of this run has 279"):
        check_vocabulary(f"{corpus}_train", NullTokenizer(VOCABULARY - 1))


class Tokenizer_:
    """A tokenizer of Megatron with these tokens."""

    def __init__(self, tokens, eod=0):
        self.inv_vocab, self.vocab_size, self.eod = dict(enumerate(tokens)), len(tokens), eod


def test_further_tokens_behind_those_of_the_data_are_no_other_vocabulary(corpus):
    from megatron_vwn.config import VirtualWidthError
    from megatron_vwn.training.refusals.data import check_vocabularies

    vocabulary = Tokenizer.from_file(str(Path(f"{corpus}_tokenizer") / "tokenizer.json")).get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    prefixes = [f"{corpus}_train", f"{corpus}_valid"]
    check_vocabularies(prefixes, Tokenizer_(tokens))
    check_vocabularies(prefixes, Tokenizer_([*tokens, "<pad>"]))
    for other in (["<pad>", *tokens], [*tokens[:-1], "<pad>"], [*tokens[:-2], tokens[-1], tokens[-2]]):
        with pytest.raises(VirtualWidthError, match="another vocabulary"):
            check_vocabularies(prefixes, Tokenizer_(other))
    with pytest.raises(VirtualWidthError, match="another vocabulary"):
        check_vocabularies(prefixes, Tokenizer_(tokens, eod=1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ids_beyond_the_vocabulary_are_refused_by_name(dtype, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_vwn.config import VirtualWidthError
    from megatron_vwn.training.refusals.data import check_vocabularies

    for name, ids in (("good", [0, 19]), ("high", [3, 20]), ("low", [-1, 5])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        builder.add_document(np.array(ids).astype(dtype), [2])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    check_vocabularies([str(tmp_path / "good")], Tokenizer_("x" * 20))
    for name, wrong in (("high", 20), ("low", -1 if dtype is np.int32 else 65535)):
        with pytest.raises(
            VirtualWidthError, match=f"{name} holds the token id {wrong}, .* are 0 to 19: give the token"
        ):
            check_vocabularies([str(tmp_path / each) for each in ("good", name)], Tokenizer_("x" * 20))


def tokenizer_flags(folder, **changed):
    named = dict.fromkeys(("chat_template", "vocab_file", "merge_file", "special_tokens", "metadata_path"))
    switches = ("tokenizer_hf_no_use_fast", "tokenizer_hf_no_include_special_tokens", "trust_remote_code")
    given = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder), "pad_vocab_size": False}
    return Namespace(**named | dict.fromkeys(switches, False) | given | changed)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b'{"version": "1.0", "tru'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        ("tokenizer_config.json", b""),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"tokenizer_class": 5}'),
        ("tokenizer_config.json", b'{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'),
    ],
)
def test_a_broken_tokenizer_is_one_sentence(name, content, corpus, tmp_path):
    from megatron_vwn.config import VirtualWidthError
    from megatron_vwn.training.refusals.tokenizer import build_tokenizer

    shutil.copytree(f"{corpus}_tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).write_bytes(content)
    (tmp_path / "tokenizer" / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(VirtualWidthError) as refused:
        build_tokenizer(tokenizer_flags(tmp_path / "tokenizer"))
    assert "\n" not in str(refused.value) and f"--tokenizer-model {tmp_path / 'tokenizer'}" in str(refused.value)
    assert ("names code of its own, which is not run" in str(refused.value)) == (b"auto_map" in content)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_set_for_megatron(corpus):
    from megatron.training import get_tokenizer

    from megatron_vwn.training.refusals.tokenizer import build_tokenizer

    build_tokenizer(tokenizer_flags(f"{corpus}_tokenizer"))
    assert get_tokenizer().vocab_size == VOCABULARY
