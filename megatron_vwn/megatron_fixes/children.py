"""Helpers of Megatron's checkpoint writer outlive a rank that is killed, and may hold the memory of its GPU."""

import inspect
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.managers import SyncManager

from megatron_vwn.cli import die_with_parent
from megatron_vwn.megatron_fixes.repair import repair


def end_helpers_with_their_rank() -> None:
    """Let the kernel (Linux) kill the queue's server and the persistent writer when their rank ends, however it ends.

    Both wait for messages that nobody sends any more: one process per rank stayed after every ``kill -9``.
    """
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    repair(filesystem_async, "get_write_results_queue", _from_server_that_ends)
    caller = async_utils.PersistentAsyncCaller
    if not isinstance(caller.async_loop, _Loop):
        caller.async_loop = _Loop(caller.async_loop)


def _end_with_rank() -> None:
    """End this process, one that multiprocessing started, as soon as its parent has ended."""
    die_with_parent(signal.SIGKILL, multiprocessing.parent_process().pid)


def _from_server_that_ends(stock: Callable) -> Callable:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def get_write_results_queue(*args, **kwargs):
        if filesystem_async._results_queue is None:
            given = inspect.signature(stock).bind(*args, **kwargs)
            given.apply_defaults()
            server = SyncManager(ctx=multiprocessing.get_context(given.arguments["mp_mode"]))
            server.start(_end_with_rank)
            filesystem_async._results_queue = server.Queue()
        return stock(*args, **kwargs)

    return get_write_results_queue


class _Loop:
    """Megatron's loop of the persistent writer; a spawned process looks the loop up, for it cannot be sent there."""

    def __init__(self, stock: Callable):
        self.__wrapped__ = stock

    def __call__(self, *args, **kwargs) -> None:
        _end_with_rank()
        self.__wrapped__(*args, **kwargs)

    def __reduce__(self):
        return _loop_of_child, ()


def _loop_of_child() -> _Loop:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    return _Loop(PersistentAsyncCaller.async_loop)
