"""The real Megatron-Bridge, in an environment of its own: bash tests/bridge.sh."""

import json
from importlib.util import find_spec
from pathlib import Path

import launch
import pytest
from checkpoint.bridge_cases import CHANGED, CHECKPOINTS, EXPRESSIBLE, INEXPRESSIBLE, LAYOUTS, RANKS
from hf.cases import HALF

HERE = Path(__file__).parent
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # another order of sums over ranks
ONE_SENTENCE = {
    "gated gelu": "Megatron has no MLP with a gated gelu",
    "unknown field": "has vwn_later, which no provider knows",
    "a field that says nothing": "moe_intermediate_size = 24, which Megatron-Bridge cannot carry in this model: set ",
    "another model's name": "has rms_norm_eps, which this model calls norm_eps",
    "stages": "pipeline_model_parallel_size = 2 does not go with a virtual width",
    "layers": "hybrid_stack_spec",
    "padding": "should_pad_vocab = True",
    "vocabulary": "do not divide the 97 rows of the vocabulary",
    "partition": "--vwn-partition sequence splits the stream by token",
    "another activation": "no gated MLP with tanh",
    "fp8": "export_weight_dtype fp8 has not been tried",
    "another parameter": "would drop parameters of the model that a VWN model does not have",
    "a tensor that lacks": "the folder lacks (model.layers.2.connection.routing)",
    "a tensor too many": "would drop tensors of the folder that its model does not have (another)",
}

pytestmark = pytest.mark.skipif(find_spec("megatron.bridge") is None, reason="needs Megatron-Bridge")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge")
    # What Bridge imports starts threads, so that the server could not fork.
    run = launch.real(RANKS, HERE / "session_bridge.py", folder, env=launch.WITHOUT_GPU)
    assert run.returncode == 0, run.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def reports(folder):
    return [json.loads((folder / f"report {rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", [*EXPRESSIBLE, *(f"{name}, bf16" for name in HALF)])
def test_to_megatron_and_back(reports, name):
    for report in reports:
        layouts = report["models"][name]
        assert LAYOUTS.keys() - layouts.keys() <= {"EP2"}
        for layout, found in layouts.items():
            # Bytes: out by export_hf_weights, out by save_hf_pretrained, in as vwn-convert's.
            assert (found["exported"], found["saved"], found["converted"]) == ([], [], []), layout
            assert found["config"], layout
            dtype = "bf16" if name.endswith("bf16") else "fp32"
            assert found["logits"] <= (0 if layout == "alone" else TOLERANCE[dtype]), layout


@pytest.mark.parametrize("name", [name for name in CHANGED if name not in INEXPRESSIBLE])
def test_a_field_changes_the_provider(reports, name):
    assert reports[0]["fields"][name]


def test_refusals(reports):
    found = reports[0]["refusals"]
    assert found.keys() == ONE_SENTENCE.keys()
    for name, part in ONE_SENTENCE.items():
        assert part in found[name] and found[name].endswith("."), found[name]


def test_checkpoints_of_bridge(folder, reports):
    run = launch.real(0, HERE / "session_bridge_checkpoint.py", folder, env=launch.WITHOUT_GPU)
    assert run.returncode == 0, run.stderr[-6000:]
    found = json.loads((folder / "checkpoints.json").read_text())
    assert found == {name: {"tensors": [], "settings": []} for name in CHECKPOINTS}
