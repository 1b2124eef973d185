"""Entry point: ``torchrun --nproc-per-node N -m megatron_vwn.training.pretrain FLAGS``.

Takes Megatron's own flags plus ``--vwn-*`` and runs Megatron's own ``pretrain()``. Exit code 0 is a finished (or
deliberately interrupted) run, 2 is a refusal in one sentence, anything else is a failure.
"""

import sys
from collections.abc import Sequence

from megatron_vwn import cpu


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the given flags, those of this process by default; returns the exit code."""
    emulated = cpu.install()
    # Only now: Megatron looks for CUDA while it is imported.
    from megatron_vwn.training.run import run

    return run(sys.argv[1:] if argv is None else argv, gpu=not emulated)


if __name__ == "__main__":
    sys.exit(main())
