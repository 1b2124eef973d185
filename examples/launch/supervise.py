"""Keep one node's agent (torchrun) alive, and pass a request to stop on to the workers that can obey it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_vwn.cli import REFUSED

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL = 0.2
# Between two starts of an agent; another node's may need as long to notice that the meeting is over.
_PAUSE = 5.0
# After a request to stop: workers that are still importing hear it later.
_REPEAT = 10.0
_PR_SET_CHILD_SUBREAPER = 36


def supervise(command: Sequence[str], environment: Mapping[str, str], *, worker: str, retries: int) -> int:
    """Run an agent until it ends well or with a refusal, or has ended badly ``retries`` times more than that.

    A request to stop (SIGTERM, SIGINT, SIGUSR1) reaches the workers as SIGTERM, so that they save and end. torchrun
    itself would give them 30 seconds and kill them, so it does not hear of the request; a second one ends it.

    Args:
        command: the agent's.
        environment: all of it.
        worker: a word that is on the command line of workers and of nothing else below the agent.
        retries: how often the agent is started anew.

    Returns:
        The agent's exit code; 128 + the signal's number if it was killed.
    """
    _adopt_orphans()
    requests: list[float] = []
    before = {number: signal.signal(number, lambda *_: requests.append(time.monotonic())) for number in _STOP}
    try:
        for attempt in range(retries + 1):
            agent = subprocess.Popen(command, env=dict(environment), start_new_session=True, preexec_fn=_ignore_usr1)
            code = _wait(agent, worker, requests)
            _end_descendants()
            if code in (0, REFUSED) or requests or attempt == retries:
                break
            _say(f"the agent ended with {code}; starting it anew ({retries - attempt} more times at most)")
            _sleep(_PAUSE, requests)
            if requests:
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def _wait(agent: subprocess.Popen, worker: str, requests: list[float]) -> int:
    """The agent's exit code; meanwhile requests to stop are passed on."""
    told: set[int] = set()
    heard, repeated = 0, 0.0
    while (code := agent.poll()) is None:
        time.sleep(_POLL)
        if not requests:
            continue
        now = time.monotonic()
        workers = [pid for pid in _children(agent.pid) if worker in _command_line(pid)]
        if len(requests) > heard == 0:
            _say("asked to stop: the workers save a checkpoint and end; ask again to end them now")
        fresh = [pid for pid in workers if pid not in told]
        # A worker that began after the request has nothing to save, and the agent would start it again and again.
        if len(requests) > max(heard, 1) or (told and fresh):
            agent.terminate()
            told |= set(fresh)
        elif now - repeated > _REPEAT:
            for pid in workers:
                _signal(pid, signal.SIGTERM)
            told |= set(workers)
            repeated = now
        heard = len(requests)
    return code


def _ignore_usr1() -> None:
    """Slurm may send it to every process of a step, and only this program knows what to do with it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _adopt_orphans() -> None:
    """Make workers whose agent was killed children of this process (Linux), which can then end them too."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_descendants() -> None:
    """Kill what an agent left behind: it would hold GPUs and ports."""
    while left := list(_descendants(os.getpid())):
        for pid in left:
            _signal(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(_POLL)


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _children(pid: int) -> list[int]:
    pids: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids += map(int, file.read_text().split())
    return pids


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _sleep(seconds: float, requests: list[float]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not requests:
        time.sleep(_POLL)


def _say(text: str) -> None:
    print(f"torchrun.sh: {text}.", file=sys.stderr, flush=True)
