"""A patched tree trains over-width states through its own entry script, and counts what they cost.

The tree is the installed package; its entry script stands for Megatron-LM's, see patched_tree.py.
"""

import json
from pathlib import Path

import launch
import pytest
from megatron_lm.patched_tree import FLAGS, WIDE, losses, whole_tree

from megatron_vwn.megatron_lm import apply_patches
from megatron_vwn.ops.costs import Width, kept_stream_bytes, matrix_flops

HERE = Path(__file__).parent
TOKENS = 8 * 32
MIB = 2**20


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The patched tree, what its two ranks found, and what the plugin's own entry point printed."""
    folder = tmp_path_factory.mktemp("patched")
    tree = folder / "Megatron-LM"
    tree.mkdir()
    assert apply_patches.main([str(whole_tree(tree))]) == 0
    # Real processes, which import the patched Megatron.
    patched_first = {"PYTHONPATH": f"{tree}:{HERE.parent}"} | launch.WITHOUT_GPU
    patched = launch.real(2, HERE / "session_patched.py", tree, folder, env=patched_first)
    assert patched.returncode == 0, patched.stdout[-2000:] + patched.stderr[-4000:]
    plugin = launch.session(2, "-m", "megatron_vwn.training.pretrain", *FLAGS, *WIDE, env=launch.WITHOUT_GPU)
    assert plugin.returncode == 0, plugin.stdout[-2000:] + plugin.stderr[-4000:]
    return tree, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)], plugin.stdout


def test_patched_entry_trains_what_the_plugin_trains(session):
    tree, (first, last), plugin = session
    assert all(Path(file).is_relative_to(tree) for file in first["counts"]["files"])
    assert first["document end"] is not None
    assert len(last["patched"]["losses"]) == 2
    assert last["patched"]["losses"] == losses(plugin)
    report = " ".join(first["patched"]["printed"])
    assert "Theoretical memory footprints" in report and "Virtual width, in activations" in report


def test_flops_are_the_baselines_and_the_paper_s(session):
    counts = session[1][0]["counts"]
    width = Width(2, 4, 32)
    # Four connections of 2(2m+n)rD + 2(m+n)rD + 2nD = 2048 each, a reduction of 2DD', three times each.
    per_token = 3 * (4 * matrix_flops("connection", "forward", width) + 2 * 32 * 64)
    assert matrix_flops("connection", "forward", width) == 2048 and per_token == 36864
    assert counts["flops without"] == counts["stock"]
    assert counts["flops"] == counts["stock"] + TOKENS * per_token
    assert counts["flops of 100 tokens"] == counts["stock of 100 tokens"] + 100 * per_token


def test_flops_of_every_part(session):
    added = session[1][0]["counts"]["added flops"]
    assert added["wide"] == 36864
    connection = matrix_flops("connection", "forward", Width(2, 8, 32))
    assert added["projected, norm, LayerNorm"] == 3 * (4 * connection + 2 * 2 * 32 * 128)
    # Two depths of two sublayers, each with a fusion of n maps [2E -> E] and a reduction.
    connection = matrix_flops("connection", "forward", Width(2, 4, 32, dynamic=False, mixes=False))
    assert added["static, identity, tiled, MTP"] == 3 * (8 * connection + 3 * 2 * 32 * 64 + 2 * 4 * 2 * 32 * 16)
    connection = matrix_flops("connection", "forward", Width(1, 4, 32))
    assert added["projected, MTP"] == 3 * (6 * connection + 2 * 2 * 2 * 32 * 128 + 4 * 2 * 64 * 32)


def test_parameters_are_those_of_built_models(session):
    for name, (built, counted) in session[1][0]["counts"]["parameters"].items():
        assert counted == built, name
    layouts = session[1][0]["counts"]["sharded"]
    total = sum(layouts["TP1"].values())
    for name in ("width", "sequence"):
        assert 2 * layouts[name]["tp_sharded"] + layouts[name]["replicated"] == total
    # Without the width partition nothing here is split: a projected embedding leaves the table alone.
    assert layouts["sequence"]["tp_sharded"] == 0 < layouts["width"]["tp_sharded"]


def test_memory_is_the_transformers_and_the_streams(session):
    memory = session[1][0]["counts"]["memory"]
    width, fp32 = Width(2, 4, 32), {"element_bytes": 4}
    tokens = 2 * 32  # of a micro-batch
    expected = {
        # Two connections per stage, two micro-batches in flight.
        "PP2": 2 * kept_stream_bytes(width, 2, **fp32) * tokens,
        # Of each one state with its gates, and the block that runs backward once: two of these and a gradient.
        "PP2, blocks of 2": ((2 + 2) * (64 * 4 + 4 * (8 * 4 + 4)) + 64 * 4) * tokens,
        "PP2 x VPP2": 2.5 * kept_stream_bytes(width, 2, **fp32) * tokens,
        "one stage, TP2 width": kept_stream_bytes(width, 4, **fp32) * tokens / 2,
    }
    for name, added in expected.items():
        found = memory[name]
        assert found["ordinary"] is None and "not yet supported" in found["said"], name
        weights, activations, total = found["report"]
        assert activations - found["twin"][1] == pytest.approx(added / MIB), name
        assert weights > found["twin"][0] and total == pytest.approx(weights + activations), name
    # Two connections, D' - D more columns of the table of 128 rows and D' of 32 n-grams; 18 bytes each.
    connection = 2 * 4 * 8 + 16 * 8 + 16
    weights = 18 * (2 * connection + 128 * 32 + 32 * 64) / MIB
    assert memory["PP2"]["report"][0] - memory["PP2"]["twin"][0] == pytest.approx(weights)
    assert memory["Mamba"]["report"] is None and "not yet supported" in memory["Mamba"]["printed"]


def test_refusals_are_one_sentence(session):
    for name, words in {
        "unknown flag": "--modelopt-enabled",
        "segments": "--vwn-m 3",
        "other tokenizer": "60000",
        "wide checkpoint": "was trained with --vwn-m 2 --vwn-n 4",
    }.items():
        code, said = session[1][0]["refused"][name]
        assert code == 2, (name, said)
        lines = [line for line in said.splitlines() if line.startswith("megatron_vwn: ")]
        assert len(lines) == 1 and words in lines[0], said
