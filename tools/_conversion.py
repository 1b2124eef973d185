"""What vwn-convert and vwn-widen share: how they show progress and how they end."""

import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

from megatron_vwn.config import VirtualWidthError

_REFUSED, _INTERRUPTED = 2, 130


def progress_bar(keys: Iterable[str], description: str) -> Iterable[str]:
    """The keys, with a bar where somebody looks."""
    return tqdm(keys, desc=description, unit="tensor", disable=None)


def exit_code(program: str, run: Callable[[], None]) -> int:
    """Run a program; 0, or the code of a refusal or an interruption, which is said in one line."""
    try:
        run()
    except VirtualWidthError as refusal:
        print(f"{program}: {refusal}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        print(f"{program}: interrupted; nothing was written.", file=sys.stderr)
        return _INTERRUPTED
    return 0
