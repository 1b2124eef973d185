"""Processes beside the program: they end with it, leave Ctrl-C to it, and can be ended at any moment."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from megatron_vwn.config import VirtualWidthError

# spawn: a fork would copy the locks of tokenizers' threads, which may be held.
SPAWN = multiprocessing.get_context("spawn")


def call_apart(task: Callable[..., Any], *arguments: object, progress: Callable[[int], None]) -> Any:
    """Call a function in a process of its own, so that a library that is deaf to signals can be ended.

    Args:
        task: what to call, with a function for its progress behind the arguments; all of it must be picklable.
        arguments: of the task.
        progress: called with every number that the task gives to that function.

    Returns:
        What the task returns.

    Raises:
        VirtualWidthError: when the process dies, or as the task raises it.
        Exception: as the task raises it.
    """
    here, there = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_run, args=(there, task, arguments))
    try:
        with interrupts_blocked():
            process.start()
        there.close()  # so that the end of the process ends the pipe
        while isinstance(message := here.recv(), int):
            progress(message)
    except EOFError:
        raise VirtualWidthError("a process died, most likely for want of memory: give less text.") from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
    result, error = message
    if error is not None:
        raise error
    return result


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Processes that are started meanwhile do not hear Ctrl-C, which reaches the whole group: this one answers it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_with_parent() -> None:
    """End this process when its parent is gone, even if that was killed."""
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(pipe: Connection, task: Callable[..., Any], arguments: tuple) -> None:
    end_with_parent()
    try:
        message = task(*arguments, pipe.send), None
    except Exception as error:
        message = None, error
    pipe.send(message)
