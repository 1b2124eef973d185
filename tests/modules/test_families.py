"""Kinds of attention in the local backend: a fresh VWN computes the baseline, and the kinds are what they say."""

import json
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.modules.latent_attention import LatentAttention

TESTS = Path(__file__).parents[1]
FAMILIES = ("grouped queries", "sliding window", "latent attention", "gated delta net")
# fp32: the same function, computed through a wide stream; a delta rule inverts a matrix per chunk.
TOLERANCE = dict.fromkeys(FAMILIES, 1e-5) | {"gated delta net": 1e-4}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    results = tmp_path_factory.mktemp("families") / "results.json"
    done = launch.session(1, TESTS / "modules" / "session_families.py", results, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_virtual_width_computes_the_baseline(report, family):
    errors = report["birth"][family]
    assert len(errors) > 10
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE[family]} == {}


def test_a_window_ends_where_it_says(report):
    assert report["reached"] == {"window": [0, 1, 2, 3], "no window": list(range(16))}


def test_query_groups_share_keys_and_values(report):
    heads, groups, channels = 4, 2, 8
    assert report["query, key and value rows"] == (heads + 2 * groups) * channels


def test_latent_attention_on_several_ranks_without_sequence_parallelism_is_refused():
    config = SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False)
    with pytest.raises(VirtualWidthError, match="set sequence_parallel"):
        LatentAttention(config)
