"""Megatron on two emulated GPUs: one torchrun session (session_cpu.py) that all tests of this file read."""

import json
from pathlib import Path

import launch
import pytest

RESUMES = [
    f"{sharding}/torch.{dtype}"
    for sharding in ("dp_reshardable", "fully_reshardable")
    for dtype in ("float32", "bfloat16")
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of ranks 0 and 1."""
    folder = tmp_path_factory.mktemp("session")
    done = launch.real(2, Path(__file__).parent / "session_cpu.py", folder, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("megatron_vwn.cpu:") == 1  # rank 0 alone says that the emulation is active
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_averages_and_exchanges(ranks):
    for rank, received in enumerate(([], [1.0, 1.0, 1.0])):
        assert ranks[rank]["collectives"] == {
            "all_gather": [[1.0], [2.0, 2.0]],
            "all_reduce": [1.5, 1.5],
            "reduce_scatter": [1.5, 1.5],
            "coalesced": [[1.5, 1.5], [1.5]],
            "all_to_all": received,
        }


@pytest.mark.parametrize("split", ["dense/tensor", "dense/pipeline", "dense/interleaved", "experts/expert"])
def test_every_layout_has_the_loss_of_one_rank(ranks, split):
    whole = ranks[0]["layouts"][split.split("/")[0] + "/one"]["loss"]
    losses = [rank["layouts"][split]["loss"] for rank in ranks]
    if split in ("dense/pipeline", "dense/interleaved"):
        assert losses[0] is None  # the loss is on the last stage
        losses = losses[1:]
    # fp32 sums in another order, over 32 to 64 terms: a few units in the last place, 1e-7 of the loss each.
    assert losses == pytest.approx([whole] * len(losses), rel=1e-6)


@pytest.mark.parametrize("split", ["dense/pipeline", "dense/interleaved"])
def test_the_stages_of_a_pipeline_have_the_gradients_of_one_rank(ranks, split):
    whole = ranks[0]["layouts"]["dense/one"]["squared_gradients"]
    assert sum(rank["layouts"][split]["squared_gradients"] for rank in ranks) == pytest.approx(whole, rel=1e-5)


def test_context_parallel_ranks_share_a_sequence(ranks):
    assert [rank["context_parallel"] for rank in ranks] == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize("variant", ["overlapped", "averaged"])
def test_overlap_and_averaging_collectives_train_as_without(ranks, variant):
    for rank in ranks:
        # Halving before or after a sum of two numbers is exact, so nothing is rounded differently.
        assert rank["overlap"][variant] == rank["overlap"]["plain"]
        assert len(set(rank["overlap"]["plain"])) == 3


@pytest.mark.parametrize("case", RESUMES)
def test_distributed_optimizer_resumes_bitwise(ranks, case):
    for rank in ranks:
        assert rank["resume"][case] == {"restored": True, "resumed": True, "unmoved": 0}
