"""The quickstart's recipes: Megatron takes their flags, and each has runs of its own. Nothing is trained here."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import launch
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

import quickstart
import recipes

ACCEPT = """
import json, os, pathlib, sys
from unittest import mock
from megatron_vwn import cpu
cpu.install()
from megatron_vwn.training import run
from megatron_vwn.training.refusals import refuse
refused = {}
with mock.patch.object(refuse, "check_data"):  # there is none
    for name, (ranks, flags) in json.loads(pathlib.Path(sys.argv[1]).read_text()).items():
        os.environ["WORLD_SIZE"] = str(ranks)
        try:
            run.Run.parse(flags, gpu=False).check()
        except run.VirtualWidthError as refusal:
            refused[name] = str(refusal)
print(json.dumps(refused))
"""
MACHINES = {
    "two processes": recipes.Machine("cpu", 2, hidden_size=128, heads=4, sequence=128, batch=8, learning_rate=3e-3),
    "one GPU": recipes.Machine("gpu", 1, 512, 8, 256, 16, 1e-3, precision="--bf16"),
    "two GPUs": recipes.Machine("gpu", 2, 512, 8, 256, 16, 1e-3, precision="--bf16"),
}


def test_megatron_accepts_every_recipe(tmp_path):
    commands = {}
    for name, recipe in recipes.RECIPES.items():
        for where, machine in MACHINES.items():
            flags = recipes.megatron_flags(recipe, machine, "data", "index")
            commands[f"{name} on {where}"] = machine.ranks, flags
            commands[f"{name} on {where}, wide"] = machine.ranks, [*flags, *recipe.virtual_width.split()]
    script, given = tmp_path / "accept.py", tmp_path / "commands.json"
    script.write_text(ACCEPT)
    given.write_text(json.dumps(commands))
    done = launch.session(0, script, given, env={"RANK": "0", "LOCAL_RANK": "0"} | launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_experts_are_grouped_only_where_transformer_engine_is():
    grouped = replace(MACHINES["two GPUs"], experts="--moe-grouped-gemm")
    flags = [
        recipes.megatron_flags(recipes.RECIPES["moe-mtp"], machine, "", "") for machine in (grouped, *MACHINES.values())
    ]
    assert ["--moe-grouped-gemm" in each for each in flags] == [True, False, False, False]
    assert "--moe-grouped-gemm" not in recipes.megatron_flags(recipes.RECIPES["dense"], grouped, "", "")


# Stands for a launch: writes down its flags and leaves the trace of a complete run.
LAUNCH = """
import json, pathlib, sys
folder, *flags = sys.argv[1:]
folder = pathlib.Path(folder)
(folder / "checkpoints").mkdir(exist_ok=True)
with (folder / "launches").open("a") as file:
    print(json.dumps(flags), file=file)
last = "--exit-interval" if "--exit-interval" in flags else "--train-iters"
(folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(flags[flags.index(last) + 1])
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """The quickstart on two processes, with a stand-in for every launch: call it with flags, get the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "OUT", tmp_path / "out")
    monkeypatch.setattr(quickstart, "this_machine", lambda: MACHINES["two processes"])
    monkeypatch.setattr(quickstart, "prepare_data", lambda _: None)
    monkeypatch.setattr(quickstart, "evaluate", lambda *_: [{"bits_per_byte": 2.0}] * 2)
    monkeypatch.setattr(quickstart, "summarise", lambda *_: "the table")
    monkeypatch.setattr(quickstart, "quote", lambda *_: "the paragraphs")
    monkeypatch.setattr(
        quickstart, "command", lambda _, flags, folder: [sys.executable, "-c", LAUNCH, str(folder), *flags]
    )

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *flags])
        return quickstart.main()

    return call


def launches(folder):
    return [json.loads(line) for line in (folder / "launches").read_text().splitlines()]


def test_each_recipe_has_its_own_runs_and_forgets_only_them(start, tmp_path):
    dense, experts = tmp_path / "out", tmp_path / "out" / "moe-mtp"
    (dense / "data").mkdir(parents=True)
    assert start() == start("--recipe", "moe-mtp") == 0
    assert {path.name for path in dense.iterdir()} == {"baseline", "virtual-width", "settings.json", "data", "moe-mtp"}
    assert {path.name for path in experts.iterdir()} == {"baseline", "virtual-width", "settings.json"}
    assert "*-*-*-*-" in launches(dense / "baseline")[0]
    assert "*E*E/*E" in launches(experts / "baseline")[0]
    (experts / "baseline" / "of an earlier run").touch()
    assert start("--recipe", "moe-mtp", "--fresh") == 0
    assert not (experts / "baseline" / "of an earlier run").exists()
    (experts / "baseline" / "of an earlier run").touch()
    assert start("--fresh") == 0
    assert (experts / "baseline" / "of an earlier run").exists()
    assert (dense / "data").exists()


def test_the_second_run_has_the_virtual_width_and_resumes_half_way(start, tmp_path):
    assert start("--recipe", "moe-mtp") == 0
    (baseline,) = launches(tmp_path / "out" / "moe-mtp" / "baseline")
    first, second = launches(tmp_path / "out" / "moe-mtp" / "virtual-width")
    assert second == [*baseline, "--vwn-m", "2", "--vwn-n", "8"]
    assert first == [*second, "--exit-interval", "100"]
    assert start("--recipe", "moe-mtp") == 0
    assert len(launches(tmp_path / "out" / "moe-mtp" / "virtual-width")) == 2


def test_runs_with_other_settings_are_refused(start, monkeypatch, capsys):
    assert start("--recipe", "moe-mtp") == 0
    other = replace(recipes.RECIPES["moe-mtp"], virtual_width="--vwn-m 2 --vwn-n 6")
    monkeypatch.setitem(recipes.RECIPES, "moe-mtp", other)
    assert start("--recipe", "moe-mtp") == 1
    assert "out/moe-mtp holds runs with other settings: start with --fresh" in capsys.readouterr().err
    assert start() == 0


def test_an_unknown_recipe_is_answered_with_the_known_ones(start, capsys):
    with pytest.raises(SystemExit, match="2"):
        start("--recipe", "moe")
    assert "invalid choice: 'moe' (choose from 'dense', 'moe-mtp')" in capsys.readouterr().err
