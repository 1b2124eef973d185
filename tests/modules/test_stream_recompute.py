"""Stream recompute: the same gradients to the bit, with as many states in memory as its formula says."""

import json
from math import ceil
from pathlib import Path

import launch
import pytest

TESTS = Path(__file__).parents[1]

UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}
SOME = {"recompute_granularity": "full", "recompute_method": "block"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "moe"]}
FP32_STREAM = {"bf16": True, "fp32_residual_connection": True}
DENSE = "*-*-*-"
# name -> hybrid pattern, switches of the stream, config overrides, [(block size, whether boundaries are fused)]; all
# with dropout.
BITWISE = {
    "(2,6)": (DENSE, {}, {}, [(1, True), (2, True), (3, True), (99, True), (None, False), (4, False)]),
    "(2,3), identity carry": (DENSE, {"n": 3, "carry": "identity"}, {}, [(3, True)]),
    "(1,4), sigmoid": (DENSE, {"m": 1, "n": 4, "gate": "sigmoid"}, {}, [(2, True)]),
    "(4,4), static": (DENSE, {"m": 4, "n": 4, "connection": "static"}, {}, [(3, False)]),
    "static, identity carry": (DENSE, {"connection": "static", "carry": "identity"}, {}, [(2, True)]),
    "doubly stochastic carry": ("*-*", {"carry": "doubly-stochastic"}, {}, [(3, True)]),
    "bf16 around an fp32 stream": (DENSE, {}, FP32_STREAM, [(2, True)]),
    "selective, experts, MTP": ("*E*-/*E", {}, SELECTIVE, [(3, True)]),
    "full, chunks of 3": (DENSE, {}, UNIFORM | {"recompute_num_layers": 3}, [(3, True)]),
    "full, the first 2": (DENSE, {}, SOME | {"recompute_num_layers": 2}, [(3, True)]),
    "full, MTP": ("*-/*-", {}, UNIFORM | {"recompute_num_layers": 1}, [(2, True)]),
}
NOTHING_TO_REBUILD = ("full, MTP",)

# name -> block size, whether boundaries are fused.
MEMORY = {
    "without": (None, True),
    **{f"blocks of {size}": (size, True) for size in (1, 2, 3, 7, 99)},
    "unfused, without": (None, False),
    **{f"unfused, blocks of {size}": (size, False) for size in (1, 2, 3, 7, 99)},
}
# No parameter has as many elements as a state or a vector of all tokens.
CONNECTIONS, TOKENS, D = 7, 7, 32


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    results = tmp_path_factory.mktemp("stream_recompute") / "results.json"
    done = launch.session(1, TESTS / "modules" / "session_stream_recompute.py", results, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize("name", BITWISE)
def test_loss_and_gradients_to_the_bit(report, name):
    for run, (size, fused) in zip(report["bitwise"][name].values(), BITWISE[name][3], strict=True):
        assert run["different"] == [] and run["zero"] == []
        # Otherwise nothing was tried.
        assert (run["rebuilt"] > 0) == (size not in (None, 1) and name not in NOTHING_TO_REBUILD)
        assert (run["boundaries"] > 0) == (fused and name not in NOTHING_TO_REBUILD)


@pytest.mark.parametrize("name", MEMORY)
def test_what_the_forward_pass_keeps(report, name):
    """The formulas of ``modules.recompute``, as numbers of states H and of vectors X and Y."""
    size, fused = MEMORY[name]
    kept = report["memory"][name]["kept"]
    if size is None:
        assert kept == [CONNECTIONS, 2 * CONNECTIONS]
    else:
        blocks = ceil(CONNECTIONS / size)
        assert kept == [blocks, CONNECTIONS + (blocks - 1 if fused else 0)]


@pytest.mark.parametrize("name", MEMORY)
def test_every_byte_that_the_forward_pass_keeps(report, name):
    """The same formulas with the gates, and nothing else but the loss, a number."""
    (size, fused), m, n = MEMORY[name], 2, 6
    r, z = n / m, (n * (2 * m + n) + n) / D
    blocks = CONNECTIONS if size is None else ceil(CONNECTIONS / size)
    inputs = CONNECTIONS if size is None else blocks - 1 if fused else 0
    expected = blocks * (r + z) + CONNECTIONS + inputs
    assert report["memory"][name]["everything"] == pytest.approx(expected + 1 / (TOKENS * D), rel=1e-12)


@pytest.mark.parametrize("name", MEMORY)
def test_what_is_alive_during_the_backward_pass(report, name):
    """At each sublayer: what is kept and not used up, what is rebuilt and not used up, one dH and one dY."""
    size, fused = MEMORY[name]
    for index, (states, vectors) in enumerate(report["memory"][name]["alive"]):
        block, place = divmod(index, size or 1)
        assert states == block + place + 1 + 1, index
        if size is None:
            assert vectors == 2 * index + 1 + 1, index
            continue
        # A block holds each Y until its last rebuilt state is used up, and rebuilds all X together.
        y = block * size if place == 0 else min((block + 1) * size, CONNECTIONS)
        x = block + max(place, block == 0) if fused else max(place, 1)
        assert vectors == y + x + 1, index


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_freed_although_the_loss_is_not(report, name):
    assert report["memory"][name]["left"] == [1, 0]
    assert not report["memory"][name]["empty"], "a sublayer's backward pass began before its input was there"


def test_inference_keeps_nothing(report):
    for name, modes in report["memory"].items():
        assert modes["inference"] == [1, 0], name


def test_other_losses_are_the_same(report):
    assert len({modes["loss"] for modes in report["memory"].values()}) == 1


@pytest.mark.parametrize("what", ["backward twice", "modified between layers", "micro-batches in turn"])
def test_same_gradients(report, what):
    assert report[what] is True


def test_an_output_modified_before_the_backward_pass_is_an_error(report):
    assert "modified in place" in report["modified output"]


def test_chunks_end_with_tensors(report):
    """Which of five layers in a row leave their writes to the next."""
    assert report["leaving"] == {
        "ordinary": [True, True, True, True, False],
        "selective": [True, True, True, True, False],
        "uniform, 2": [True, False, True, False, False],
        "uniform, 9": [True, True, True, True, False],
        "block, 2": [False, False, True, True, False],
        "block, 2, fp8": [False] * 5,
    }


def test_every_parameter_is_waited_for(report):
    """Before its first use, in the ordinary order of the layers and with fused boundaries."""
    assert report["waits for parameters"] == [True, True]
