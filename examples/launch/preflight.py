"""What can be found out on a node before any process of a run is started there."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.recipes.flags import check_flags
from megatron_vwn.recipes.recipe import Recipe

_PREPARE = """
import json, sys
from megatron_vwn import cpu
emulated = cpu.install()
from megatron_vwn.training.run import Run
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.megatron_fixes import apply_fixes
try:
    apply_fixes()
    Run.parse(json.load(sys.stdin), gpu=not emulated).check()
except VirtualWidthError as refusal:
    print("REFUSED", json.dumps(str(refusal)))
"""


def find_machine() -> str:
    """ "gpu" where there is one, with Transformer Engine; otherwise "cpu", which only means without that."""
    import torch

    return "gpu" if torch.cuda.is_available() and find_spec("transformer_engine") else "cpu"


def require_packages(recipe: Recipe, arguments: list[str]) -> None:
    """Refuse a missing package that would be missed in the first step or at the first checkpoint."""
    resiliency = find_spec("nvidia_resiliency_ext") is not None
    if recipe.get("in-job-restart") == "nvidia-resiliency-ext" and not resiliency:
        raise VirtualWidthError(
            "in-job-restart nvidia-resiliency-ext needs the package of that name: install it, or choose torchrun."
        )
    if recipe.get("async-save") and recipe.get("async-strategy", "nvrx") == "nvrx" and not resiliency:
        raise VirtualWidthError(
            "async-strategy nvrx needs the package nvidia-resiliency-ext: install it, or choose async-strategy=mcore."
        )
    if "--log-straggler" in arguments and find_spec("pynvml") is None:
        raise VirtualWidthError(
            "log-straggler needs the package nvidia-ml-py: install it, or give log-straggler=false."
        )


def preflight(recipe: Recipe, arguments: list[str]) -> None:
    """Let the training program refuse what it would refuse, once, instead of on every rank and after every restart.

    Flags, data and the checkpoint are looked at; in a process of its own, because this one must not hold a GPU.

    Raises:
        VirtualWidthError: the training program's own sentence.
    """
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(recipe.world_size)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PREPARE],
        env=os.environ | rank | {"LOCAL_WORLD_SIZE": str(recipe.number("gpus-per-node"))},
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
    )
    refusals = [line for line in done.stdout.splitlines() if line.startswith("REFUSED ")]
    if refusals:
        check_flags(arguments)  # knows better what a misspelt flag should be
        raise VirtualWidthError(json.loads(refusals[-1].removeprefix("REFUSED ")))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VirtualWidthError(f"the training program cannot be started here ({last}): correct the installation.")
