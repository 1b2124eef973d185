"""Start the checkpoint writer's helper process by fork.

Megatron starts it by spawn because a process that has initialised CUDA cannot be forked. Spawn imports the main
script again, which takes seconds and breaks a script without an ``if __name__ == "__main__"`` guard. Without CUDA
nothing speaks against fork.
"""

import inspect

from megatron_vwn.config import VirtualWidthError


def install() -> None:
    """Make fork the default start method of ``get_write_results_queue``; imports ``megatron.core``."""
    from megatron.core import __version__
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue = inspect.unwrap(getattr(filesystem_async, "get_write_results_queue", None))
    if getattr(queue, "__defaults__", None) != ("spawn",):
        raise VirtualWidthError(
            f"megatron-core {__version__} starts its checkpoint writer in a way that the CPU emulation does not know: "
            "install a 0.19 release."
        )
    queue.__defaults__ = ("fork",)
