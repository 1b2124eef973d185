"""What FP8 is refused for: by the rules on pretended machines, and by programs on this one."""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import launch
import pytest
from training.test_refusals import MOCK, MODEL, WIDE, assert_no_traceback_of_ours, sentences

ROOT = Path(__file__).parents[2]
HOPPER, ADA, AMPERE, BLACKWELL = (9, 0), (8, 9), (8, 0), (10, 0)
FP8 = "--fp8-format hybrid"
ENDS = "--first-last-layers-bf16 --num-layers-at-start-in-bf16 2"
RECOMPUTED = "--hybrid-layer-pattern *-/*- --recompute-granularity full --recompute-method uniform"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
# Flags after MODEL (hidden size 64, 32 tokens, micro-batch 2), Transformer Engine's version or None, GPU, and words of
# the sentence; None where the flags are accepted.
CASES = [
    (FP8, None, HOPPER, ["--fp8-format needs Transformer Engine", "not installed", "install"]),
    (FP8, "2.20.2", AMPERE, ["--fp8-recipe delayed", "8.9", "none here"]),
    (f"{FP8} --fp8-recipe tensorwise", "2.20.2", AMPERE, ["--fp8-recipe tensorwise", "8.9"]),
    (f"{FP8} --fp8-recipe blockwise", "2.20.2", ADA, ["--fp8-recipe blockwise", "9.0"]),
    (f"{FP8} --fp8-recipe mxfp8", "2.20.2", HOPPER, ["--fp8-recipe mxfp8", "10.0"]),
    (f"{FP8} {RECOMPUTED}", "2.20.2", HOPPER, ["--fp8-recipe delayed", "--recompute-granularity full", "tensorwise"]),
    (f"{FP8} --fp8-recipe tensorwise {RECOMPUTED}", "2.20.2", HOPPER, None),
    (FP8, "2.1.0", HOPPER, ["2.2 or later", "upgrade"]),
    (f"{FP8} --no-fp8-wgrad", "2.20.2", HOPPER, ["--no-fp8-wgrad", "drop it"]),
    (f"{FP8} --no-fp8-wgrad --fp8-recipe tensorwise", "2.2.0", HOPPER, ["--no-fp8-wgrad", "drop it"]),
    (f"{FP8} {ENDS}", "2.20.2", HOPPER, ["--fp8-recipe delayed", "--first-last-layers-bf16", "tensorwise"]),
    (f"{FP8} --num-layers-at-end-in-bf16 2", "2.20.2", HOPPER, ["--num-layers-at-", "--first-last-layers-bf16"]),
    (f"{ENDS}", "2.20.2", HOPPER, ["--first-last-layers-bf16", "--fp8-format", "add one"]),
    ("--fp8-recipe tensorwise", "2.20.2", HOPPER, ["--fp8-recipe", "--fp8-format"]),
    (f"{FP8} --seq-length 20 --micro-batch-size 2", "2.20.2", HOPPER, ["--seq-length", "16"]),
    (f"{FP8} --fp8-recipe mxfp8 --seq-length 24", "2.20.2", BLACKWELL, ["--seq-length", "32"]),
    (f"{FP8} --seq-length 24 --micro-batch-size 1 {TP2}", "2.20.2", HOPPER, ["--seq-length", "layout"]),
    (f"{FP8} --hidden-size 72", "2.20.2", HOPPER, ["--hidden-size", "16"]),
    (f"{FP8} --ffn-hidden-size 48 --tensor-model-parallel-size 2", "2.20.2", HOPPER, ["--ffn-hidden-size", "layout"]),
    (FP8, "2.20.2", ADA, None),
    ("--fp8-format e4m3", "2.20.2", HOPPER, None),
    (f"{FP8} --no-fp8-wgrad", "2.2.0", HOPPER, None),
    (f"{FP8} --fp8-recipe tensorwise {ENDS}", "2.20.2", HOPPER, None),
    (f"{FP8} --fp8-recipe blockwise {TP2}", "2.20.2", HOPPER, None),
    (f"{FP8} --fp8-recipe mxfp8", "2.20.2", BLACKWELL, None),
    (f"{FP8} --fp8-recipe mxfp8 --fp8-param-gather --use-distributed-optimizer", "2.20.2", BLACKWELL, None),
    ("", None, AMPERE, None),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The sentence for each case, from one process that may import Megatron."""
    folder = tmp_path_factory.mktemp("fp8_rules")
    cases = {
        str(number): [[*MODEL, *MOCK, *WIDE, *flags.split()], version, capability]
        for number, (flags, version, capability, _) in enumerate(CASES)
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    session = Path(__file__).parent / "session_fp8_rules.py"
    done = launch.session(0, session, folder / "cases.json", folder / "results.json", env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{flags} on {te} and {gpu}" for flags, te, gpu, _ in CASES])
def test_fp8_is_refused_where_it_cannot_run(answers, number):
    words, sentence = CASES[number][3], answers[str(number)]
    if words is None:
        assert sentence is None
    else:
        assert sentence is not None and sentence.endswith(".") and "\n" not in sentence
        assert all(word in sentence for word in words), sentence


def test_a_run_in_fp8_on_this_machine_says_one_sentence():
    flags = [*MODEL, *MOCK, *WIDE, *FP8.split()]
    done = launch.session(0, "-m", "megatron_vwn.training.pretrain", *flags, env=launch.WITHOUT_GPU)
    assert done.returncode == 2, done.stderr[-2000:]
    missing = "GPU of compute capability" if find_spec("transformer_engine") else "Transformer Engine"
    assert len(sentences(done)) == 1 and "--fp8-" in sentences(done)[0] and missing in sentences(done)[0]
    assert_no_traceback_of_ours(done)


def test_a_recipe_in_fp8_is_refused_before_any_process_starts(tmp_path):
    command = ["bash", ROOT / "examples" / "launch" / "torchrun.sh", "moe-0.4b-4b", "--shrink", "64", "nodes=1"]
    done = subprocess.run(
        [*command, "gpus-per-node=1", "expert-model-parallel-size=1", "fp8-format=hybrid", "fp8-recipe=tensorwise"],
        env=launch.environment(**launch.WITHOUT_GPU),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("torchrun.sh: ")]
    assert len(lines) == 1 and "--fp8-" in lines[0] and lines[0].endswith("."), done.stderr
    assert "megatron_vwn.training.torchrun" not in done.stdout and not list(tmp_path.iterdir())
