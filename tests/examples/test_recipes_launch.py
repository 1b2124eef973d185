"""Launchers print what they would run, as stored in launch/, and refuse what cannot run in one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
sys.path.insert(0, str(LAUNCH))

import supervise  # noqa: E402
import torchrun  # noqa: E402

from megatron_vwn.recipes.recipe import load_recipe  # noqa: E402

# Stored command: the launcher and its words. `python tests/examples/test_recipes_launch.py` writes them anew.
STORED = {
    "one-node": ("torchrun.sh", "moe-0.4b-4b nodes=1 micro-batch-size=2 --baseline"),
    "two-small-nodes": (
        "torchrun.sh",
        "moe-a0.8b-r8 --shrink 64 --machine cpu nodes=2 gpus-per-node=2 tensor-model-parallel-size=2 "
        "pipeline-model-parallel-size=2 --rdzv-endpoint node0:29500",
    ),
    "resiliency": (
        "torchrun.sh",
        "moe-2.5b-25b in-job-restart=nvidia-resiliency-ext --rdzv-endpoint node0:29500 --rdzv-id a -- --lr 1e-4 "
        "--empty-unused-memory-level 1",
    ),
    "slurm": ("slurm.sbatch", "moe-a3.3b lr=2e-4 -- --seed 7"),
    "dense": ("torchrun.sh", "dense-1b"),
}


def dry_run(script: str, line: str) -> subprocess.CompletedProcess:
    words = line.split()
    end = words.index("--") if "--" in words else len(words)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NCCL", "VWN", "SLURM"))}
    return subprocess.run(
        ["bash", LAUNCH / script, *words[:end], "--dry-run", *words[end:]],
        env=environment | {"VWN_PYTHON": sys.executable, "VWN_CONTAINER": "/images/pytorch.sqsh"},
        cwd="/",
        capture_output=True,
        text=True,
    )


def printed(name: str) -> str:
    done = dry_run(*STORED[name])
    assert done.returncode == 0, done.stderr
    assert ("torchrun.sh: dense-1b has no experts, so this of its base is left out: moe-" in done.stderr) == (
        name == "dense"
    )
    return done.stdout.replace(str(ROOT), "CHECKOUT")


@pytest.mark.parametrize("name", STORED)
def test_dry_runs_print_the_stored_commands(name):
    assert printed(name) == (Path(__file__).parent / "launch" / f"{name}.txt").read_text()


def test_a_dry_run_of_many_nodes_needs_no_place_to_meet(capsys, monkeypatch):
    monkeypatch.setattr(torchrun, "check_flags", lambda arguments: None)
    assert torchrun.main(["moe-0.4b-4b", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "    --rdzv-endpoint HOST:PORT \\\n" in out
    assert err == "torchrun.sh: HOST:PORT stands for one of the nodes, where all meet, and a port.\n"
    assert torchrun.main(["moe-0.4b-4b", "--dry-run", "nodes=1"]) == 0
    out, err = capsys.readouterr()
    assert "--standalone" in out and err == ""


@pytest.mark.parametrize(
    ("words", "ordered"),
    [
        ([], False),
        (["context-parallel-size=2"], True),
        (["tensor-model-parallel-size=2"], True),
        (["pipeline-model-parallel-size=2"], False),
    ],
)
def test_launches_are_put_in_order_only_where_tensor_or_context_parallelism_needs_it(words, ordered):
    arguments = load_recipe("dense-1b", words).arguments(transformer_engine=True)
    assert torchrun.launch_order(arguments) == ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if ordered else {})


def refusal(capsys, *words: str) -> str:
    """The one sentence with which a real start is refused, before anything is started."""
    assert torchrun.main(list(words)) == torchrun.REFUSED
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("torchrun.sh: ") and err.endswith(".\n" if "?" not in err else "?\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "words, said",
    [
        (["moe-0.4b"], "there is no recipe moe-0.4b: did you mean moe-0.4b-4b?"),
        (["dense"], "there is no recipe dense: did you mean dense-1b?"),
        (["llama"], "choose one of dense-1b, moe-0.4b-4b, moe-2.5b-25b"),
        (["elsewhere/own.yaml"], "there is no recipe elsewhere/own.yaml"),
        (["moe-0.4b-4b", "nodes"], "'nodes' is no override"),
        (["moe-0.4b-4b", "nodes=many"], "nodes of moe-0.4b-4b is 'many'"),
        (["moe-0.4b-4b"], "runs on 4 nodes, which have to meet: add --rdzv-endpoint"),
        (
            ["moe-0.4b-4b", "tensor-model-parallel-size=3"],
            "32 GPUs (4 nodes of 8) cannot be divided by TP 3 x PP 1 x CP 1",
        ),
        (["moe-0.4b-4b", "expert-model-parallel-size=64"], "cannot be divided by ETP 1 x EP 64 x PP 1 of experts = 64"),
        (
            ["moe-0.4b-4b", "global-batch-size=100"],
            "global-batch-size 100 cannot be divided by micro-batch-size 4 x 32",
        ),
        (["moe-0.4b-4b", "num-attention-heads=18", "tensor-model-parallel-size=4"], "num-attention-heads 18 cannot"),
        (["moe-0.4b-4b", "num-experts=100"], "num-experts 100 cannot be divided by 8 expert-parallel ranks"),
        (
            ["moe-0.4b-4b", "tensor-model-parallel-size=16", "num-query-groups=3"],
            "num-attention-heads 16 cannot be divided",
        ),
        (
            ["moe-2.5b-25b", "stages-per-rank=3"],
            "31 layers and the one of multi-token prediction cannot be divided into 6",
        ),
        (
            ["moe-2.5b-25b", "global-batch-size=128"],
            "a step has 1 micro-batches, which interleaved stages cannot take 2",
        ),
        (
            ["moe-2.5b-25b", "tensor-model-parallel-size=2", "sequence-parallel=false"],
            "experts on several tensor-parallel ranks need sequence-parallel",
        ),
        (["moe-2.5b-25b", "layers-per-stage=[4, 4]"], "layers-per-stage [4, 4] has 8 layers in 2 stages"),
        (["moe-a3.3b", "no-overlap-p2p-communication=true"], "computes wrong results on two pipeline ranks"),
        (["moe-a0.8b-r8", "hidden-size=1540"], "--hidden-size 1540 is not divisible by --vwn-m 8"),
        (["moe-a0.8b-r8", "--", "--vwn-n", "4"], "--vwn-n 4 is smaller than --vwn-m 8"),
        (["moe-a0.8b-r8", "--baseline", "vwn-n=16"], "the baseline has no virtual width: drop vwn-n or --baseline"),
        (
            ["moe-0.4b-4b", "layers=[[4, '*-'], [4, '*E']]", "pipeline-model-parallel-size=4"],
            "pipeline rank 0 of 4 has no",
        ),
        (["moe-0.4b-4b", "--shrink", "0"], "--shrink is 0"),
        (["moe-0.4b-4b", "nodes=010"], "nodes of moe-0.4b-4b is '010'"),
        (["moe-0.4b-4b", "--", "--nodes", "2"], "--nodes is no flag of the training program"),
        (
            ["moe-a3.3b", "recompute-granularity=full", "recompute-method=uniform"],
            "finds no two sublayers in a row",
        ),
        (["moe-0.4b-4b", "recompute-modules=core_atn"], "recompute-modules has 'core_atn': choose from core_attn"),
        (["moe-0.4b-4b", "nodes=1", "in-job-restart=slurm"], "choose torchrun or nvidia-resiliency-ext"),
    ],
)
def test_impossible_runs_are_refused_in_one_sentence(capsys, words, said):
    assert said in refusal(capsys, *words)


def test_packages_that_are_not_there_are_missed_before_the_start(capsys, monkeypatch):
    import preflight

    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    start = ["moe-0.4b-4b", "nodes=1", "--machine"]
    assert "needs the package of that name" in refusal(
        capsys, *start, "cpu", "in-job-restart=nvidia-resiliency-ext", "micro-batch-size=2"
    )
    assert "choose async-strategy=mcore" in refusal(capsys, *start, "cpu", "async-strategy=nvrx", "micro-batch-size=2")
    assert "needs the package nvidia-ml-py" in refusal(capsys, *start, "gpu", "micro-batch-size=2")


def test_flags_and_data_are_looked_at_before_the_start(capsys, tmp_path):
    small = ["moe-0.4b-4b", "--shrink", "64", "--machine", "cpu"]
    assert "there is no flag or key hiden-size: did you mean hidden-size?" in refusal(capsys, *small, "hiden-size=64")
    assert "needs Transformer Engine" in refusal(capsys, *small, "fp8-format=hybrid")
    (tmp_path / "file").touch()
    assert "/file is a file: give a folder" in refusal(capsys, *small, f"save={tmp_path}/file")
    missing = f"train-data-path={tmp_path}/none"
    assert str(tmp_path) in refusal(capsys, *small, missing, "tokenizer-type=NullTokenizer", "vocab-size=1023")


def test_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *sorted(LAUNCH.glob("*.s*h"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(list(LAUNCH.glob("*.s*h"))) == 2


# Stands for an agent: starts a worker that notes the signal it gets and ends, and ends with it, or by itself.
WORKER = """
import pathlib, signal, sys, time
note = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (note.write_text("saved"), sys.exit()))
note.with_suffix(".ready").touch()
time.sleep(60)
"""
AGENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WORKER!r}, sys.argv[1], "the-worker"])
sys.exit(child.wait() if sys.argv[2] == "wait" else int(sys.argv[2]))
"""


def test_a_request_to_stop_reaches_the_workers_and_not_the_agent(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); from supervise import supervise; import os; "
    code += f"sys.exit(supervise([sys.executable, '-c', {AGENT!r}, {str(tmp_path / 'note')!r}, 'wait'], os.environ, "
    code += "worker='the-worker', retries=1))"
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "note.ready").exists():
        time.sleep(0.05)
    launcher.send_signal(signal.SIGUSR1)
    _, said = launcher.communicate(timeout=30)
    assert launcher.returncode == 0, said
    assert (tmp_path / "note").read_text() == "saved"
    assert "the workers save a checkpoint and end" in said


def test_an_agent_that_fails_is_started_anew_and_leaves_no_workers_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervise, "_PAUSE", 0.0)
    command = [sys.executable, "-c", AGENT, str(tmp_path / "note"), "7"]
    before = {each.pid for each in psutil.Process().children(recursive=True)}
    assert supervise.supervise(command, os.environ, worker="the-worker", retries=2) == 7
    # What another test left may end meanwhile.
    assert {each.pid for each in psutil.Process().children(recursive=True)} <= before
    assert capfd.readouterr().err.count("starting it anew") == 2
    # A refusal would be the same again.
    assert supervise.supervise([*command[:-1], "2"], os.environ, worker="the-worker", retries=2) == 2
    assert "starting it anew" not in capfd.readouterr().err


if __name__ == "__main__":
    for each in STORED:
        (Path(__file__).parent / "launch" / f"{each}.txt").write_text(printed(each))
