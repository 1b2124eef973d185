"""What the command-line programs share: their exit codes, how they end, and how they show progress.

Nothing here imports torch or Megatron: the programs refuse what they can before they import either.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from megatron_vwn.config import VirtualWidthError

FAILED = 1
"""The program ran and what it looked at is not in order; also how Python ends when something was not foreseen."""
REFUSED = 2
"""A refusal, which is one sentence on stderr; argparse ends with it, too."""
DIFFERENT = 3
"""``checkpoint.verify``: two checkpoints were run and do not compute the same."""
INTERRUPTED = 130
"""Ctrl-C, or SIGTERM of a scheduler."""


def progress_bar(keys: Iterable[str], description: str) -> Iterable[str]:
    """The keys, with a bar where somebody looks."""
    from tqdm import tqdm

    return tqdm(keys, desc=description, unit="tensor", disable=None)


def exit_code(program: str, run: Callable[[], int | None]) -> int:
    """Run a program; its own code or 0, or that of a refusal or an interruption, which is said in one line."""
    try:
        with _ended_like_interrupted():
            return run() or 0
    except VirtualWidthError as refusal:
        print(f"{program}: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{program}: interrupted; nothing was written.", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """A program that is ended by its scheduler (SIGTERM) cleans up as after Ctrl-C."""
    previous = signal.getsignal(signal.SIGTERM)
    # Python sets handlers in its main thread only, and cannot put back one (None) that it did not set.
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
