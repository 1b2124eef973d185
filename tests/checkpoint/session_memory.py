"""By how many bytes the memory of this process grows while it converts a checkpoint of one large table and back."""

import resource
import sys
from pathlib import Path

import torch

from megatron_vwn.checkpoint.convert_cli import main

folder = Path(sys.argv[1])


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


torch.zeros(1) + 1
before = peak()
assert main(["to-hf", str(folder / "megatron"), str(folder / "hf"), "--shard-mebibytes", "16"]) == 0
there = peak()
assert main(["from-hf", str(folder / "hf"), str(folder / "back")]) == 0
print("grown", there - before, peak() - before)
