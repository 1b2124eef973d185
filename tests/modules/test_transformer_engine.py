"""Models of Transformer Engine's layers, built on the CPU: what becomes of each kind of sublayer.

Only their forward pass needs a GPU (``tests/gpu``).
"""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import launch
import pytest

TESTS = Path(__file__).parents[1]
# name -> hybrid pattern, config overrides, kinds of layers, a linear layer that must be there, packages.
PATTERNS = {
    "attention and MLP": ("*-*-", {}, "Transformer MLP", "TELayerNormColumnParallelLinear", []),
    "grouped queries in a window": (
        "*-*-",
        {"num_query_groups": 2, "window_size": [3, 0]},
        "Transformer MLP",
        "TELayerNormColumnParallelLinear",
        [],
    ),
    "experts in a grouped GEMM": ("*E*E", {}, "Transformer MoE", "TEColumnParallelGroupedLinear", []),
    "latent attention": ("+-+-", {}, "Transformer MLP", "TELinear", []),
    "latent attention, down-projections fused": (
        "+-+-",
        {"mla_down_proj_fusion": True},
        "Transformer MLP",
        "TELayerNormColumnParallelLinear",
        [],
    ),
    "Mamba": ("M-M-", {}, "Mamba MLP", "TELayerNormColumnParallelLinear", ["mamba_ssm", "einops"]),
    "gated delta net": (
        "G-G-",
        {"deterministic_mode": False},
        "Transformer MLP",
        "TELayerNormColumnParallelLinear",
        ["fla"],
    ),
    "further prediction": ("*-*-/*-", {}, "Transformer MLP", "TELayerNormColumnParallelLinear", []),
}
# m = 2, n = 8, D = 32: 8 segments of 16 channels, and 2m + n columns of the coefficients of each.
CONNECTION = {"routing": [8 * 12], "scale": [8 * 12], "weight": [16, 12], "norm": [16]}
REPLACED_BY_FUSION = ("enorm.weight", "hnorm.weight", "eh_proj.weight")

pytestmark = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine")


def missing(name):
    return [package for package in PATTERNS[name][4] if find_spec(package) is None]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What building each pattern gave, of those whose packages are there."""
    folder = tmp_path_factory.mktemp("transformer_engine")
    wanted = {name: entry[:2] for name, entry in PATTERNS.items() if not missing(name)}
    (folder / "patterns.json").write_text(json.dumps(wanted))
    session = TESTS / "modules" / "session_transformer_engine.py"
    done = launch.real(1, session, folder / "patterns.json", folder / "results.json", env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(params=PATTERNS)
def pattern(request, reports):
    """Name and report of one pattern."""
    if missing(request.param):
        pytest.skip(f"needs {' and '.join(missing(request.param))}")
    report = reports[request.param]
    assert "error" not in report, report["error"]
    return request.param, report


def test_every_layer_has_a_connection_and_adds_no_residual(pattern):
    name, report = pattern
    symbols, _, kinds, linear, _ = PATTERNS[name]
    assert len(report["layers"]) == len(symbols.replace("/", ""))
    assert {layer["kind"] for layer in report["layers"]} == {f"VirtualWidth{kind}Layer" for kind in kinds.split()}
    for layer in report["layers"]:
        assert (layer["connection"], layer["branches"], layer["residuals"]) == (True, 1, 0), layer
    assert any(linear in layer["linears"] for layer in report["layers"])


def test_the_backbone_has_the_names_and_shapes_of_the_baseline(pattern):
    _, report = pattern
    backbone = {name: shape for name, shape in report["wide"].items() if name not in report["virtual width"]}
    kept = {name: shape for name, shape in report["baseline"].items() if not name.endswith(REPLACED_BY_FUSION)}
    assert backbone == kept


def test_the_checkpoint_has_every_parameter(pattern):
    _, report = pattern
    connections = {name: shape for name, shape in report["sharded"].items() if ".connection." in name}
    assert len(connections) == len(CONNECTION) * len(report["layers"])
    assert all(
        shape[-len(expected) :] == expected
        for name, shape in connections.items()
        for expected in [CONNECTION[name.rsplit(".", 1)[1]]]
    )
    assert sum(map(math.prod, report["sharded"].values())) == sum(map(math.prod, report["wide"].values()))
