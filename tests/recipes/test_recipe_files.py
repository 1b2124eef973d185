"""Files of recipes: what a base gives, where it is found, what stands twice, and what is left without experts."""

import pytest

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.recipes.recipe import load_recipe, read_recipe

DENSE = "base: moe-0.4b-4b.yaml\nmodel: {num-experts: null, mtp: null, layers: [[4, '*-']]}\n"


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file, by default own.yaml, and returns its path."""

    def write(text: str, name: str = "own.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("base", ["moe-0.4b-4b.yaml", "moe-0.4b-4b"])
def test_a_base_is_found_from_any_folder(write, base):
    own = load_recipe(write(f"base: {base}\noptimizer: {{lr: 1e-3}}\n"))
    shipped = load_recipe("moe-0.4b-4b")
    assert own.flags == shipped.flags | {"lr": "1e-3"}


def test_a_base_beside_the_file_comes_first(write):
    write("model: {hidden-size: 7}\n", "common.yaml")
    assert read_recipe(write("base: common.yaml\n")).flags == {"hidden-size": 7}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: moe.yaml\n", "has the base moe.yaml, which is neither a file beside it nor one of common, "),
        ("base: own.yaml\n", "has itself as its base"),
        ("base: ../b/b.yaml\n", "has itself as its base"),
        ("model: {lr: 1}\nmodel: {lr: 2}\n", "the key 'model' stands in line 1 and again in line 2"),
        ("model:\n  a: 1\n  b: 2\n  a: 1\n", "the key 'a' stands in line 2 and again in line 4"),
        ("base: common\nrun: {weight-decay: 0}\n", "has weight-decay in the sections optimizer and run: make one of"),
        ("model: {lr: {a: 1}}\n", "lr in the section model of"),
        ("model: {7: 1}\n", "7 in the section model of"),
        ("model: [a]\n", "the section model of"),
        ("modell: {}\n", "has a section 'modell'"),
        (f"model: {{a: {'9' * 5000}}}\n", "cannot be read as YAML (Exceeds the limit"),
        (f"model: {'[' * 5000}\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(write, text, said):
    write("base: ../a/own.yaml\n", "b/b.yaml")
    with pytest.raises(VirtualWidthError) as refusal:
        read_recipe(write(text, "a/own.yaml"))
    assert said in str(refusal.value)


def test_null_makes_room_for_a_key_in_another_section(write):
    own = write("base: common\noptimizer: {weight-decay: null}\nrun: {weight-decay: 0}\n")
    assert read_recipe(own).flags["weight-decay"] == 0
    assert read_recipe(own).with_values({"weight-decay": 1}).flags["weight-decay"] == 1  # where it stands


def test_a_dense_model_leaves_out_what_its_base_says_of_experts(write):
    recipe = load_recipe(write(DENSE))
    assert set(recipe.left_out) > {"moe-router-topk", "expert-model-parallel-size", "moe-grouped-gemm"}
    assert not [word for word in recipe.arguments(transformer_engine=True) if "moe" in word or "expert" in word]
    assert recipe.get("hybrid-layer-pattern") is None and recipe.get("vwn-n") == 3
    assert load_recipe("moe-0.4b-4b").left_out == ()


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        (DENSE, ["moe-router-topk=2"], "moe-router-topk of own says nothing without num-experts"),
        (DENSE.replace("mtp: null,", "moe-ffn-hidden-size: 64, mtp: null,"), [], "moe-ffn-hidden-size of own says"),
        (DENSE, ["moe-aux-loss-coeff=0"], "moe-aux-loss-coeff of own says nothing without num-experts"),
        (DENSE, ["expert-model-parallel-size=2"], "expert-model-parallel-size is 2, but there are no experts"),
        (DENSE.replace("mtp: null,", ""), [], "the sublayer E (experts) needs --num-experts"),
    ],
)
def test_what_is_said_of_experts_that_are_not_there_is_refused(write, text, words, said):
    with pytest.raises(VirtualWidthError) as refusal:
        load_recipe(write(text), words)
    assert said in str(refusal.value)
