"""The planner against models that are built, measured and timed; see session_plan.py for what is compared."""

import json
from pathlib import Path

import launch
import pytest

from megatron_vwn.planner import __main__ as plan
from megatron_vwn.recipes.layout import check_layout
from megatron_vwn.recipes.recipe import load_recipe

SESSION = Path(__file__).with_name("session_plan.py")


@pytest.fixture(scope="module")
def answers():
    done = launch.session(0, SESSION)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_parameters_are_those_of_the_built_ranks(answers):
    for name, answer in answers["parameters"].items():
        assert answer["coordinates"] >= 4, name
        assert answer["different"] == [], name
        assert (answer["summed"] > 0) == ("TP2" in name), name
        added_up, built = answer["counts"]
        assert added_up == built, name


def test_distinct_shards_add_up_to_the_total(answers):
    for name, answer in answers["parameters"].items():
        assert answer["shards"] == answer["total"], name


@pytest.mark.parametrize("name", ["baseline", "(2, 8)"])
def test_saved_bytes_of_every_kind_of_sublayer(answers, name):
    """Within one per cent: masks, rotary tables and parameters' copies in fp32 are not in the formulas."""
    measured, predicted = answers["saved"][name]["measured"], answers["saved"][name]["predicted"]
    # The embedding of a further prediction is looked up inside it.
    further = measured.pop("predictions"), predicted.pop("predictions")
    assert further[0] == pytest.approx(further[1], rel=0.01)
    assert predicted["embedding"] <= measured.pop("embedding") <= 2 * predicted.pop("embedding")
    if name != "baseline":  # a write waits for the next layer's read, and is then saved inside it
        for found in (measured, predicted):
            found["layers"] = sum(found.pop(layer) for layer in [each for each in found if each.startswith("layer ")])
    assert measured == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("blocks of 2", 0.01),
        ("blocks of 3, (2, 3)", 0.01),
        ("blocks of 2, TP2", 0.01),
        ("width partition", 0.01),
        ("blocks of 2, width partition", 0.01),
        ("full recompute, baseline", 0.02),
        ("full recompute", 0.02),
        ("selective recompute", 0.02),
    ],
)
def test_bytes_alive_between_the_passes_with_recompute(answers, name, tolerance):
    answer = answers["alive"][name]
    assert answer["measured"] == pytest.approx(answer["predicted"], rel=tolerance)


def test_bytes_of_collectives(answers):
    groups = {"TP": "TENSOR_MODEL_PARALLEL_GROUP", "EP": "EXPERT_MODEL_PARALLEL_GROUP"}
    for name, answer in answers["communicated"].items():
        for group, bytes_sent in answer["predicted"].items():
            assert answer["measured"][groups[group]] == pytest.approx(bytes_sent, rel=0.01), (name, group)
        others = sum(count for group, count in answer["measured"].items() if group not in groups.values())
        assert others < 0.01 * sum(answer["measured"].values()), name


def test_flops_are_megatrons(answers):
    """But for routers and fusions, which Megatron does not count."""
    for name, (megatrons, ours) in answers["flops"].items():
        assert ours == megatrons > 0, name


def test_micro_batches_in_flight_are_those_of_megatrons_schedules(answers):
    assert len(answers["flying"]) > 20
    for name, megatrons, ours in answers["flying"]:
        assert ours == megatrons, name


def test_messages_are_those_of_the_communicator(answers):
    assert len(answers["messages"]) == 3
    for name, (sent, predicted) in answers["messages"].items():
        assert sent == predicted, name


def test_megatron_takes_the_layouts_that_the_loader_takes_and_no_others(answers):
    taken = [ours is None for _, ours, _ in answers["verdicts"]]
    assert 4 < sum(taken) < len(taken) - 4
    for layout, ours, megatrons in answers["verdicts"]:
        assert (ours is None) == (megatrons is None), (layout, ours, megatrons)


def test_every_recipe_is_one_that_its_planner_would_propose(answers):
    """On its own GPUs, 80 GB each, with the default margin of the memory and imbalance of experts."""
    assert len(answers["recipes"]) >= 7
    for name, (own, best, fits) in answers["recipes"].items():
        assert fits and best <= own <= 1.05 * best, name


def test_the_fastest_layouts_of_real_recipes_are_built_by_megatron(answers):
    assert len(answers["built"]) >= 3
    for name, (shards, total) in answers["built"].items():
        assert shards == total > 0, name


def test_predicted_times_are_in_the_order_of_measured_ones(answers):
    ranking = answers["ranking"]
    assert len(ranking) == 4
    by = {kind: sorted(ranking, key=lambda name: ranking[name][kind]) for kind in ("measured", "predicted")}
    assert by["measured"] == by["predicted"], ranking


def test_a_search_finds_layouts_that_divide_and_fit_the_fastest_first(answers):
    found = answers["found"]["plans"]
    assert len(found) == 8
    assert found[0]["seconds"] == answers["found"]["best of all"]
    assert len({tuple(each["layout"]) for each in found}) == 8
    assert [each["seconds"] for each in found] == sorted(each["seconds"] for each in found)
    for each in found:
        tensor, pipeline, virtual, expert = each["layout"]
        assert 4 % (tensor * pipeline) == 0 and 4 % (expert * pipeline) == 0 and 8 % expert == 0
        assert each["pattern"].count("|") + 1 == pipeline * virtual
        assert each["memory"] <= 0.9 * 0.066
        check_layout(
            load_recipe("moe-a3.3b", shrink=64).with_values(
                {"layers": [[1, "*-"], [3, "*E"]], "num-experts": 8, "padded-vocab-size": 512} | each["recipe"]
            )
        )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["moe-a3.3"], "there is no recipe moe-a3.3: did you mean moe-a3.3b?"),
        (["moe-a3.3b", "--hardware", "a100"], "there are no rates of a100: choose one of h100, h200, b200."),
        (["moe-a3.3b", "--gpus", "12"], "--gpus is 12: give whole nodes of 8 GPUs, or gpus-per-node=NUMBER."),
        (["moe-a3.3b", "--gpus", "0"], "--gpus is 0: give whole nodes of"),
        (["moe-a3.3b", "--gpus", "24"], "cannot be divided by"),
        (["moe-a3.3b", "--link-share", "1.5"], "--link-share is 1.5: give a share of at most 1."),
        (["moe-a3.3b", "--matrix-tflops", "0"], "--matrix-tflops is 0: give a number of more than 0."),
        (["moe-a3.3b", "--imbalance", "0.9"], "--imbalance is 0.9: give a number of at least 1."),
        (["moe-a3.3b", "--memory-margin", "1"], "--memory-margin is 1: give a share of less than 1."),
        (["moe-a3.3b", "--memory-margin", "-0.1"], "--memory-margin is -0.1: give a number of at least 0."),
        (["moe-a3.3b", "--json", "/nowhere/plan.json"], "--json is /nowhere/plan.json, whose folder is not there"),
        (["moe-a3.3b", "multi-latent-attention=true", "--top", "0"], "is not in the planner's formulas"),
    ],
)
def test_refusals_are_one_sentence(capsys, argv, sentence):
    assert plan.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1


def test_a_plan_is_printed_and_written(tmp_path):
    words = ["megatron_vwn.planner", "moe-0.4b-4b", "--gpus", "32", "--hardware", "h200", "--top", "1"]
    done = launch.session(0, "-m", *words, "--json", tmp_path / "plan.json", "--memory-gb", "34")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "plan.json").read_text())
    assert f"{written['parameters']['total']:,} in all" in done.stdout
    assert "WARNING" in done.stdout and "predicted" in done.stdout and "--network-gbs" in done.stdout
    for said in (
        "p2p buffers ",
        "with stream recompute in blocks of 4: activations ",
        "bytes sent per step",
        "DP of experts ",
    ):
        assert said in done.stdout
    assert "Connections of (" in done.stdout and "a model's prediction, not measured: kernels of commit" in done.stdout
    assert "tokens/s, of this" in done.stdout and "the same layout without the virtual width" in done.stdout
    own = written["own"]
    assert own["step_seconds"] == pytest.approx(sum(own["step_parts"].values()))
    assert own["step_seconds"] > own["step_seconds_without_virtual_width"]
    # The share is stated against the twin's own best layout, which is no slower than the recipe's layout without width.
    (twin,), (best,) = written["found_without_virtual_width"], written["found"]
    assert twin["step_seconds"] <= own["step_seconds_without_virtual_width"] and twin["layout"] != best["layout"]
    for name, found in (("in this recipe's layout", own), ("in the best found", best)):
        share = 1 - twin["step_seconds"] / found["step_seconds"]
        assert written["share_of_virtual_width"][name] == pytest.approx(share) and share > 0
        assert f"share of the virtual width in the step against that, {name}, predicted: {share:.1%}" in done.stdout


def test_more_gpus_than_a_batch_has_sequences_share_them():
    options = plan._parser().parse_intermixed_args(["dense-1b", "--gpus", "1024"])
    recipe, impossible = plan._recipe(options)
    assert recipe.number("tensor-model-parallel-size") == 4 and "1024 data-parallel ranks = 4096" in str(impossible)
