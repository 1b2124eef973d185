"""--dataloader-type external: DALI's batches are Megatron's, bit for bit; what it cannot do is refused."""

import importlib.util
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SEQUENCE, VOCABULARY, STEPS = 16, 64, 200

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed: pip install 'megatron_vwn[dali]'",
)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    """Two data sets of documents between one token and several samples long, of both token types."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, dtype in (("short", np.uint16), ("long", np.int32)):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
        for _ in range(200):
            length = int(random.integers(1, 10 if name == "short" else 70))
            tokens = random.integers(0, VOCABULARY - 1, length)
            tokens[-1] = VOCABULARY - 1  # NullTokenizer's end of document
            builder.add_document(torch.from_numpy(tokens), [length])
        builder.finalize(str(folder / f"{name}.idx"))
    return [str(folder / name) for name in ("short", "long")]


@pytest.fixture(scope="module")
def ranks(prefixes, tmp_path_factory):
    """What both ranks compared."""
    folder = tmp_path_factory.mktemp("session")
    # fmt: off
    flags = [
        "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY), "--data-cache-path", f"{folder}/cache",
        "--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE), "--num-layers", "2",
        "--hidden-size", "8", "--num-attention-heads", "2", "--micro-batch-size", "2", "--global-batch-size", "8",
        "--train-iters", str(STEPS), "--eval-interval", "10", "--eval-iters", "2", "--lr", "1e-3",
        "--distributed-backend", "gloo", "--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion",
        "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--num-workers", "0",
    ]
    # fmt: on
    session = Path(__file__).parent / "session_dali.py"
    done = launch.session(2, session, folder, *prefixes, *flags, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


# Micro-batches of two samples that each reading rank gets for 200 steps of eight samples, or for what is left of them.
@needs_dali
@pytest.mark.parametrize(
    ("case", "data_parallel", "train"),
    [
        ("two data-parallel ranks", 2, STEPS * 8 // 4),
        ("one data-parallel rank", 1, STEPS * 8 // 2),
        ("pipeline stages", 1, STEPS * 8 // 2),
        ("blend", 2, STEPS * 8 // 4),
        ("resumed", 2, STEPS * 8 // 4 // 2),
        ("blend, resumed", 2, STEPS * 8 // 4 // 2),
        ("resets", 2, STEPS * 8 // 4),
        ("no attention mask", 2, STEPS * 8 // 4),
        ("a pad token in the text", 2, STEPS * 8 // 4),
        ("deferred indices", 2, STEPS * 8 // 4),
        ("whole validation sets", 2, STEPS * 8 // 4),
        ("evaluation alone", 2, None),
    ],
)
def test_batches_are_megatrons(ranks, case, data_parallel, train):
    read = [rank[case] for rank in ranks]
    assert [rank["rank"] for rank in read] == list(range(data_parallel)) * (2 // data_parallel)
    splits = [split for split in read[0] if split not in ("imported", "eval_iters", "rank")]
    assert {"train", "test"} < set(splits)
    for number, rank in enumerate(read):
        for split in splits:
            partner = case == "one data-parallel rank" and number == 1  # of the tensor-parallel rank that reads
            if partner or (split == "train" and train is None):
                assert rank[split] is None
                continue
            batches, difference, _ = rank[split]
            assert difference is None, f"{split}: {difference}"
            assert batches >= (train if split == "train" else 1)
        assert rank["eval_iters"][0] == rank["eval_iters"][1]


@needs_dali
def test_ranks_and_cases_read_different_samples(ranks):
    def first(rank, case, split="train"):
        return ranks[rank][case][split][2]

    assert first(0, "two data-parallel ranks") != first(1, "two data-parallel ranks")
    assert first(0, "pipeline stages") == first(1, "pipeline stages") == first(0, "two data-parallel ranks")
    assert first(0, "resumed") != first(0, "two data-parallel ranks")
    assert first(0, "blend") != first(0, "two data-parallel ranks")
    assert first(0, "resumed", "valid") != first(0, "two data-parallel ranks", "valid")


@needs_dali
def test_ids_beyond_the_vocabulary_are_refused(ranks):
    for rank in ranks:
        assert "holds the token id" in rank["beyond"] and "are 0 to 19" in rank["beyond"]


@needs_dali
def test_without_external_nothing_imports_dali(ranks):
    assert [rank["imported"] for rank in ranks] == [False, False]


def train(folder, name, *flags):
    """One process of the training program."""
    # fmt: off
    model = [
        "--hybrid-layer-pattern", "*-", "--hidden-size", "16", "--num-attention-heads", "2", "--ffn-hidden-size", "32",
        "--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE), "--position-embedding-type", "rope",
        "--normalization", "RMSNorm", "--disable-bias-linear", "--untie-embeddings-and-output-weights",
        "--hidden-dropout", "0.1", "--vwn-m", "2", "--vwn-n", "3", "--micro-batch-size", "2",
        "--global-batch-size", "4",
        "--train-iters", "6", "--lr", "1e-2", "--lr-decay-style", "constant", "--eval-interval", "2", "--eval-iters",
        "1", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY), "--split", "80,20,0",
        "--log-interval", "1", "--tensorboard-log-interval", "1", "--ckpt-format", "torch_dist",
        "--tensorboard-dir", str(folder / name),
    ]
    # fmt: on
    done = launch.session(1, "-m", "megatron_vwn.training.pretrain", *model, *flags, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def losses(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        if tag.startswith("lm loss") and "vs" not in tag
        for event in events.Scalars(tag)
    }


@needs_dali
def test_a_run_learns_the_same_and_resumes_at_the_exact_sample(prefixes, tmp_path):
    data = ["--data-path", *prefixes, "--data-cache-path"]
    checkpoints = str(tmp_path / "checkpoints")
    external = [*data, str(tmp_path / "cache_external"), "--dataloader-type", "external"]
    external += ["--save", checkpoints, "--save-interval", "3"]
    train(tmp_path, "single", *data, str(tmp_path / "cache_single"))
    train(tmp_path, "external", *external, "--exit-interval", "3")
    train(tmp_path, "resumed", *external, "--load", checkpoints)
    whole = losses(tmp_path / "single")
    assert {step for tag, step in whole if tag == "lm loss"} == set(range(1, 7))
    assert {step for tag, step in whole if tag == "lm loss validation"} >= {2, 4, 6}
    assert losses(tmp_path / "external") | losses(tmp_path / "resumed") == whole


def refusal(monkeypatch, **changed):
    from megatron_vwn.config import VirtualWidthError
    from megatron_vwn.data.dali import check_dali

    given = {"mock_data": False, "mmap_bin_files": True, "phase_transition_iterations": None} | changed
    with pytest.raises(VirtualWidthError) as refused:
        check_dali(Namespace(**given))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"mock_data": True}, "--mock-data has none"),
        ({"mmap_bin_files": False}, "--no-mmap-bin-files"),
        ({"phase_transition_iterations": [5]}, "--phase-transition-iterations"),
    ],
)
def test_contradicting_flags_are_refused(monkeypatch, changed, sentence):
    assert sentence in refusal(monkeypatch, **changed)


def test_flags_that_are_looked_at_exist_in_megatron(monkeypatch):
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["train"])
    args = parse_args()
    assert args.mock_data is False and args.mmap_bin_files is True and args.phase_transition_iterations is None


def test_a_missing_dali_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    sentence = refusal(monkeypatch)
    assert re.search(r"NVIDIA DALI.*pip install 'megatron_vwn\[dali\]'", sentence)
