"""vwn-study run: a killed study goes on where it was and redoes nothing; runs that fail do not stop the others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vwn.study import __main__ as program
from megatron_vwn.study import child as _study_child
from megatron_vwn.study import count as _study_count
from megatron_vwn.study import timing as _study_time

STEPS, SAVE, KILL_AFTER = 12, 4, 6

FLAGS = {
    "hybrid-layer-pattern": "*-/*-",
    "mtp-num-layers": 1,
    "hidden-size": 32,
    "num-attention-heads": 4,
    "ffn-hidden-size": 64,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "hidden-dropout": 0.1,
    "attention-dropout": 0.1,
    "mock-data": True,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 127,
    "micro-batch-size": 2,
    "global-batch-size": 4,
    "train-iters": STEPS,
    "lr": 1e-2,
    "log-interval": 1,
    "eval-interval": 6,
    "eval-iters": 1,
    "save-interval": SAVE,
}


def write(folder: Path, variants: dict, **flags) -> Path:
    path = folder / "study.yaml"
    content = {"baseline": "base", "flags": FLAGS | flags, "variants": variants}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def logged(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Every time that a step was logged, in order."""
    events = EventAccumulator(str(folder / "events"), purge_orphaned_data=False).Reload()
    return [(event.step, event.value) for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_a_killed_study_goes_on_redoes_nothing_and_ends_with_the_same_losses(tmp_path, capfd):
    path = write(tmp_path, {"base": None, "r4": {"vwn-m": 2, "vwn-n": 8}})
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-m", "megatron_vwn.study", "run", str(path), "--no-timing"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    with (tmp_path / "screen").open("w") as screen:
        process = subprocess.Popen([*command, "--output", str(out)], stdout=screen, stderr=screen, env=environment)
    log = out / "r4" / "seed-1" / "log.txt"
    while not log.exists() or f"iteration {KILL_AFTER:8d}/" not in log.read_text():
        assert process.poll() is None, (tmp_path / "screen").read_text()[-4000:]
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    # The study alone was killed: its trainings end by themselves.
    _, alive = psutil.wait_procs(children, timeout=30)
    assert children and not alive
    reached = int((out / "r4" / "seed-1" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert SAVE <= reached < STEPS
    assert json.loads((out / "r4" / "seed-1" / "run.json").read_text())["state"] == "running"
    done = contents(out / "base")
    assert not (out / "base" / "seed-1" / "checkpoints").exists()
    before = logged(out / "r4" / "seed-1", "lm loss")

    capfd.readouterr()
    assert program.main(["run", str(path), "--no-timing", "--output", str(out)]) == 0
    said = capfd.readouterr().out
    assert "1 of 2 runs were done earlier" in said and f"resuming from step {reached}" in said
    assert contents(out / "base") == done
    after = logged(out / "r4" / "seed-1", "lm loss")
    again = after[len(before) :]
    assert [step for step, _ in again] == list(range(reached + 1, STEPS + 1))
    # Steps behind the checkpoint that were made before are made again bit for bit, dropout included.
    twice = {step: value for step, value in before if step > reached}
    assert twice and {step: value for step, value in again if step in twice} == twice
    record = json.loads((out / "r4" / "seed-1" / "run.json").read_text())
    assert record["state"] == "done" and (record["m"], record["n"], record["tokens_per_step"]) == (2, 8, 128)
    assert (
        record["counted"]["flops_per_token"]
        > json.loads((out / "base/seed-1/run.json").read_text())["counted"]["flops_per_token"]
    )
    assert not (out / "r4" / "seed-1" / "checkpoints").exists()

    # Done is done, and a done run's flags are not changed unnoticed.
    everything = contents(out / "r4")
    assert program.main(["run", str(path), "--no-timing", "--output", str(out)]) == 0
    assert contents(out / "r4") == everything
    write(tmp_path, {"base": None, "r4": {"vwn-m": 2, "vwn-n": 8}}, lr=2e-2)
    assert program.main(["run", str(path), "--no-timing", "--output", str(out)]) == 2
    assert "was started with other flags (0.01 before, 0.02 now): delete that folder" in capfd.readouterr().err

    # What the study has made is what the report reads.
    assert program.main(["report", str(out)]) == 0
    text = (out / "report" / "report.md").read_text()
    assert "| r4 | 4 | 1 |" in text and "megatron-core 0.19" in text and "vwn-study" in text


TRAINING = """
import pathlib, sys, time
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
if value("--lr") == "2.0":
    print("Warnings of torch and Megatron come first.")
    print("megatron_vwn: this cannot be trained: lower it.")
    print("  exitcode  : 2 (pid: 7)")
    sys.exit(2)
if value("--lr") == "3.0":
    sys.exit("ValueError: broken")
if value("--lr") == "4.0":
    time.sleep(600)
if "--save" not in words:
    sys.exit(0)
folder = pathlib.Path(value("--save"))
folder.mkdir(parents=True)
(folder / "latest_checkpointed_iteration.txt").write_text("3" if value("--lr") == "5.0" else value("--train-iters"))
print(" iteration 3/ 12 | elapsed time per iteration (ms): 10.0 | lm loss: 4.0E+00 |")
"""


@pytest.fixture
def trained_by_script(monkeypatch):
    """A script instead of the training program, and nothing counted."""
    monkeypatch.setattr(_study_child, "launch", lambda flags, ranks: [sys.executable, "-c", TRAINING, *flags])
    monkeypatch.setattr(program, "check_flags", lambda words: None)
    monkeypatch.setattr(_study_count, "count", lambda commands, ranks: {name: {"unknown": "-"} for name in commands})


def test_refused_and_failing_runs_do_not_stop_the_others(tmp_path, capfd, trained_by_script):
    variants = {"refused": {"lr": 2.0}, "failing": {"lr": 3.0}, "short": {"lr": 5.0}, "base": None}
    path, out = write(tmp_path, variants), tmp_path / "out"
    assert program.main(["run", str(path), "--no-timing", "--output", str(out), "--jobs", "2"]) == 1
    printed = capfd.readouterr()
    assert "refused: this cannot be trained: lower it." in printed.out
    assert "failed with exit code 1" in printed.out and "ValueError: broken" in printed.out
    assert "ended at step 3 of 12" in printed.out
    assert "failed: refused/seed-1, failing/seed-1, short/seed-1;" in printed.err.replace("\n", "")
    states = {name: json.loads((out / name / "seed-1" / "run.json").read_text())["state"] for name in variants}
    assert states == {"refused": "refused", "failing": "failed", "short": "failed", "base": "done"}
    # Only what is not done is tried again.
    done = contents(out / "base")
    assert program.main(["run", str(path), "--no-timing", "--output", str(out)]) == 1
    assert contents(out / "base") == done
    starts = {name: json.loads((out / name / "seed-1" / "run.json").read_text())["starts"] for name in variants}
    assert {name: [start["step"] for start in each] for name, each in starts.items()} == {
        "refused": [0, 0], "failing": [0, 0], "short": [0, 3], "base": [0],
    }  # fmt: skip
    assert all(start.keys() == {"step", "hardware", "versions", "commit"} for start in starts["short"])
    # And what is done stays what it was.
    write(tmp_path, variants | {"base": {"lr": 1.0}})
    assert program.main(["run", str(path), "--no-timing", "--output", str(out)]) == 2
    assert "base/seed-1 was started with other flags (0.01 before, 1.0 now)" in capfd.readouterr().err


def test_data_that_was_made_anew_is_refused(tmp_path, capfd, trained_by_script):
    prefix, out = tmp_path / "text", tmp_path / "out"
    for end in ("bin", "idx"):
        Path(f"{prefix}.{end}").write_bytes(b"1234")
    path = write(tmp_path, {"base": None}, **{"data-path": [0.5, str(prefix)]})
    for code, tokens in ((0, b"1234"), (0, b"4321"), (2, b"12345")):
        Path(f"{prefix}.bin").write_bytes(tokens)
        assert program.main(["run", str(path), "--no-timing", "--output", str(out)]) == code
    said = capfd.readouterr().err
    assert "was started with other data (bytes before: {'" in said and "text': 4}, now: {'" in said


def test_a_step_is_timed_alone_without_the_first_steps_in_the_faster_round(
    tmp_path, capfd, trained_by_script, monkeypatch
):
    path, out = (
        write(tmp_path, {"base": None, "r4": {"vwn-m": 2, "vwn-n": 8}}, **{"train-iters": 100}),
        tmp_path / "out",
    )
    # Rounds of base, r4, base, r4; a step of the first eight takes a minute.
    typical = iter([0.5, 0.9, 0.4, 1.0])

    def read_scalars(folder):
        seconds = next(typical)
        return {
            "iteration-time": {step: 60.0 if step <= 8 else seconds + 1e-3 * (step - 19.5) for step in range(1, 31)}
        }

    monkeypatch.setattr(_study_time, "read_scalars", read_scalars)
    assert program.main(["time", str(path), "--output", str(out)]) == 0
    timings = [json.loads((out / name / "timing.json").read_text()) for name in ("base", "r4")]
    assert [each["seconds_per_step"] for each in timings] == pytest.approx([0.4, 0.9])
    assert timings[0]["rounds"] == pytest.approx([0.5, 0.4]) and timings[0]["steps"] == 22
    # What is measured is not measured again; nothing of the short runs is left.
    assert program.main(["time", str(path), "--output", str(out)]) == 0
    assert sorted(each.name for each in (out / "base").iterdir()) == ["timing.json"]
    # A report states the command that trained.
    assert "command" not in json.loads((out / "study.json").read_text())


def test_ending_a_study_ends_its_trainings(tmp_path, capfd, trained_by_script, monkeypatch):
    path, out = write(tmp_path, {"base": {"lr": 4.0}}), tmp_path / "out"
    ended = []

    def interrupt(child):
        ended.append(child._process)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_study_child.Child, "poll", lambda self: interrupt(self) if not ended else self._process.poll())
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert program.main(["run", str(path), "--no-timing", "--output", str(out)]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted; start again to go on" in capfd.readouterr().err
    assert [process.poll() for process in ended] == [-signal.SIGTERM]


def test_a_dry_run_prints_commands_and_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "check_flags", lambda words: None)
    path = write(tmp_path, {"base": None, "r4": {"vwn-m": 2, "vwn-n": 8}})
    assert program.main(["run", str(path), "--dry-run", "--output", str(tmp_path / "out"), "--only", "r4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# r4/seed-1 (12 steps, from step 0)" and lines[2].startswith("# 1 runs of 2 variants")
    assert lines[1].startswith("torchrun --standalone --nproc-per-node 1 -m megatron_vwn.training.pretrain --hybrid")
    assert f"--save {tmp_path}/out/r4/seed-1/checkpoints" in lines[1] and "--vwn-n 8 --seed 1" in lines[1]
    assert not (tmp_path / "out").exists()
