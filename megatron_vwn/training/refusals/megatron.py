"""What Megatron refuses by itself, said as this package says it."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_vwn.config import VirtualWidthError


@contextmanager
def quoting_megatron() -> Iterator[None]:
    """Turn what Megatron's own validation raises, often a bare assertion, into one sentence that quotes it."""
    try:
        yield
    except VirtualWidthError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split()).rstrip(".") or frame.line
        raise VirtualWidthError(
            f"Megatron refuses these flags: {reason} ({os.path.basename(frame.filename)}:{frame.lineno})."
        ) from error
