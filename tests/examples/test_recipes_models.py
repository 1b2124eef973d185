"""The paper's recipes are the models that they say, in every stage of the layout that they say."""

import json
from pathlib import Path

import launch
import pytest

from megatron_vwn.recipes.recipe import load_recipe, recipe_names

# (m, n) of the paper's models, and what it states of their parameters, active and in all, in billions.
PAPER = {
    "moe-0.4b-4b": (2, 3, 0.4, 4),
    "moe-2.5b-25b": (2, 3, 2.5, 25),
    "moe-a0.8b-r2": (8, 16, 0.8, None),
    "moe-a0.8b-r4": (8, 32, 0.8, None),
    "moe-a0.8b-r8": (8, 64, 0.8, None),
    "moe-a3.3b": (8, 64, 3.3, None),
}


@pytest.fixture(scope="module")
def built():
    done = launch.session(0, Path(__file__).with_name("session_recipes.py"), env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_the_papers_models_are_there():
    assert recipe_names() == sorted([*PAPER, "dense-1b"])
    for name, (m, n, active, total) in PAPER.items():
        recipe = load_recipe(name)
        assert (recipe.get("vwn-m"), recipe.get("vwn-n"), recipe.get("mtp")) == (m, n, "*E")
        assert recipe.stated["active"] == active * 1e9
        assert total is None or recipe.stated["total"] == total * 1e9
        assert ("us" in recipe.stated["by"]) == (total is None)


def test_baselines_match_the_stated_parameters(built):
    for name, (baseline, _) in built["counted"].items():
        count, stated = baseline["count"], baseline["stated"]
        assert abs(count["trunk"] / stated["total"] - 1) < 0.03, (name, count)
        assert abs(count["active"] / stated["active"] - 1) < 0.03, (name, count)


def test_counts_are_those_of_the_architecture(built):
    """Written down by hand for one recipe, so that a wrong count cannot agree with itself."""
    (baseline, wide), width, layers, experts = built["counted"]["moe-0.4b-4b"], 1024, 23, 96
    attention = width + width * (16 + 2 * 4) * 64 + 16 * 64 * width + 2 * 64
    expert = 3 * width * 576
    sublayers = layers * attention + (width + 3 * width * 2880) + 22 * (width + width * experts + expert)
    count = baseline["count"]
    assert count["experts"] == 22 * experts * expert
    assert count["embedding"] == count["head"] == 64512 * width
    assert count["trunk"] == 2 * 64512 * width + sublayers + count["experts"] + width
    assert count["active"] == count["trunk"] - 22 * (experts - 4) * expert
    layer = attention + width + width * experts + (experts + 1) * expert
    assert count["mtp"] == layer + 2 * width * width + 3 * width
    # A table as wide as the stream; and the same backbone.
    assert wide["count"]["embedding"] == 64512 * width * 3 // 2
    assert wide["count"]["experts"] == count["experts"]


def test_the_dense_model_has_neither_experts_nor_words_about_them(built):
    (baseline, wide), width, layers, ffn = built["counted"]["dense-1b"], 2048, 16, 6144
    attention = width + width * (16 + 2 * 4) * 128 + 16 * 128 * width + 2 * 128
    layer = attention + width + 3 * width * ffn
    assert baseline["count"]["total"] == baseline["count"]["active"] == 2 * 64512 * width + layers * layer + width
    assert wide["count"]["experts"] == wide["count"]["mtp"] == 0
    assert not [word for word in wide["arguments"] if "moe" in word or "expert" in word]


def test_shards_of_all_ranks_add_up_to_the_whole_model(built):
    for name, found in built["summed"].items():
        recipe = load_recipe(name, found["overrides"])
        degrees = [recipe.number(f"{each}-model-parallel-size") for each in ("tensor", "pipeline", "expert")]
        assert found["shards"] == found["total"] == built["counted"][name][1]["count"]["total"]
        assert found["last rank"] == [degree - 1 for degree in degrees]
        assert found["coordinates"] == degrees[1] * max(degrees[0], degrees[2])
        assert found["not copies"] == 0


def test_twins_differ_in_nothing_but_the_virtual_width(built):
    for name, (baseline, wide) in built["counted"].items():
        words = wide["arguments"]
        width = words.index("--vwn-m")
        assert words[width + 2] == "--vwn-n"
        end = width + (6 if words[width + 4] == "--vwn-recompute-block" else 4)
        without = words[:width] + words[end:]
        assert [word.replace(f"{name}-baseline/", f"{name}/") for word in baseline["arguments"]] == without


def test_one_recipe_for_all_expansions(built):
    """r = 2, 4 and 8 differ in n alone, and so have the same baseline."""
    arguments = {
        name: [word.replace(name, "") for word in built["counted"][name][1]["arguments"]]
        for name in PAPER
        if name.startswith("moe-a0.8b")
    }
    differing = [set(each) for each in zip(*arguments.values(), strict=True) if len(set(each)) > 1]
    assert differing == [{"16", "32", "64"}]


def test_what_the_training_program_refuses_is_refused_here_too(built):
    assert "need Transformer Engine: leave them out." in built["refused"]
