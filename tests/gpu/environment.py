"""What the machine is: one JSON of hardware, versions and what nvidia-smi and the compilers say."""

import json
import shutil
import subprocess

import torch

from megatron_vwn.benchmark import machine

TOOLS = {
    "nvidia-smi": ["--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm", "--format=csv"],
    "nvcc": ["--version"],
    "compute-sanitizer": ["--version"],
}


def said(tool: str, arguments: list[str]) -> str | None:
    if shutil.which(tool) is None:
        return None
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=20).stdout.strip()[-1000:]
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    content = {"hardware": machine.hardware(device), "versions": machine.versions(), "commit": machine.commit()}
    print(json.dumps(content | {"tools": {tool: said(tool, words) for tool, words in TOOLS.items()}}))
