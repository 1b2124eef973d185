"""What the command-line programs share: how they show progress and how they end."""

import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

from megatron_vwn.config import VirtualWidthError

_REFUSED, _INTERRUPTED = 2, 130


def progress_bar(keys: Iterable[str], description: str) -> Iterable[str]:
    """The keys, with a bar where somebody looks."""
    return tqdm(keys, desc=description, unit="tensor", disable=None)


def exit_code(program: str, run: Callable[[], int | None]) -> int:
    """Run a program; its own code or 0, or that of a refusal or an interruption, which is said in one line."""
    try:
        return run() or 0
    except VirtualWidthError as refusal:
        print(f"{program}: {refusal}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        print(f"{program}: interrupted; nothing was written.", file=sys.stderr)
        return _INTERRUPTED
