"""What Megatron refuses by itself, said as this package says it."""

import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import megatron.core

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.ranks import first_of_node

# megatron.core and megatron.training lie side by side.
_MEGATRON = str(Path(megatron.core.__path__[0]).parent) + os.sep


@contextmanager
def quoting_megatron() -> Iterator[None]:
    """Turn what Megatron's own validation raises, often a bare assertion, into one sentence that quotes it.

    Anything else, a fault of the machine or of a library say, goes on as it is: flags are not what is wrong.
    """
    try:
        yield
    except VirtualWidthError:
        raise
    except (AssertionError, ValueError, RuntimeError, NotImplementedError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        # Faults of CUDA are RuntimeErrors as well; no line of Megatron raises those.
        raised = isinstance(error, AssertionError | ValueError) or frame.line.startswith("raise ")
        if not (raised and frame.filename.startswith(_MEGATRON)):
            raise
        reason = " ".join(str(error).split()).rstrip(".") or frame.line
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}, {kept_traceback(error)}"
        raise VirtualWidthError(f"Megatron refuses these flags: {reason} ({where}).") from error


def kept_traceback(error: BaseException) -> str:
    """Words for a sentence: where the traceback of an error was written to, once for every node."""
    if not first_of_node():
        return "traceback kept by another rank"
    try:
        descriptor, path = tempfile.mkstemp(prefix="megatron_vwn-", suffix="-traceback.txt")
        with os.fdopen(descriptor, "w") as file:
            file.writelines(traceback.format_exception(error))
    except OSError as fault:
        return f"traceback lost: {fault.strerror}"
    return f"traceback in {path}"
