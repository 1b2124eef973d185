"""Files and folders that are written whole or not at all.

What is written lies under a hidden name beside its target, on the same file system, and gets the target's name by a
rename at the end; until then the target is as it was. An exception, Ctrl-C, and SIGTERM in a program that runs in
``cli.exit_code`` remove the hidden file or folder. What a killed process left behind is removed when its target is
written again.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_A_DAY = 24 * 60 * 60


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A hidden file to write, which replaces ``path`` when the block ends.

    A link stays a link, and a file that is replaced hands on its permissions.
    """
    path = path.resolve()
    _remove_leftovers(path)
    partial = _hidden(path, "partial")
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to fill, which replaces ``path``, whatever stands there, when the block ends."""
    path = path.resolve()
    with staging_folder(path) as staging:
        yield staging
        old = _hidden(path, "old")
        try:
            if path.exists():
                os.replace(path, old)
            os.replace(staging, path)
        finally:
            if old.exists():
                if not path.exists():
                    os.replace(old, path)
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path`` that is gone when the block ends; what is to stay is moved out of it before.

    Folders made on the way to it are removed again if nothing else came into them.
    """
    path = path.resolve()
    _remove_leftovers(path)
    staging = _hidden(path, "partial")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        staging.mkdir(parents=True)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:  # the innermost first
            with suppress(OSError):
                parent.rmdir()


def publish(staging: Path, folder: Path) -> list[Path]:
    """Move every staged file to its final place, replacing what is there; returns the final paths.

    Old indices leave first and new ones come last: a data set without its .idx is not taken for one, so a process that
    is killed in between leaves no index beside the tokens of another one.
    """
    staged = sorted(
        (path for path in staging.rglob("*") if path.is_file()), key=lambda path: (path.suffix == ".idx", path)
    )
    for path in staged:
        if path.suffix == ".idx":
            (folder / path.relative_to(staging)).unlink(missing_ok=True)
    published = []
    for path in staged:
        final = folder / path.relative_to(staging)
        final.parent.mkdir(exist_ok=True)
        os.replace(path, final)
        published.append(final)
    return published


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Replace the contents of existing files, of all or of none.

    All are written before any is replaced, so a full disk is noticed in time; if a replacement fails, files that were
    replaced already get their former contents back.
    """
    before = {path: path.read_bytes() for path in contents}
    try:
        with ExitStack() as stack:
            for path, content in contents.items():
                stack.enter_context(atomic_file(path)).write_bytes(content)
    except BaseException:
        for path, content in before.items():
            if path.read_bytes() != content:
                path.write_bytes(content)
        raise


def write_json(path: Path, content: dict) -> None:
    """Write an object as JSON with a final newline."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def _hidden(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}-{_here()}-{os.getpid()}")


def _here() -> str:
    """Where the number of a process names this one: a file system may be shared with other machines and containers.

    Containers may have their host's name, and a first process each; their namespaces of processes differ.
    """
    try:
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return socket.gethostname()


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left under hidden names of ``path``; an old folder without successor comes back."""
    if not path.parent.is_dir():
        return
    for what in ("old", "partial"):
        prefix = f".{path.name}.{what}-"
        for leftover in [each for each in path.parent.iterdir() if each.name.startswith(prefix)]:
            where, _, number = leftover.name.removeprefix(prefix).rpartition("-")
            if where not in ("", _here()) or not number.isdecimal() or _at_work(int(number)):
                continue
            # Names of earlier releases do not say where; their process may be at work elsewhere.
            if where == "" and time.time() - leftover.lstat().st_mtime < _A_DAY:
                continue
            if what == "old" and not path.exists():
                os.replace(leftover, path)
            elif leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _at_work(process: int) -> bool:
    """Whether the process is there and may be writing; one with our own number was another before us."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True
