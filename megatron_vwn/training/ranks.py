"""Which of a run's processes speak, before Megatron's process groups exist and afterwards."""

import os
import sys
import time
from collections.abc import Sequence

import torch

from megatron_vwn.cli import REFUSED
from megatron_vwn.config import VirtualWidthError

# More than the first rank of a node may lag behind the others while they import Megatron from a slow file system.
_SECONDS_TO_BE_ENDED = 120


def first_of_node() -> bool:
    """Whether this is the process that speaks for its node; its end makes torchrun end the others."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def first_of_all() -> bool:
    """Whether this is the first process of the run."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print for the user, once for all ranks."""
    if first_of_all():
        print(f"megatron_vwn: {line}", flush=True)


def say_interrupted(argv: Sequence[str]) -> None:
    """Print once for every node that Ctrl-C ended this process without a checkpoint."""
    if first_of_node():
        more = "" if "--exit-signal-handler" in argv else "; --exit-signal-handler saves before it ends"
        print(
            f"megatron_vwn: interrupted: what was trained since the last checkpoint is lost{more}.",
            file=sys.stderr,
            flush=True,
        )


def say_refusal(refusal: VirtualWidthError) -> int:
    """Print a refusal; returns the exit code that this process must then end with.

    Before process groups exist all ranks of a node reach the same refusal, which is printed once. Later it may be one
    rank's alone, as where that rank reads a damaged part of a checkpoint, so every rank prints what it meets.
    """
    if not torch.distributed.is_initialized() and not first_of_node():
        # torchrun ends all ranks as soon as one has ended, and that must not be before the refusal is printed.
        time.sleep(_SECONDS_TO_BE_ENDED)
    else:
        print(f"megatron_vwn: {refusal}", file=sys.stderr, flush=True)
    return REFUSED
