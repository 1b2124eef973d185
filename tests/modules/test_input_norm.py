"""The norm of a sublayer's input in the read of its connection: the model is the one with the norm in the layer."""

import json
from pathlib import Path

import launch
import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    results = tmp_path_factory.mktemp("input_norm") / "results.json"
    done = launch.session(
        2, TESTS / "modules" / "session_input_norm.py", results, env=launch.WITHOUT_GPU | launch.INTERPRETED
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize("run", ["alone", "stream recompute", "TP2+SP"])
def test_loss_and_gradients_are_those_of_the_ordinary_norm(report, run):
    """In fp32, the weights of the norms, whose gradients now come from the reads, among them."""
    found = report["runs"][run]
    assert len(found["norms"]) == 3 and found["normed"] == 3 * 2  # layers and micro-batches
    wrong = {name: error for name, error in found["errors"].items() if not error <= 1e-5}
    assert not wrong


def test_torch_uses_the_ordinary_norm(report):
    assert report["runs"]["without"] == 0


def test_which_norms_a_read_may_do(report):
    assert report["shared"] == {
        "ordinary": [True] * 3, "layer norm": [False] * 3, "recomputed norm": [False] * 3,
    }  # fmt: skip
