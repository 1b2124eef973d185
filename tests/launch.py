"""The one home for starting sessions: scripts or modules that need Megatron, on one or several ranks.

``real()`` starts processes as a user would. ``session()`` gives the same answer sooner: importing Megatron costs
about ten seconds of a core, so a server imports it once and forks the ranks of every session. One server
per pytest process and kind (with Triton's interpreter or without) starts when it is first asked for.

What a forked rank cannot show, and what ``real()`` is for: imports in a fresh process, torchrun's own behaviour,
signals to the launcher, and the line that tells of the emulated GPU, because the emulation is installed when the rank
begins.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

TESTS = Path(__file__).parent
BASE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"}
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
INTERPRETED = {"TRITON_INTERPRET": "1"}
# Read while torch, triton, transformers or Megatron are imported: too late for a rank that is forked afterwards.
READ_AT_IMPORT = ("CUDA_", "HF_", "MKL_", "NCCL_", "NVTE_", "OMP_", "PYTHON", "TORCH", "TRANSFORMERS_", "TRITON_")
PATIENCE = 1800  # seconds; a session that hangs must not hang the suite

_servers: dict[bool, subprocess.Popen] = {}


def environment(**further: str) -> dict[str, str]:
    """The environment of a session: this one, one thread, no warnings, and the modules of tests/."""
    return os.environ | BASE | further


def command(ranks: int, *arguments: object) -> list[str]:
    """A command line for ``ranks`` ranks under torchrun; for 0, plain Python without the variables of a rank."""
    # --standalone picks a free port, so that sessions do not collide.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(torchrun if ranks else []), *map(str, arguments)]


def real(ranks: int, *arguments: object, env=None, cwd=None, timeout=PATIENCE) -> subprocess.CompletedProcess:
    """Run a script (or "-m", module) with its arguments in processes of its own."""
    return subprocess.run(
        command(ranks, *arguments),
        env=environment(**(env or {})),
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def session(ranks: int, *arguments: object, env=None, cwd=None, timeout=PATIENCE) -> subprocess.CompletedProcess:
    """As ``real()``, in forks of a server wherever that makes no difference."""
    env = dict(env or {})
    if not _can_fork(env):
        return real(ranks, *arguments, env=env, cwd=cwd, timeout=timeout)
    server = _server(interpreted="TRITON_INTERPRET" in env)
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "ranks": ranks,
            "arguments": [str(each) for each in arguments],
            "env": os.environ | env,
            "cwd": str(cwd or Path.cwd()),
            "folder": folder,
            "timeout": timeout,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        out, err = (_read(Path(folder) / name) for name in ("out", "err"))
    assert answer, f"the server ended with {server.wait()}\n{err[-4000:]}"
    code = json.loads(answer)
    if code is None:
        raise subprocess.TimeoutExpired(request["arguments"], timeout, out, err)
    return subprocess.CompletedProcess(request["arguments"], code, out, err)


def _can_fork(env: dict[str, str]) -> bool:
    allowed = BASE | WITHOUT_GPU | INTERPRETED
    if any(name.startswith(READ_AT_IMPORT) and allowed.get(name) != value for name, value in env.items()):
        return False
    if "TRITON_INTERPRET" in os.environ:
        return False  # neither server would have the environment that was asked for
    if env.get("CUDA_VISIBLE_DEVICES") == "":
        return True
    import torch

    return not torch.cuda.is_available()  # CUDA does not survive a fork


def _server(*, interpreted: bool) -> subprocess.Popen:
    if interpreted not in _servers or _servers[interpreted].poll() is not None:
        _servers[interpreted] = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(**WITHOUT_GPU, **(INTERPRETED if interpreted else {})),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    return _servers[interpreted]


@atexit.register
def _end_servers() -> None:
    for server in _servers.values():
        server.kill()
        server.wait()


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# From here on: the server's side.


def serve() -> None:
    """Answer one request per line of stdin until it ends."""
    _die_with_parent()
    # Forked ranks get their own stdout; answers go where nothing that is imported can print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from megatron_vwn import cpu

    cpu.install(announce=False)
    import megatron.training  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers  # noqa: F401

    import megatron_vwn.training.run  # noqa: F401

    gc.collect()
    gc.freeze()  # else the first collection in a rank would copy all of these pages
    # A thread would be missing in every fork, and with it whatever it holds.
    assert len(os.listdir("/proc/self/task")) == 1, "the server has threads and cannot fork"
    while line := sys.stdin.readline():
        code = _run(json.loads(line), answers)
        answers.write(json.dumps(code) + "\n")
        answers.flush()


def _run(request: dict, answers) -> int | None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = set()
    for rank in range(max(request["ranks"], 1)):
        if pid := os.fork():
            running.add(pid)
        else:
            answers.close()
            _rank(request, rank, port)
    return _wait(running, request["timeout"])


def _wait(running: set[int], timeout: float) -> int | None:
    """The first code that is not 0, after which the other ranks are killed, as torchrun does; None for a timeout."""
    end = time.monotonic() + timeout
    code = 0
    everyone = set(running)
    try:
        while running and code == 0:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                running.discard(pid)
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return None
            else:
                select.select([], [], [], 0.02)
        return code
    finally:
        for pid in everyone:  # the groups of ranks that ended too: they may have left workers behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _rank(request: dict, rank: int, port: int) -> None:
    """Become the rank, run its script and end the process."""
    code = 1
    try:
        _die_with_parent()
        os.setsid()
        _redirect(Path(request["folder"]))
        _take_environment(request, rank, port)
        _execute(request["arguments"])
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if ending.code is not None and not isinstance(ending.code, int):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(folder: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # ranks do not overwrite one another
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    # Whole lines, also where PYTHONUNBUFFERED is set: ranks write into one file.
    sys.stdout.reconfigure(line_buffering=True, write_through=False)


def _take_environment(request: dict, rank: int, port: int) -> None:
    kept = {name: value for name, value in os.environ.items() if name.startswith(READ_AT_IMPORT)}
    os.environ.clear()
    os.environ.update(request["env"] | kept)
    if request["ranks"]:
        size = str(request["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(request["cwd"])
    warnings.simplefilter("ignore")


def _execute(arguments: list[str]) -> None:
    module = arguments[0] == "-m"
    sys.argv = arguments[module:]
    # The folder of this file, which a server has instead of the script's, stays on the path through PYTHONPATH.
    sys.path[0] = os.getcwd() if module else str(Path(sys.argv[0]).parent)
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def _die_with_parent() -> None:
    """Even a parent killed with -9 leaves nothing behind."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    serve()
