"""What a user types arrives as typed, whole numbers and words of YAML apart, or is refused."""

import pytest

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.recipes.flags import parse_overrides, read_yaml, typed
from megatron_vwn.recipes.recipe import load_recipe, read_recipe

AS_TYPED = ["010", "1:30", "1e-3", "1.0e-3", "0.00001", "+5", "0x10", "1_000", "on", "yes", "2024-01-01", "*E", "a: b"]
AS_TYPED += ["a #b", "'a'", "@x", "{a}", "4,0", "-0.5", "~", " a "]


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_arrives_as_typed(text):
    for values in (
        parse_overrides([f"seed={text}"]),
        parse_overrides([], ["--seed", text]),
        parse_overrides([], [f"--seed={text}"]),
    ):
        assert values == {"seed": text}
        words = typed("seed", values["seed"])
        assert words in (["--seed", text], [f"--seed={text}"])


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("-7", -7), ("0", 0)])
def test_whole_numbers_are_numbers(text, value):
    for values in (parse_overrides([f"seed={text}"]), parse_overrides([], ["--seed", text])):
        assert values["seed"] == value and isinstance(values["seed"], int)
    assert typed("seed", value)[-1].rpartition("=")[2] == text


def test_words_of_yaml_are_words_to_flags_only():
    assert parse_overrides(["a=true", "b=False", "c=null"]) == {"a": True, "b": False, "c": None}
    flags = ["--a", "true", "--b", "null", "--c", "[1, 2]", "--d"]
    assert parse_overrides([], flags) == {"a": "true", "b": "null", "c": "[1, 2]", "d": True}


def test_words_of_yaml_in_a_file():
    text = "{a: TRUE, b: False, c: NULL, d: ~, e: on, base: &x {f: 1}, g: {<<: *x, h: 2}}"
    assert read_yaml(text) == {
        "a": True, "b": False, "c": None, "d": None, "e": "on", "base": {"f": 1}, "g": {"f": 1, "h": 2},
    }  # fmt: skip


def test_several_values():
    assert parse_overrides(["layers=[[1, '*-'], [010, x]]"]) == {"layers": [[1, "*-"], ["010", "x"]]}
    values = parse_overrides([], ["--data-path", "0.30", "a", "0.70", "b", "--x"])
    assert values == {"data-path": ["0.30", "a", "0.70", "b"], "x": True}
    assert parse_overrides([], ["--data_path", "a", "--layout.x", "b"]) == {"data_path": "a", "layout.x": "b"}


@pytest.mark.parametrize(
    ("words", "flags", "said"),
    [
        (["save="], [], "'save=' has no value: write save=null"),
        (["layers=[1, 2"], [], "has a list that does not end"),
        ([], ["--lr=1", "2"], "'2' stands after -- without a flag"),
        ([], ["1"], "'1' stands after -- without a flag"),
        ([], ["--nodes", "2"], "--nodes is no flag of the training program: write nodes=... before --."),
        (["nodes=010"], [], "nodes of moe-0.4b-4b is '010': give a whole number"),
        (["vwn-m=two"], [], "argument --vwn-m: invalid int value: 'two'"),
        (["vwn-n=null"], [], "--vwn-m says nothing without --vwn-n"),
        (["vwn-ngrams=2,x"], [], "no list of whole numbers"),
        (["layers=[[2, '']]"], [], "has the entry [2, '']"),
        (["layers=[[30001, '*-']]"], [], "has 60002 sublayers, more than fit on a command line: give at most 60000."),
        (["layers=[[2, '*Q']]"], [], "has 'Q', which is no sublayer"),
        (["hybrid-layer-pattern=*E/"], [], "has a part without sublayers"),
        (["layers=[[4, '*-']]", "mtp=null"], [], "--num-experts finds no sublayer E"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, flags, said):
    with pytest.raises(VirtualWidthError) as refusal:
        load_recipe("moe-0.4b-4b", words, flags)
    assert said in str(refusal.value)


def test_shrinking_ends_where_layers_cannot_fill_the_stages():
    words = ["nodes=1000000000", "gpus-per-node=1", "pipeline-model-parallel-size=1000000000"]
    with pytest.raises(VirtualWidthError, match="layers cannot be divided into 1000000000 equal stages"):
        load_recipe("dense-1b", words, shrink=64)


def test_files_are_read_as_written():
    text = "{a: 010, b: on, c: 1.0e-6, d: 7, e: true, f: null, g: , h: [1, 1:30], i: '8', j: -3, k: 0}"
    values = {"a": "010", "b": "on", "c": "1.0e-6", "d": 7, "e": True, "f": None, "g": None, "h": [1, "1:30"]}
    assert read_yaml(text) == values | {"i": "8", "j": -3, "k": 0}


def test_what_the_paper_states_is_a_number(tmp_path):
    assert read_recipe("moe-0.4b-4b").stated == {"active": 0.4e9, "total": 4e9, "by": "paper"}
    own = tmp_path / "own.yaml"
    own.write_text("stated: {active: many}\n")
    with pytest.raises(VirtualWidthError, match="states active 'many': give a number of parameters"):
        read_recipe(str(own))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recompute-granularity=some"], "recompute-granularity has 'some': choose from full, selective."),
        (["recompute-method=all"], "recompute-method has 'all': choose from uniform, block."),
        (["recompute-modules=core_atn"], "recompute-modules has 'core_atn': choose from core_attn,"),
        (["recompute-modules=[mlp, moe_]"], "recompute-modules has 'moe_'"),
        (["recompute-granularity=full", "recompute-method=uniform"], "--vwn-recompute-block finds no two sublayers in"),
    ],
)
def test_recompute_that_cannot_be_is_refused(words, said):
    with pytest.raises(VirtualWidthError) as refusal:
        load_recipe("moe-a3.3b", words)
    assert said in str(refusal.value)


def test_stream_recompute_beside_some_of_megatrons_is_accepted():
    some = ["recompute-granularity=full", "recompute-method=block", "recompute-num-layers=2"]
    load_recipe("moe-a3.3b", ["vwn-recompute-block=4", *some])
    load_recipe("moe-a3.3b", ["vwn-recompute-block=4", "recompute-granularity=selective", "recompute-modules=moe_act"])
