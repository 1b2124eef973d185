"""Write both runs as Hugging Face folders: export.py BASELINE VIRTUAL_WIDTH

One process for all of it, because most of an export this small is the import of Megatron.
"""

import sys
from pathlib import Path

from evaluation import FOLDER

from megatron_vwn.checkpoint import convert_cli as convert
from megatron_vwn.checkpoint import widen_cli as widen

# The baseline has no virtual width, and only models with one have an export: with one segment, which is never carried
# otherwise than a residual is, it is the same function. Its prediction of further tokens would not be.
ORDINARY = (
    *("--vwn-m", "1", "--vwn-n", "1", "--vwn-connection", "static", "--vwn-embedding", "tiled"),
    *("--further-predictions", "drop"),
)


def main(baseline: Path, wide: Path) -> int:
    """Write what is not there yet; the exit code of the tool that failed, or 0."""
    narrow = baseline / "one-segment"
    steps = (
        (wide / FOLDER, convert.main, ("to-hf", wide / "checkpoints", wide / FOLDER)),
        (narrow, widen.main, (baseline / "checkpoints", narrow, *ORDINARY)),
        (baseline / FOLDER, convert.main, ("to-hf", narrow, baseline / FOLDER)),
    )
    for target, tool, arguments in steps:
        if not target.exists() and (code := tool([str(argument) for argument in arguments])):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
