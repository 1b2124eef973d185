"""FP8 on the CPU: Transformer Engine's Python is real, what its kernels would compute is emulated (fp8_emulation.py).

Shown here is which products are in FP8, with which scales, and that nothing else of the stream is; not the kernels' own
arithmetic, speed or memory (``tests/gpu``).
"""

import json
from importlib.util import find_spec
from pathlib import Path

import launch
import pytest

TESTS = Path(__file__).parents[1]
RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]
TRUNK_ENDS, FURTHER_ENDS = ["embedding.expansion", "decoder.reduction"], ["mtp.layers.0.expansion"]
FURTHER_ENDS += ["mtp.layers.0.reduction"]
ENDS = TRUNK_ENDS + FURTHER_ENDS
FURTHER = "mtp.layers.0.mtp_model_layer."
SUBLAYERS = {"self_attention": ["linear_qkv", "linear_proj"], "mlp": ["linear_fc1", "linear_fc2"]}
# Layers of "*-*-" and of the further prediction "*-", by number.
LINEARS = {
    stack: {
        number: [f"{stack}layers.{number}.{part}.{name}" for name in SUBLAYERS[part]]
        for number in range(4 if stack == "decoder." else 2)
        for part in [("self_attention", "mlp")[number % 2]]
    }
    for stack in ("decoder.", FURTHER)
}

pytestmark = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Reports of every case, from one launch of two ranks."""
    file = tmp_path_factory.mktemp("fp8") / "results.json"
    # Transformer Engine reads a variable of this session when it is imported, too early for a fork.
    done = launch.real(2, TESTS / "modules" / "session_fp8.py", file, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = json.loads(file.read_text())

    def report(case):
        assert "error" not in reports[case], reports[case]["error"]
        return reports[case]

    return report


def operands_of(report):
    """{module: {what: operands}} of the products; each module computes each of its products in one way."""
    found = {}
    for module, what, operands, _ in report["gemms"]:
        if module:  # in a backward pass, a product of unquantized tensors is anybody's
            assert found.setdefault(module, {}).setdefault(what, operands) == operands, (module, what)
    return found


def expected(recipe, fp8_format):
    """How the ends multiply: weight with input, weight with gradient, input with gradient."""
    scales = "tensorwise" if recipe == "delayed" else recipe
    forward, gradient = f"{scales} E4M3", f"{scales} {'E5M2' if fp8_format == 'hybrid' else 'E4M3'}"
    return {
        "output": [forward, forward],
        "input gradient": [forward, gradient],
        "weight gradient": [forward, gradient],
    }


@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_expand_and_reduce_multiply_in_fp8(results, recipe, fp8_format):
    products = operands_of(results(recipe if fp8_format == "hybrid" else f"{recipe}, e4m3"))
    assert {end: products.get(end) for end in ENDS} == dict.fromkeys(ENDS, expected(recipe, fp8_format))


@pytest.mark.parametrize("recipe", RECIPES)
def test_sublayers_follow_the_recipe_and_nothing_else_of_the_stream_does(results, recipe):
    products = operands_of(results(recipe))
    linears = [name for stack in LINEARS.values() for names in stack.values() for name in names]
    assert {name: products[name]["output"] for name in linears} == dict.fromkeys(linears, [f"{recipe} E4M3"] * 2)
    assert set(products) == {*linears, *ENDS}  # no connection, no fusion, no head


def test_without_fp8_the_ends_are_torchs(results):
    products = operands_of(results("bf16"))
    assert not set(products) & set(ENDS)
    assert {tuple(operands["output"]) for operands in products.values()} == {(None, None)}


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_first_and_last_layers_stay_in_bf16_and_the_ends_with_them(results, recipe):
    products = operands_of(results(f"ends in bf16, {recipe}"))
    assert not set(products) & set(ENDS)
    for number, names in LINEARS["decoder."].items():
        kind = f"{recipe} E4M3" if number == 2 else None
        assert {tuple(products[name]["output"]) for name in names} == {(kind, kind)}, number
    further = [name for names in LINEARS[FURTHER].values() for name in names]
    assert {tuple(products[name]["output"]) for name in further} == {(f"{recipe} E4M3",) * 2}


def test_each_end_follows_the_layers_beside_it(results):
    products = operands_of(results("start in FP8"))
    assert {end for end in ENDS if end in products} == {end for end in ENDS if end.endswith("expansion")}


def test_amax_histories_move_on_as_often_as_in_the_baseline(results):
    wide, baseline = results("delayed")["updates"], results("baseline, delayed")["updates"]
    assert wide["forward"] == baseline["forward"] > 0
    # The baseline's fusion is a layer of Transformer Engine with a region of its own; 4 micro-batches, one depth.
    assert wide["backward"] == baseline["backward"] - 4 > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_and_checkpoint_are_those_of_bf16(results, recipe):
    report, bf16 = results(recipe), results("bf16")
    assert report["dtypes"] == bf16["dtypes"] == ["torch.bfloat16"]
    assert report["keys"] == bf16["keys"] and len(bf16["keys"]) > 10


def test_fp8_weights_leave_ours_in_bf16(results):
    assert results("fp8 weights") == {"dtypes": ["Parameter torch.bfloat16"], "placeholders": [False, False]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_near_those_of_bf16(results, recipe):
    loss, bf16 = results(recipe)["loss"], results("bf16")["loss"]
    assert loss != bf16
    assert abs(loss - bf16) < 0.02 * bf16


@pytest.mark.parametrize("tokens", ["", " of 20 tokens"], ids=["", "padded"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_product_is_exact_but_for_rounding(results, recipe, tokens):
    """E4M3 rounds to 3 bits and E5M2 to 2: at most 6 and 12 % of each factor, less than half of that on average."""
    errors = results(f"product{tokens}, {recipe}")
    assert 0.01 < errors["result"] < 0.06
    assert 0.01 < errors["x"] < 0.09 and 0.01 < errors["weight"] < 0.09


def test_tiling_and_averaging_are_exact(results):
    assert results("fresh ends")["same"] == [True, True]


def test_ends_that_do_not_divide_stay_in_bf16_and_say_so(results):
    report = results("widths")
    assert report["built"] == [False, False, True]
    assert [warning for warning, _ in report["said"]] == [True, True]
    for (_, sentence), name in zip(report["said"], ["W_expand", "W_reduce"], strict=True):
        assert name in sentence and "24" in sentence and "16" in sentence


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_stream_recompute_multiplies_nothing_again(results, recipe):
    report = results(f"stream recompute, {recipe}")
    assert report["loss"] and report["gradients"] == []
    assert report["products"][0] == report["products"][1] > 0


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_recompute_of_layers_gives_the_same_gradients(results, recipe):
    report = results(f"full recompute, {recipe}")
    assert report["loss"] and report["gradients"] == []
    assert report["products"][0] < report["products"][1]


@pytest.mark.parametrize("case", [*(f"TP2 width, {recipe}" for recipe in RECIPES[:3]), "TP2+SP, tensorwise"])
def test_tensor_parallel_ranks_multiply_their_part(results, case):
    report = results(case)
    products = operands_of(report)
    recipe = case.split(", ")[1]
    assert {end: products.get(end) for end in ENDS} == dict.fromkeys(ENDS, expected(recipe, "hybrid"))
    # Rows of the gradient of W_expand: all 8 segments of 32 channels, or this rank's half of each.
    rows = {rows for module, what, _, rows in report["gemms"] if "expansion" in module and what == "weight gradient"}
    assert rows == {128 if "width" in case else 256}
    assert abs(report["loss"] - report["loss alone"]) < 0.01 * report["loss alone"]
    # Every rank rounds with scales of its own. A sum over ranks left out, or done twice, is an error of 0.5 or 1.
    assert len(report["ends"]) == 4 and max(report["ends"].values()) < 0.35, report["ends"]
