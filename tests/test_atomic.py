"""Files and folders appear whole or not at all, and programs end with the same codes."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading

import pytest

from megatron_vwn import cli
from megatron_vwn.atomic import (
    _hidden,
    atomic_file,
    atomic_folder,
    publish,
    replace_files,
    staging_folder,
    write_json,
)
from megatron_vwn.config import VirtualWidthError

FAILURES = [ValueError, KeyboardInterrupt, SystemExit]


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_text() for path in folder.rglob("*")}


def fail_at(monkeypatch, number):
    """The rename of this number fails, and renames after it do not."""
    replace, calls = os.replace, []

    def give_up(*paths):
        calls.append(paths)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", give_up)
    return calls


@pytest.mark.parametrize("failure", FAILURES)
def test_a_file_that_fails_leaves_the_old_one(tmp_path, failure):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(failure), atomic_file(path) as partial:
        partial.write_text("ne")
        raise failure
    assert tree(tmp_path) == {"file": "old"}


def test_a_file_is_as_before_until_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    with atomic_file(tmp_path / "link") as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == tmp_path and partial.name.startswith(".file.")
    assert tree(tmp_path) == {"file": "new", "link": "new"} and (tmp_path / "link").is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": [1]})
    assert path.read_text() == '{\n "a": [\n  1\n ]\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"good": 1, "bad": object()})
    assert tree(tmp_path) == {"results.json": '{\n "a": [\n  1\n ]\n}\n'}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, failure):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("old")
    for target in (folder, tmp_path / "on" / "the" / "way"):
        with pytest.raises(failure), atomic_folder(target) as partial:
            (partial / "b").write_text("ne")
            raise failure
    assert tree(tmp_path) == {"folder": False, "folder/a": "old"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "on" / "the" / "way"
    for name in ("a", "b"):
        with atomic_folder(folder) as partial:
            (partial / name).write_text(name)
    assert tree(folder.parent) == {"way": False, "way/b": "b"}


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_whose_rename_fails_leaves_the_old_one(tmp_path, monkeypatch, number):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("old")
    fail_at(monkeypatch, number)
    with pytest.raises(OSError, match="No space left"), atomic_folder(folder) as partial:
        (partial / "b").write_text("new")
    assert tree(tmp_path) == {"folder": False, "folder/a": "old"}


def test_what_is_published_stays_and_an_index_comes_last(tmp_path, monkeypatch):
    calls = fail_at(monkeypatch, 0)
    target = tmp_path / "data" / "out"
    with staging_folder(target) as staging:
        for name in ("out.idx", "out.bin", "out.json"):
            (staging / name).write_text(name)
        published = publish(staging, target.parent)
    assert [path.name for path in published] == ["out.bin", "out.json", "out.idx"]
    assert [path for _, path in calls] == published
    assert sorted(tree(target.parent)) == ["out.bin", "out.idx", "out.json"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_of_several_files_all_or_none_are_replaced(tmp_path, monkeypatch, number):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text("old")
    before = tree(tmp_path)
    fail_at(monkeypatch, number)
    with pytest.raises(OSError, match="No space left"):
        replace_files(dict.fromkeys(paths, b"new"))
    assert tree(tmp_path) == before
    replace_files(dict.fromkeys(paths, b"new"))
    assert tree(tmp_path) == dict.fromkeys("abc", "new")


def test_exit_codes(capsys):
    def refuse():
        raise VirtualWidthError("this cannot be: do that.")

    def interrupt():
        raise KeyboardInterrupt

    assert cli.exit_code("p", lambda: None) == 0
    assert cli.exit_code("p", lambda: 7) == 7
    assert capsys.readouterr().err == ""
    assert cli.exit_code("p", refuse) == cli.REFUSED == 2
    assert capsys.readouterr().err == "p: this cannot be: do that.\n"
    assert cli.exit_code("p", interrupt) == 130
    assert capsys.readouterr().err == "p: interrupted; nothing was written.\n"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_program_that_is_ended_leaves_nothing_half_written(tmp_path, capsys, number, code):
    def write():
        with atomic_file(tmp_path / "file") as partial:
            partial.write_text("half")
            try:
                signal.raise_signal(number)
            finally:  # a scheduler may say it twice
                signal.raise_signal(signal.SIGTERM)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert cli.exit_code("p", write, "go on") == code
    assert capsys.readouterr().err == "p: interrupted; go on.\n"
    assert tree(tmp_path) == {}
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_what_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.exit_code("p", lambda: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path, dead):
    host = socket.gethostname()
    here = f"{host}-{os.stat('/proc/self/ns/pid').st_ino}"
    before = f".x.partial-{dead}"  # of an earlier release
    for name in (before, f".x.partial-{here}-{dead}", f".x.partial-{here}-{os.getpid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    os.utime(tmp_path / before, (0, 0))
    (tmp_path / f".x.old-{here}-{dead}").mkdir()
    (tmp_path / f".x.old-{here}-{dead}" / "a").write_text("old")  # killed between two renames
    (tmp_path / f".file.partial-{here}-{dead}").write_text("half")
    others = [f".x.partial-elsewhere-{dead}", f".x.partial-{here}-{os.getppid()}", f".xy.partial-{dead}", ".x.partial-"]
    # Of another container on a host of this name, and what may be at work in one.
    others += [f".x.partial-{host}-1-{os.getpid()}", f".x.partial-0{dead}"]
    for name in others:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError), atomic_folder(tmp_path / "x") as partial:
        assert partial.name == f".x.partial-{here}-{os.getpid()}"
        assert (tmp_path / "x" / "a").read_text() == "old"
        raise ValueError
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert tree(tmp_path) == {"x": False, "x/a": "old", "file": "whole"} | dict.fromkeys(others, False)


def test_processes_are_told_apart_without_namespaces(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "stat", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    assert _hidden(tmp_path / "x", "old").name == f".x.old-{socket.gethostname()}-{os.getpid()}"


def test_progress_is_said_where_nobody_looks(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_SECONDS_BETWEEN_LINES", 0)
    assert list(cli.progress_bar(iter("ab"), "copying", "letter", str.upper)) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["copying A: 0 of 2 letters after 0 s", "copying B: 1 of 2 letters after 0 s"]


def test_a_program_may_run_in_a_thread():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.exit_code("p", lambda: 5)))
    thread.start()
    thread.join()
    assert codes == [5]
