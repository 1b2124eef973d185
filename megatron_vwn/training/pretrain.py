"""Entry point: ``torchrun --nproc-per-node N -m megatron_vwn.training.pretrain FLAGS``.

Takes Megatron's own flags plus ``--vwn-*`` and runs Megatron's own ``pretrain()``. Exit code 0 is a finished (or
deliberately interrupted) run, 2 is a refusal in one sentence, 130 an interrupt that saved nothing, anything else is a
failure.
"""

import sys
from collections.abc import Sequence

from megatron_vwn.cli import INTERRUPTED
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.refusals.versions import refuse_versions, untested_megatron


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the given flags, those of this process by default; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _main(argv)
    except KeyboardInterrupt:
        from megatron_vwn.training.ranks import say_interrupted

        say_interrupted(argv)
        return INTERRUPTED


def _main(argv: Sequence[str]) -> int:
    from megatron_vwn import cpu
    from megatron_vwn.training.ranks import say_refusal

    try:
        refuse_versions(argv)
        emulated = cpu.install()
        run = _import_run()
    except VirtualWidthError as refusal:
        return say_refusal(refusal)
    return run(argv, gpu=not emulated)


def _import_run():
    """Only now: Megatron looks for CUDA while it is imported."""
    try:
        from megatron_vwn.training.run import run
    except ImportError as error:
        if untested_megatron() is None:
            raise
        raise VirtualWidthError(
            f"{untested_megatron()} cannot be used ({error}): install megatron-core 0.19.2."
        ) from error
    return run


if __name__ == "__main__":
    sys.exit(main())
