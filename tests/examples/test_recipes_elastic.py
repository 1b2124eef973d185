"""A shrunk recipe trains through the cluster's launcher on two "nodes" of this machine and survives their failures."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from launch import WITHOUT_GPU, session
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vwn.recipes.recipe import load_recipe

ROOT = Path(__file__).parents[2]
STEPS, SAVE_INTERVAL = 20, 5
# One rank a node, because every start of one takes ten seconds of a core; test_kill_and_resume.py has other layouts.
RECIPE = """
    moe-0.4b-4b --shrink 64 expert-model-parallel-size=2 micro-batch-size=2 global-batch-size=4 train-iters=20
    save-interval=5 eval-interval=1000 eval-iters=0 log-interval=1
"""
# Two ranks must import Megatron on one core, after a restart too.
PATIENCE = 240


def launch(folder: Path, log: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", ROOT / "examples/launch/torchrun.sh", *RECIPE.split(), *words],
        cwd=folder,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture
def nodes(tmp_path):
    """Starts launchers and ends them, with all that they started, whatever happens."""
    started = []

    def start(log: str, *words: str) -> subprocess.Popen:
        started.append(launch(tmp_path, tmp_path / log, *words))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                victim.kill()
            process.wait()


def values(folder: Path, tag: str) -> dict[int, float]:
    """A value of every step; of a step that was trained twice, the later one."""
    found = {}
    for file in sorted(folder.rglob("events.out.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file)).Reload()
        if tag in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(tag)}
    return found


def wait_until(condition, processes: list[subprocess.Popen], logs: list[Path]):
    end = time.monotonic() + PATIENCE
    while not (result := condition()):
        ended = [process.poll() for process in processes]
        assert ended == [None] * len(ended) and time.monotonic() < end, "\n".join(
            log.read_text()[-3000:] for log in logs
        )
        time.sleep(0.2)
    return result


def agent_of(launcher: subprocess.Popen) -> psutil.Process:
    return next(
        each for each in psutil.Process(launcher.pid).children() if "megatron_vwn.training.torchrun" in each.cmdline()
    )


def workers_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    return [each for each in agent_of(launcher).children() if "megatron_vwn.training.pretrain" in each.cmdline()]


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(timeout=PATIENCE) == 0, log.read_text()[-4000:]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_nodes_go_on_after_a_killed_worker_and_a_killed_agent(tmp_path, nodes):
    recipe, _, shrink, *overrides = RECIPE.split()
    overrides += ["nodes=1", "gpus-per-node=2", "save=whole", "load=whole", "tensorboard-dir=whole-events"]
    flags = load_recipe(recipe, overrides, shrink=int(shrink)).arguments(transformer_engine=False)
    # Forks, because what they compare with is what starts through the launcher.
    whole = session(2, "-m", "megatron_vwn.training.pretrain", *flags, env=WITHOUT_GPU, cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout[-2000:] + whole.stderr[-2000:]
    losses = {tag: values(tmp_path / "whole-events", tag) for tag in ("lm loss", "mtp_1 loss")}
    assert all(sorted(each) == list(range(1, STEPS + 1)) for each in losses.values())

    endpoint = ["--rdzv-endpoint", f"localhost:{free_port()}"]
    folders = ["save=killed", "load=killed", "tensorboard-dir=killed-events"]
    logs = [tmp_path / "node0.log", tmp_path / "node1.log"]
    pair = [nodes(log.name, "nodes=2", "gpus-per-node=1", *folders, *endpoint) for log in logs]

    def trained() -> int:
        return max(values(tmp_path / "killed-events", "lm loss"), default=0)

    def saved() -> int:
        latest = tmp_path / "killed" / "latest_checkpointed_iteration.txt"
        return int(latest.read_text() or 0) if latest.exists() else 0

    wait_until(lambda: saved() >= SAVE_INTERVAL and trained() > SAVE_INTERVAL, pair, logs)
    first = workers_of(pair[1])
    first[0].kill()
    # A rank that is new: the node has its agent still, and the other node's rank began anew too.
    wait_until(lambda: saved() >= 2 * SAVE_INTERVAL and trained() > 2 * SAVE_INTERVAL, pair, logs)
    second = workers_of(pair[1])
    assert not {each.pid for each in first} & {each.pid for each in second}
    assert saved() < STEPS

    agent_of(pair[1]).kill()
    for process, log in zip(pair, logs, strict=True):
        finish(process, log)
    text = logs[1].read_text()
    assert f"the agent ended with {-signal.SIGKILL}; starting it anew" in text
    assert not [each for each in second if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    resumed = [
        line for line in "".join(log.read_text() for log in logs).splitlines() if "training resumes from" in line
    ]
    assert len(resumed) >= 2 and all("iteration 0 " not in line for line in resumed)
    for tag, expected in losses.items():
        actual = values(tmp_path / "killed-events", tag)
        assert actual == expected, {step: (actual.get(step), value) for step, value in expected.items()}
