"""What the command-line programs share: flags with their values, exit codes, how they end, and how they show progress.

Nothing here imports torch or Megatron: the programs refuse what they can before they import either.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from megatron_vwn.config import VirtualWidthError

FAILED = 1
"""The program ran and what it looked at is not in order; also how Python ends when something was not foreseen."""
REFUSED = 2
"""A refusal, which is one sentence on stderr; argparse ends with it, too."""
DIFFERENT = 3
"""``checkpoint.verify``: two checkpoints were run and do not compute the same."""
INTERRUPTED = 128 + signal.SIGINT
"""Ctrl-C; other signals that end a program give 128 + theirs, such as 143 for SIGTERM."""

# Ctrl-C, a scheduler, a terminal that is closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_BETWEEN_LINES = 30
_PR_SET_PDEATHSIG = 1


class Ended(KeyboardInterrupt):
    """A signal asks the program to end; what it has begun is removed as after Ctrl-C."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.number = number


def exit_code(program: str, run: Callable[[], int | None], left: str = "nothing was written") -> int:
    """Run a program and say in one line why it ended early.

    Args:
        program: its name.
        run: what it does.
        left: what an interruption leaves, for that line.

    Returns:
        Its own code or 0; 2 after a refusal; 128 + the number of the signal that ended it: 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    try:
        with _signals_raise():
            return run() or 0
    except VirtualWidthError as refusal:
        print(f"{program}: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt as end:
        print(f"{program}: interrupted; {left}.", file=sys.stderr)
        return 128 + getattr(end, "number", signal.SIGINT)


def progress_bar[T](
    items: Iterable[T], description: str, unit: str = "tensor", name: Callable[[T], str] | None = None
) -> Iterator[T]:
    """The items, with a bar on a terminal and elsewhere a line every half minute.

    Args:
        items: what is worked through.
        description: what is being done.
        unit: one item, in a word.
        name: of an item, to be shown while it is worked on.
    """
    items = list(items)
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(items, desc=description, unit=unit) as bar:
            for item in bar:
                if name is not None:
                    bar.set_description(f"{description} {name(item)}")
                yield item
        return
    begun = said = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said, shown = now, "" if name is None else f" {name(item)}"
            print(
                f"{description}{shown}: {number} of {len(items)} {unit}s after {now - begun:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        yield item


def flag_groups(words: Sequence[str]) -> list[tuple[str, ...]]:
    """A command line's flags, each with its values; words before the first flag are a group of their own."""
    groups: list[tuple[str, ...]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append((word,))
        else:
            groups[-1] += (word,)
    return groups


def die_with_parent(number: int, parent: int) -> None:
    """In a child: have the kernel (Linux) send it a signal when its parent dies, even by SIGKILL.

    The kernel takes the thread that started the child for the parent, so children must be started from the main thread.

    Args:
        number: of the signal.
        parent: id of that process, which may have died already.
    """
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Within, the signals that end programs raise ``Ended``, once: what cleans up afterwards is not disturbed."""
    # Python sets handlers in its main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # It cannot put back a handler (None) that it did not set; what is ignored (nohup) stays so.
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    ours = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}

    def end(number: int, frame: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
