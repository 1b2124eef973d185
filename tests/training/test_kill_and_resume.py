"""A run whose ranks are all killed goes on from its checkpoint as if nothing had happened, bit for bit."""

import signal
import subprocess
from pathlib import Path

import launch
import psutil
from models import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vwn.checkpoint.torch_dist import TorchDistReader

ITERATIONS, SAVE_INTERVAL, KILL_AFTER = 20, 5, 8

# Every kind of state that a checkpoint must bring back: optimizer, learning rate, data order and, through dropout, the
# random number generators of both ranks.
FLAGS = tiny(
    "*-*-",
    "--vwn-m 2 --vwn-n 6 --vwn-ngrams 2,3 --vwn-ngram-vocab 64 --tensor-model-parallel-size 2 --sequence-parallel "
    "--use-distributed-optimizer --lr-decay-style cosine --tensorboard-log-interval 1 --ckpt-format torch_dist",
    hidden_dropout=0.1,
    attention_dropout=0.1,
)


def program(folder: Path) -> list:
    flags = [*FLAGS, "--train-iters", ITERATIONS, "--save-interval", SAVE_INTERVAL]
    checkpoints = folder / "checkpoints"
    folders = ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", folder / "events"]
    return ["-m", "megatron_vwn.training.pretrain", *flags, *folders]


def start(folder: Path, log: Path, *further: str) -> subprocess.Popen:
    return subprocess.Popen(
        launch.command(2, *program(folder), *further),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env=launch.environment(),
    )


def wait_for_line(process: subprocess.Popen, log: Path, text: str) -> None:
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-4000:]


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step; of a step that was trained twice, the later one."""
    found = {}
    for file in sorted((folder / "events").iterdir(), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file)).Reload()
        if "lm loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("lm loss")}
    return found


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait() == 0, log.read_text()[-4000:]


def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = launch.session(2, *program(whole))
    assert done.returncode == 0, done.stderr[-4000:]
    expected = losses(whole)
    assert sorted(expected) == list(range(1, ITERATIONS + 1))
    # What an export must know, and no other argument says: two ranks pad the tokens to 256 rows.
    saved = TorchDistReader(whole / "checkpoints").arguments
    assert (saved.vwn_tokens, saved.padded_vocab_size) == (127, 256)

    process = start(killed, killed / "log")
    wait_for_line(process, killed / "log", f"iteration {KILL_AFTER:8d}/")
    # torchrun starts each rank in a session of its own, so a process group would not reach them.
    launcher = psutil.Process(process.pid)
    for victim in [launcher, *launcher.children(recursive=True)]:
        victim.kill()
    assert process.wait() == -signal.SIGKILL
    before = (killed / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert SAVE_INTERVAL <= int(before) < ITERATIONS
    assert max(losses(killed)) < ITERATIONS

    # How the stream is kept may change, and changes nothing.
    process = start(killed, killed / "log2", "--vwn-recompute-block", "3")
    finish(process, killed / "log2")
    assert f"training resumes from iteration {before}" in (killed / "log2").read_text()
    actual = losses(killed)
    assert actual == expected, {step: (actual.get(step), value) for step, value in expected.items()}


# Two optimizers, whose parameters two data-parallel ranks divide between them.
MUON = tiny(
    "*-/*-",
    "--vwn-m 2 --vwn-n 4 --optimizer dist_muon --bf16 --train-iters 6 --save-interval 3 --lr-decay-style cosine "
    "--tensorboard-log-interval 1 --overlap-grad-reduce --overlap-param-gather",
    hidden_dropout=0.1,
)


def test_muon_killed_before_a_save_trains_the_same_steps_again(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    folders = ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir"]
    killing = Path(__file__).parent / "session_killed.py"
    done = launch.session(2, killing, 6, *MUON, *folders, tmp_path / "killed" / "events")
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "3"
    done = launch.session(2, "-m", "megatron_vwn.training.pretrain", *MUON, *folders, tmp_path / "resumed" / "events")
    assert done.returncode == 0, done.stderr[-4000:]
    before, after = losses(tmp_path / "killed"), losses(tmp_path / "resumed")
    assert sorted(before) == [1, 2, 3, 4, 5, 6] and sorted(after) == [4, 5, 6]
    assert after == {step: before[step] for step in after}
