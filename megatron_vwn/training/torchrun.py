"""torchrun that ends as its ranks did: ``python -m megatron_vwn.training.torchrun`` with torchrun's own arguments.

torchrun itself ends with 1 whatever its ranks ended with, and shows where it was interrupted. Here 2 is a refusal,
which the rank has said, and 128 plus its number a signal; everything else stays torchrun's.
"""

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_vwn.cli import REFUSED


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with the given arguments, those of this process by default; returns the exit code."""
    try:
        run.main(argv)
    except ChildFailedError as failed:
        if any(failure.exitcode == REFUSED for failure in failed.failures.values()):
            return REFUSED
        raise
    except SignalException as ended:
        return 128 + ended.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
