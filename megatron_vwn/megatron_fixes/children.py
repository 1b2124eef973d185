"""Helpers of Megatron's checkpoint writer outlive a rank that is killed, and may hold the memory of its GPU."""

import ctypes
import inspect
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.managers import SyncManager

from megatron_vwn.megatron_fixes.repair import repair

_PR_SET_PDEATHSIG = 1


def end_helpers_with_their_rank() -> None:
    """Let the kernel (Linux) kill the queue's server and the persistent writer when their rank ends, however it ends.

    Both wait for messages that nobody sends any more: one process per rank stayed after every ``kill -9``.
    """
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    repair(filesystem_async, "get_write_results_queue", _from_server_that_ends)
    caller = async_utils.PersistentAsyncCaller
    if not isinstance(caller.async_loop, _Loop):
        caller.async_loop = _Loop(caller.async_loop)


def end_with_parent() -> None:
    """End this process, one that multiprocessing started, as soon as its parent has ended."""
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def _from_server_that_ends(stock: Callable) -> Callable:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def get_write_results_queue(*args, **kwargs):
        if filesystem_async._results_queue is None:
            given = inspect.signature(stock).bind(*args, **kwargs)
            given.apply_defaults()
            server = SyncManager(ctx=multiprocessing.get_context(given.arguments["mp_mode"]))
            server.start(end_with_parent)
            filesystem_async._results_queue = server.Queue()
        return stock(*args, **kwargs)

    return get_write_results_queue


class _Loop:
    """Megatron's loop of the persistent writer; a spawned process looks the loop up, for it cannot be sent there."""

    def __init__(self, stock: Callable):
        self.__wrapped__ = stock

    def __call__(self, *args, **kwargs) -> None:
        end_with_parent()
        self.__wrapped__(*args, **kwargs)

    def __reduce__(self):
        return _loop_of_child, ()


def _loop_of_child() -> _Loop:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    return _Loop(PersistentAsyncCaller.async_loop)
