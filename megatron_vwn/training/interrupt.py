"""Ctrl-C of a training run: one line instead of a traceback for every rank, and a checkpoint where Megatron saves one.

Megatron's ``--exit-signal-handler`` listens to one signal, which is that of a scheduler, and its ranks agree on having
heard it after every step. Ctrl-C goes to all processes of a terminal, and torchrun passes on what it has heard itself.
"""

import argparse
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# torchrun interrupts its workers once more at once, and kills them after half a minute.
_NO_REPETITION = 3.0


@contextmanager
def saving_when_interrupted(args: argparse.Namespace) -> Iterator[None]:
    """With ``--exit-signal-handler``, let Ctrl-C do what that signal does; asked again later, it ends the process.

    Workers of data loaders are forks, which keep the handler, ignore the interrupt and end with their rank.

    Args:
        args: Megatron's arguments, validated.
    """
    left_alone = not args.exit_signal_handler or args.exit_signal == signal.SIGINT
    if left_alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    rank, first = os.getpid(), None

    def hear(number, frame):
        nonlocal first
        if os.getpid() != rank:
            return
        if first is None:
            first = time.monotonic()
            if args.rank == 0:
                after = "a checkpoint is saved" if args.save else "nothing is saved without --save"
                # print() may be what is interrupted, and cannot be entered twice.
                os.write(2, f"\nmegatron_vwn: interrupted: after this step {after} and training ends.\n".encode())
            signal.raise_signal(args.exit_signal)
        elif time.monotonic() - first > _NO_REPETITION:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
