"""vwn-prepare-data leaves no data set behind that is not complete, however it ends."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import launch
import pytest

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.__main__ import main
from megatron_vwn.data.indexed import check_indexed_dataset


def run(*arguments):
    return main([*map(str, arguments), "--workers", "1"])


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("some text")
    assert run(folder / "a.txt", "--train-tokenizer", 258, "--output", folder / "a") == 0
    return folder / "a_tokenizer"


class Unfinished:
    """The program in a session of its own, in the middle of a corpus: its input is a pipe that stays open."""

    def __init__(self, folder, tokenizer_folder):
        self.folder = folder
        os.mkfifo(folder / "corpus.jsonl")
        arguments = ["corpus.jsonl", "--output", "out", "--tokenizer", tokenizer_folder, "--workers", "2"]
        self.process = subprocess.Popen(
            launch.command(0, "-m", "megatron_vwn.data", *arguments),
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env=launch.environment(**launch.WITHOUT_GPU),
            start_new_session=True,
        )
        # More than the batches that the program holds back for its two workers, so that some are written.
        line = json.dumps({"text": "word " * 60_000}) + "\n"
        self.pipe = (folder / "corpus.jsonl").open("w")
        for _ in range(12):
            self.pipe.write(line)
        self.pipe.flush()
        deadline = time.monotonic() + 300
        while not any(path.stat().st_size for path in folder.glob(".out.*/out.bin")):
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.stderr.read()
            time.sleep(0.1)

    def end(self, number):
        """Signal the program, and with SIGINT the whole group; returns its exit code and its messages."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        code, errors = self.process.wait(300), self.process.stderr.read()
        self.pipe.close()
        return code, errors

    def wait_for_members(self):
        deadline = time.monotonic() + 60
        while self.members():
            assert time.monotonic() < deadline, "workers outlive the program"
            time.sleep(0.1)

    def members(self):
        """Processes of its session that are still there (zombies excluded)."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(stat.parent.name)
        return found


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the test holds the program up with a named pipe")
def test_killed_in_the_middle(tokenizer_folder, tmp_path):
    unfinished = Unfinished(tmp_path, tokenizer_folder)
    unfinished.end(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".out.")] == ["corpus.jsonl"]
    unfinished.wait_for_members()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the test holds the program up with a named pipe")
def test_interrupted_in_the_middle(tokenizer_folder, tmp_path):
    unfinished = Unfinished(tmp_path, tokenizer_folder)
    # Ctrl-C of a terminal reaches the workers as well; they must not answer.
    code, errors = unfinished.end(signal.SIGINT)
    assert code == 130
    assert errors.splitlines() == ["vwn-prepare-data: interrupted; nothing was written."]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
    unfinished.wait_for_members()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the test holds the program up with a named pipe")
def test_a_worker_is_killed(tokenizer_folder, tmp_path):
    unfinished = Unfinished(tmp_path, tokenizer_folder)
    for process in unfinished.members():
        if "spawn_main" in Path(f"/proc/{process}/cmdline").read_text():
            os.kill(int(process), signal.SIGKILL)
    unfinished.pipe.close()
    assert unfinished.process.wait(300) == 2
    assert unfinished.process.stderr.read().startswith(
        "vwn-prepare-data: a worker died, most likely for want of memory"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_ended_by_a_scheduler(tokenizer_folder, tmp_path, monkeypatch, capsys):
    from megatron_vwn.data import encode as _encode

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(_encode.Encoder, "__call__", lambda self, batch: signal.raise_signal(signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    assert run(tmp_path / "a.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out") == 143
    assert capsys.readouterr().err == "vwn-prepare-data: interrupted; nothing was written.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("completed", [0, 1, 2])
def test_killed_while_replacing(completed, tokenizer_folder, tmp_path, monkeypatch):
    # Of equal length, so that no size betrays a new .bin beside an old .idx.
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.txt").write_text("yz")
    assert run(tmp_path / "a.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out") == 0
    replace, moved = os.replace, []

    def replace_or_die(source, target):
        if len(moved) == completed:
            raise SystemExit("killed")
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    with pytest.raises(SystemExit, match="killed"):
        run(tmp_path / "b.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out", "--overwrite")
    with pytest.raises(VirtualWidthError, match=r"out\.idx does not exist"):
        check_indexed_dataset(str(tmp_path / "out"))
